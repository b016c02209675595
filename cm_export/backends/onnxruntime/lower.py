"""Portable graph -> what ONNX Runtime's kernels run fastest, in memory, at load time.

    MatMul(x, Transpose(W))                       -> FusedMatMul(x, W, transB)      no transposed copy of the weights
                       or, for a few rows at once -> Transpose(FusedMatMul(W, x, transB))
    CoreFFN(x, Wg, Wu, Wd_t, core_neurons)        -> CoreRows(x, ffn.i.gate, ffn.i.up, ffn.i.down)
                                                     three inputs [B,K,D] that the host gathers once per request
    CoreFFN(x, Wg, Wu, Wd_t, PredictNeurons(...)) -> CoreMasked(x, Wg, Wu, Wd_t, ids), ids by MatMulNBits on the int4 bytes
    CoreFFN, CoreLinear with thresholds           -> the same, their products as above
    what a device's kernels compute (kernels.py)  -> as it stands

Gathering inside every step is slower than dense (a gather of 40 % costs more than the products it saves). So a set that
is new for every token buys no time here: every row is read, those that are not listed are multiplied by zero.

A product with 2 to 16 rows of x costs 2.4 times a product with one, because the right factor is packed into panels each
time; as left factor the weights are read where they lie, and 16 rows cost what one costs (LOG.md).
"""

from typing import Any

import onnx

from ...base.errors import SurgeryError
from ...base.onnx_text import DOMAIN, OPSET
from ...host.core_rows import ROWS
from ...plugins.core_ffn.body import ACTIVATIONS, inputs
from ...plugins.places import DOMAIN as KERNELS
from ...plugins.threshold import above
from ...policies.choose_neurons import choose_text
from ...surgery.nodes import names_read
from .place import Place

_MICROSOFT = "com.microsoft"
ACTIVE_INPUTS = len(inputs("active", 0))


def lower(
    model: onnx.ModelProto, rows_as_inputs: bool, few_rows: bool = False, place: Place | None = None
) -> onnx.ModelProto:
    """Rewrite in place and return the model. `rows_as_inputs`: CoreFFN's rows become graph inputs.

    `few_rows`: for steps that read 2 to 16 tokens; every x is [B,N,D] then. `place`: where it runs (None: here).
    """
    place = place or Place()
    graph = model.graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    nodes, activation, by_threshold = [], None, None
    chosen = {n.output[0] for n in graph.node if n.op_type == "PredictNeurons"}
    for node in graph.node:
        if node.op_type == "PredictNeurons" or node.domain == KERNELS:
            nodes.append(node)
            continue
        if node.op_type == "CoreFFN" and len(node.input) == ACTIVE_INPUTS:
            by_threshold = attribute(node, "activation")
            nodes.append(onnx.helper.make_node("CoreActive", node.input, node.output[:1], node.name, domain=DOMAIN))
            continue
        if node.op_type == "CoreLinear":
            nodes.append(onnx.helper.make_node("ActiveLinear", node.input, node.output, node.name, domain=DOMAIN))
            continue
        if chosen & set(node.input):
            activation = attribute(node, "activation")
            nodes.append(onnx.helper.make_node("CoreMasked", node.input, node.output[:1], node.name, domain=DOMAIN))
            continue
        indexed = node.op_type == "CoreFFN" and len(node.input) == 5
        # Words and blocks of neurons are for kernels that read them; here their own function runs.
        as_it_stands = attribute(node, "bits") or (attribute(node, "block") or 1) > 1
        if node.op_type != "CoreFFN" or as_it_stands or (indexed and not rows_as_inputs):
            nodes.append(node)
            continue
        activation, weights = attribute(node, "activation"), list(node.input[1:4])
        if indexed:
            layer = attribute(node, "layer")
            shape = ["batch", f"core_neurons.{layer}", shapes[weights[0]][1]]  # each layer may have its own number
            weights = [f"ffn.{layer}.{part}" for part in ROWS]
            kind = onnx.helper.np_dtype_to_tensor_dtype(place.products)
            # A device gives whole weights [F,D] as they are, for which it would need a copy of another rank.
            given = None if place.apart else shape
            graph.input.extend(onnx.helper.make_tensor_value_info(w, kind, given) for w in weights)
        nodes.append(
            onnx.helper.make_node("CoreRows", [node.input[0], *weights], list(node.output), node.name, domain=DOMAIN)
        )
    if activation is not None:
        check_one_activation(graph)
        model.functions.append(_core_rows(activation))
    if by_threshold is not None:
        check_one_activation(graph)
        model.functions.extend([_core_active(by_threshold), _active_linear()])
    if chosen:
        reader = next(n for n in graph.node if n.op_type == "CoreFFN")
        model.functions.append(_core_masked(attribute(reader, "activation")))
        _multiply_low_bits(model, attribute(reader, "activation"))
    widen_low_bits(model)
    if place.apart:
        _norms_in_one_kernel(nodes)
    _keep(graph, _fuse_transposes(nodes, set(shapes), few_rows))
    model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    return model


def _norms_in_one_kernel(nodes: list[onnx.NodeProto]) -> None:
    """The CUDA provider knows RMSNormalization only under its older name."""
    for node in nodes:
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"


def check_one_activation(graph: onnx.GraphProto) -> None:
    """Raises SurgeryError for layers of unlike activations: one function here stands for all of them."""
    found = {node.name: attribute(node, "activation") for node in graph.node if node.op_type == "CoreFFN"}
    if len(set(found.values())) > 1:
        raise SurgeryError("CoreFFN nodes of several activations", where=f"{found}", fix="build the bundle again")


