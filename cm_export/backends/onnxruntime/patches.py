"""The first product of a tower whose host cuts pictures into patches: a convolution that slides nowhere is a product.

    Conv(x, w)   x [N,C,p,p] (or [N,C,t,p,p]), as large as the kernel   ->   x [N,C p p] w^T [C p p,E]

ONNX Runtime computes the convolution patch by patch, five times as slowly.
"""

import onnx

from ...base.onnx_text import DOMAIN
from .lower import attribute, import_domain, local_function


def multiply_patches(model: onnx.ModelProto) -> None:
    """Rewrite in place."""
    graph = model.graph
    makers = {o: n for n in graph.node for o in n.output}
    tensors = {t.name: t for t in graph.initializer}
    kinds = set()
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in tensors:
            continue
        kernel = list(tensors[node.input[1]].dims)[1:]
        if _rows(makers.get(node.input[0]), tensors) != kernel or any(attribute(node, "pads") or ()):
            continue
        if (attribute(node, "group") or 1) > 1 or attribute(node, "auto_pad") not in (None, "NOTSET"):
            continue
        kinds.add((len(kernel) + 1, len(node.input)))
        node.op_type, node.domain = f"Patches{len(kernel) + 1}D{len(node.input)}", DOMAIN
        del node.attribute[:]
    if kinds:
        import_domain(model)
    model.functions.extend(_product(*kind) for kind in sorted(kinds))


def _rows(maker: onnx.NodeProto | None, tensors: dict[str, onnx.TensorProto]) -> list[int] | None:
    """Dimensions behind the first of what a Reshape makes, where they are written down."""
    if maker is None or maker.op_type != "Reshape" or maker.input[1] not in tensors:
        return None
    return onnx.numpy_helper.to_array(tensors[maker.input[1]]).tolist()[1:]


def _product(rank: int, inputs: int) -> onnx.FunctionProto:
    bias = "y = Add (product, b)" if inputs > 2 else "y = Identity (product)"
    names = ", ".join("xwb"[:inputs])
    return local_function(f"""Patches{rank}D{inputs} ({names}) => (out) {{
        x_flat = Flatten <axis = 1> (x)
        w_flat = Flatten <axis = 1> (w)
        product = com.microsoft.FusedMatMul <transB = 1> (x_flat, w_flat)
        {bias}
        behind = Constant <value_ints = {list(range(2, rank))}> ()
        out = Unsqueeze (y, behind)
    }}""")
