"""Portable graph -> what ONNX Runtime's CPU kernels run fastest, in memory, at load time.

    MatMul(x, Transpose(W))                       -> FusedMatMul(x, W, transB)      no transposed copy of the weights
    CoreFFN(x, Wg, Wu, Wd_t, core_neurons)        -> CoreRows(x, ffn.i.gate, ffn.i.up, ffn.i.down)
                                                     three inputs [B,K,D] that the host gathers once per request

Gathering inside every step is slower than dense (a gather of 40 % costs more than the products it saves).
"""

from typing import Any

import onnx

from ..onnx_text import DOMAIN, OPSET
from ..plugins.core_ffn.op import ACTIVATIONS

_MICROSOFT = "com.microsoft"
ROWS = ("gate", "up", "down")


def lower(model: onnx.ModelProto, rows_as_inputs: bool) -> onnx.ModelProto:
    """Rewrite in place and return the model. `rows_as_inputs`: CoreFFN's rows become graph inputs."""
    graph = model.graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    nodes, activation = [], None
    for node in graph.node:
        indexed = node.op_type == "CoreFFN" and len(node.input) == 5
        if node.op_type != "CoreFFN" or (indexed and not rows_as_inputs):
            nodes.append(node)
            continue
        activation, weights = _attribute(node, "activation"), list(node.input[1:4])
        if indexed:
            layer = _attribute(node, "layer")
            shape = ["batch", f"core_neurons.{layer}", shapes[weights[0]][1]]  # each layer may have its own number
            weights = [f"ffn.{layer}.{part}" for part in ROWS]
            graph.input.extend(onnx.helper.make_tensor_value_info(w, onnx.TensorProto.FLOAT, shape) for w in weights)
        nodes.append(
            onnx.helper.make_node("CoreRows", [node.input[0], *weights], list(node.output), node.name, domain=DOMAIN)
        )
    if activation is not None:
        model.functions.append(_core_rows(activation))
    _keep(graph, _fuse_transposes(nodes, set(shapes)))
    model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    return model


def _core_rows(activation: str) -> onnx.FunctionProto:
    """CoreFFN over rows that are already gathered (or all rows): weights [K,D] or [B,K,D], neuron-major."""
    text = f"""CoreRows (x, gate, up, down) => (y, z) {{
        gate_out = com.microsoft.FusedMatMul <transB = 1> (x, gate)
        up_out = com.microsoft.FusedMatMul <transB = 1> (x, up)
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        y = MatMul (z, down)
    }}"""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{_MICROSOFT}" : 1]> '
    return onnx.parser.parse_function(header + text)


def _fuse_transposes(nodes: list[onnx.NodeProto], weights: set[str]) -> list[onnx.NodeProto]:
    turned = {
        n.output[0]: n.input[0]
        for n in nodes
        if n.op_type == "Transpose" and n.input[0] in weights and list(_attribute(n, "perm") or (1, 0)) == [1, 0]
    }
    out = []
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in turned:
            node = onnx.helper.make_node(
                "FusedMatMul",
                [node.input[0], turned[node.input[1]]],
                list(node.output),
                node.name,
                domain=_MICROSOFT,
                transB=1,
            )
        out.append(node)
    return out


def _keep(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Put in the nodes whose results somebody reads; drop initializers and core indices that nobody does."""
    read, alive = {o.name for o in graph.output}, []
    for node in reversed(nodes):
        if any(o in read for o in node.output):
            alive.append(node)
            read.update(node.input)
    kept = [t for t in graph.initializer if t.name in read]
    inputs = [v for v in graph.input if v.name in read or v.name not in ("core_neurons", "core_counts")]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(reversed(alive))
    graph.initializer.extend(kept)
    graph.input.extend(inputs)


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    value = next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
    return value.decode() if isinstance(value, bytes) else value