def _core_rows(activation: str) -> onnx.FunctionProto:
    """CoreFFN over rows that are already gathered (or all rows): weights [K,D] or [B,K,D], neuron-major."""
    return local_function(f"""CoreRows (x, gate, up, down) => (y, z) {{
        gate_out = com.microsoft.FusedMatMul <transB = 1> (x, gate)
        up_out = com.microsoft.FusedMatMul <transB = 1> (x, up)
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        y = MatMul (z, down)
    }}""")


def _core_active(activation: str) -> onnx.FunctionProto:
    """CoreFFN in its form "active", whose own function would make a transposed copy of two weights."""
    return local_function(f"""CoreActive ({", ".join(inputs("active", 0))}) => (y) {{
        {above("x", "x_norm", "x_threshold", "x_kept")}
        gate_out = com.microsoft.FusedMatMul <transB = 1> (x_kept, w_gate)
        up_out = com.microsoft.FusedMatMul <transB = 1> (x_kept, w_up)
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        {above("z", "z_norm", "z_threshold", "z_kept")}
        y = MatMul (z_kept, w_down_t)
    }}""")


def _active_linear() -> onnx.FunctionProto:
    """CoreLinear without a transposed copy of its weight."""
    return local_function(f"""ActiveLinear (x, w, norm, threshold) => (y) {{
        {above("x", "norm", "threshold", "x_kept")}
        y = com.microsoft.FusedMatMul <transB = 1> (x_kept, w)
    }}""")


def _core_masked(activation: str) -> onnx.FunctionProto:
    """CoreFFN over every row, z of the rows that a token does not list being zero: ids [B,N,K], weights [F,D]."""
    return local_function(f"""CoreMasked (x, gate, up, down, ids) => (y) {{
        gate_out = com.microsoft.FusedMatMul <transB = 1> (x, gate)
        up_out = com.microsoft.FusedMatMul <transB = 1> (x, up)
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        z_shape = Shape (z)
        none_f32 = ConstantOfShape (z_shape)
        none = CastLike (none_f32, z)
        ids_shape = Shape (ids)
        one_f32 = Constant <value_float = 1.0> ()
        one = CastLike (one_f32, z)
        ones = Expand (one, ids_shape)
        mask = ScatterElements <axis = -1> (none, ids, ones)
        listed = Mul (z, mask)
        y = MatMul (listed, down)
    }}""")


def _multiply_low_bits(model: onnx.ModelProto, activation: str) -> None:
    """PredictNeurons multiplies the int4 bytes as they lie; they become uint4 with zero point 8 (quant/packing.py)."""
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "PredictNeurons")
    ffn, hidden = sizes[node.input[1]]
    group = attribute(node, "group")
    # accuracy_level 4 rounds x to int8 with a scale per group: less than what the 4 bits of the copies cost already.
    bits = f"com.microsoft.MatMulNBits <K = {hidden}, N = {ffn}, bits = 4, block_size = {group}, accuracy_level = 4>"
    body = f"""
        gate_out = {bits} (x, gate, gate_scale)
        up_out = {bits} (x, up, up_scale)
        {choose_text(activation, order="any")}"""
    inputs = "x, gate, gate_scale, up, up_scale, norm, count"
    known = next(f for f in model.functions if f.name == "PredictNeurons")
    known.CopyFrom(local_function(f"PredictNeurons <group, block> ({inputs}) => (core_neurons) {{ {body} }}"))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4:
            tensor.data_type = onnx.TensorProto.UINT8
            tensor.dims[:] = [ffn, hidden // group, group // 2]


def widen_low_bits(model: onnx.ModelProto) -> None:
    """INT4 that a graph dequantises by itself becomes INT8: no value of ONNX Runtime's Python interface is INT4."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4 and tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.data_type = onnx.TensorProto.INT8


def local_function(text: str) -> onnx.FunctionProto:
    """A function of ours that may call ONNX Runtime's own ops."""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{_MICROSOFT}" : 1]> '
    return onnx.parser.parse_function(header + text)


def import_domain(place: onnx.ModelProto | onnx.FunctionProto) -> None:
    """Let the nodes of a graph or function call functions of ours."""
    if not any(o.domain == DOMAIN for o in place.opset_import):
        place.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _fuse_transposes(nodes: list[onnx.NodeProto], weights: set[str], few_rows: bool) -> list[onnx.NodeProto]:
    turned = {
        n.output[0]: n.input[0]
        for n in nodes
        if n.op_type == "Transpose" and n.input[0] in weights and list(attribute(n, "perm") or (1, 0)) == [1, 0]
    }
    out = []
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in turned:
            factors, result = [node.input[0], turned[node.input[1]]], list(node.output)
            if few_rows:
                factors, result = factors[::-1], [f"{node.output[0]}/turned"]
            out.append(onnx.helper.make_node("FusedMatMul", factors, result, node.name, domain=_MICROSOFT, transB=1))
            if not few_rows:
                continue
            node = onnx.helper.make_node("Transpose", result, list(node.output), perm=[0, 2, 1])
        out.append(node)
    return out


def _keep(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Put in the nodes whose results somebody reads; drop initializers and core indices that nobody does."""
    read, alive = {o.name for o in graph.output}, []
    for node in reversed(nodes):
        if any(o in read for o in node.output):
            alive.append(node)
            read.update(names_read(node))
    kept = [t for t in graph.initializer if t.name in read]
    inputs = [v for v in graph.input if v.name in read or v.name not in ("core_neurons", "core_counts")]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(reversed(alive))
    graph.initializer.extend(kept)
    graph.input.extend(inputs)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute's value, a text as str; None where the node has none of that name."""
    value = next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
    return value.decode() if isinstance(value, bytes) else value
