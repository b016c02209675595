"""Decode of the policy `active`: its products as our kernels have them, in engines and on ONNX Runtime's CUDA provider.

    CoreFFN "active"  ->  CoreLinear gate, CoreLinear up, Gated, CoreLinear down         one op for every product with a threshold
    CoreLinear(x, W [N,D])  ->  CoreLinear(x, W by inputs [D,N], by_inputs = 1)          rows that are left out are not read

The first is a rewrite of the graph, the second of its weights, which whoever runs the graph has to turn.
"""

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from ..base.onnx_text import function
from ..plugins.core_ffn.body import ACTIVATIONS
from ..plugins.core_linear import op as core_linear
from .edit import Edit


def gated_function(activation: str) -> onnx.FunctionProto:
    """What stands between the products of an FFN."""
    return function(f"""Gated (gate_out, up_out) => (z) {{
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
    }}""")


def products(edit: Edit, activation: str) -> None:
    """Every CoreFFN with thresholds becomes three products and what stands between them."""
    gated = gated_function(activation)
    for node in [n for n in edit.graph.nodes if n.op == "CoreFFN"]:
        x, w_gate, w_up, w_down_t, x_norm, z_norm, x_threshold, z_threshold = node.inputs
        layer, y, name = node.attrs["layer"], node.outputs[0], node.name
        node.outputs.clear()

        def linear(part: str, given: list[gs.Tensor], name: str = name, layer: int = layer) -> gs.Variable:
            out = gs.Variable(f"{name}.{part}/y")
            edit.core_node(core_linear.OP, {}, f"{name}.{part}", layer, given, [out], **core_linear.AS_STORED)
            return out

        parts = [linear(p, [x, w, x_norm, x_threshold]) for p, w in (("gate", w_gate), ("up", w_up))]
        z = edit.call(gated, *parts)[0]
        w_down = edit.op("Transpose", w_down_t, perm=[1, 0])  # as a checkpoint has it; `turn` takes it back
        edit.core_node(core_linear.OP, {}, f"{name}.down", layer, [z, w_down, z_norm, z_threshold], [y],
                       **core_linear.AS_STORED)  # fmt: skip


def turn(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Rewrite a graph so that its CoreLinear read weights by inputs; returns {new initializer: the weight as stored}."""
    graph = model.graph
    stored = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    makers = {n.output[0]: n for n in graph.node if n.op_type == "Transpose"}
    new: dict[str, TensorProto] = {}
    linear = [n for n in graph.node if n.op_type == "CoreLinear"]
    if not linear:
        return new
    for node in linear:
        turned = makers.get(node.input[1])
        if turned is not None:
            node.input[1] = turned.input[0]
        else:
            weight = stored[node.input[1]]
            node.input[1] = by_inputs(weight).name
            new[node.input[1]] = weight
        for attribute in node.attribute:
            if attribute.name == "by_inputs":
                attribute.i = 1
    read = {i for n in graph.node for i in n.input} | {o.name for o in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    nodes = [n for n in graph.node if not (n.op_type == "Transpose" and n.output[0] not in read)]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*kept, *map(by_inputs, new.values())])
    graph.node.extend(nodes)
    return new


def by_inputs(weight: TensorProto) -> TensorProto:
    """The initializer of a weight [N,D] that is held as [D,N]; it points at no bytes yet."""
    name, dims = f"{weight.name}{core_linear.BY_INPUTS}", list(reversed(weight.dims))
    return TensorProto(name=name, data_type=weight.data_type, dims=dims, data_location=TensorProto.EXTERNAL)
