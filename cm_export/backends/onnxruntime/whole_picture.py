"""The tower of one picture that is one segment: attention among all patches, without a mask of N x N numbers.

    Attention(q, k, v, mask)  [1,H,N,d]  ->  MultiHeadAttention [1,N,H d], which keeps no scores of N x N either

A second session, for pictures whose borders (the input of axis `segments+1`) are 0 and N; others go through the graph as it is.
"""

import onnx

from ...base import dims
from ...base.errors import SurgeryError
from ...base.onnx_text import DOMAIN
from .lower import import_domain, local_function

_NAME = "WholePicture"
_BORDERS = f"{dims.SEGMENTS}+1"


def borders(model: onnx.ModelProto) -> str | None:
    """The input that says where segments end, if the tower has one."""
    axes = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return next((name for name, found in axes.items() if found == [_BORDERS]), None)


def attend_to_all(model: onnx.ModelProto) -> None:
    """Rewrite in place: every attention whose mask says nothing but where segments end sees all patches.

    Raises SurgeryError where the number of heads does not follow from the graph.
    """
    makers, ends = {o: n for n in model.graph.node for o in n.output}, {borders(model)}
    found = [n for n in model.graph.node if (n.op_type, n.domain, len(n.input)) == ("Attention", "", 4)]
    inputs = {v.name for v in model.graph.input}
    masked = [n for n in found if _values_read(n.input[3], makers) & inputs == ends]
    sizes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    if not masked:
        return
    heads = {sizes[n.input[0]][1].dim_value if n.input[0] in sizes else 0 for n in masked}
    if len(heads) != 1 or not all(heads):
        raise SurgeryError(f"heads of attention: {sorted(heads)}", where="vision graph", fix="build the bundle again")
    for node in masked:
        scale = next(a for a in node.attribute if a.name == "scale")
        node.op_type, node.domain = _NAME, DOMAIN
        node.input[:] = node.input[:3]
        del node.attribute[:]
        node.attribute.append(scale)
    import_domain(model)
    model.functions.append(_whole_picture(heads.pop()))


def _values_read(name: str, makers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names whose values, not only sizes, decide a value."""
    seen, open_ends = set(), [name]
    while open_ends:
        name = open_ends.pop()
        if name in seen:
            continue
        seen.add(name)
        maker = makers.get(name)
        if maker is not None and maker.op_type != "Shape":
            open_ends.extend(maker.input)
    return seen


def _whole_picture(heads: int) -> onnx.FunctionProto:
    rows = "\n".join(
        f"{x}_rows = Transpose <perm = [0, 2, 1, 3]> ({x})\n{x}_flat = Reshape ({x}_rows, flat)" for x in "qkv"
    )
    return local_function(f"""{_NAME} <scale> (q, k, v) => (y) {{
        flat = Constant <value_ints = [0, 0, -1]> ()
        by_head = Constant <value_ints = [0, 0, {heads}, -1]> ()
        {rows}
        y_flat = com.microsoft.MultiHeadAttention <num_heads = {heads}, scale: float = @scale> (q_flat, k_flat, v_flat)
        y_rows = Reshape (y_flat, by_head)
        y = Transpose <perm = [0, 2, 1, 3]> (y_rows)
    }}""")
