"""Portable graph -> the typed graph that a TensorRT version builds well: an ordered list of rewrites, checked on ONNX Runtime.

    slots      how many tokens stay is the length of an input        TensorRT knows no shape that comes out of data
    voters     every row is judged, weight 0 where it has no vote    NonZero has such a shape
    cache      past [B,Hk,C,d], new rows written at write_index      static: one CUDA graph for a whole answer
    ops        CoreFFN, CoreAttention: plugin, or written out        out: FFN rows are inputs, gathered once per request
    halves     products, FFN, attention and cache in 16 bit          norms, rotary, residual and policies in float32
    natives    RMSNormalization, Attention: kept or written out      as the version's row in targets.py says

Decode reads one token a step, dense decode one or several. What is unlike the portable graph besides the type: policies
count in float32, not float64.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import inliner

from ...base import dims
from ...base.errors import SurgeryError
from ...base.onnx_text import DOMAIN, OPSET
from ...host.core_rows import ROWS
from ...plugins.core_attention import op as core_attention
from ...plugins.core_ffn import op as core_ffn
from ...surgery import active_products
from ...surgery import halve as halving
from ...surgery.edit import Edit
from ...surgery.nodes import names_read
from . import active, predicted
from . import written_out as written
from .targets import Target

DECODES = ("decode", "decode_dense")
PLUGINS = ("CoreFFN", "CoreAttention", "CoreLinear")
SLOTS = "kept_slots"


@dataclass(frozen=True)
class Sizes:
    """Rows of the cache, tokens of the longest prompt, and neighbours that an id of core_neurons stands for."""

    capacity: int
    longest: int
    block: int = 1


def lower(
    model: onnx.ModelProto,
    name: str,
    target: Target,
    weights: Container[str],
    sizes: Sizes,
    products: np.dtype = np.dtype(np.float16),  # noqa: B008 (a constant)
) -> onnx.ModelProto:
    """The graph `name` of a bundle for `target`; functions of plugin ops stay in, so that ONNX Runtime can run it.

    `weights`: names of the initializers that are weights; those in 16 bit are declared so and must be written so.
    `products`: type of what is large. Raises InputError for a graph that TensorRT cannot run, SurgeryError.
    """
    for function in model.functions:
        _judge_every_row(function)
        _bound_loops(function, sizes.longest)
    edit = Edit(model, "trt")
    _known_slots(edit)
    if name in DECODES:
        _static_cache(edit, target, sizes.capacity, several=name == "decode_dense")
    own = _own_ops(edit, target, sizes.block) if name == "decode" else ()
    if not own:
        _write_out_attention(edit)
    _replace(edit, "RotaryEmbedding", "", written.ROTATE)  # parsers know it from 10.15 on
    halves = halving.halve(edit, weights, products)
    if not target.native_norm:
        _replace(edit, "RMSNormalization", "epsilon", written.NORM)
    if not target.native_attention:
        _replace(edit, "Attention", "scale", written.ATTENTION, written.ATTENTION_TO_ALL)
    lowered = edit.export()
    _set_opset(lowered, 24 if target.kv == "in_place" else OPSET)
    lowered = inliner.inline_selected_functions(lowered, [(DOMAIN, p) for p in own], exclude=True)
    _read_weights_directly(lowered.graph)
    _drop_image_mask(lowered.graph)
    halving.no_float64(lowered.graph)
    for tensor in lowered.graph.initializer:
        if tensor.name in halves:
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(products)
    del lowered.graph.value_info[:]
    lowered.graph.name = name
    return lowered


def for_parser(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """What the parser of `target` gets, changed in place: no functions where they would win over the plugin."""
    if not target.keep_functions:
        del model.functions[:]
    for node in model.graph.node:
        if node.op_type == "Attention":  # where no fused kernel fits, products and a softmax do
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return model


def _judge_every_row(function: onnx.FunctionProto) -> None:
    """NonZero(v) becomes 0, 1, .. len(v) - 1: policies leave rows without a vote out to save time, their weight is 0."""
    for i, node in enumerate(function.node):
        if node.op_type == "NonZero":
            out = node.output[0]
            made = [onnx.helper.make_node("Constant", [], [f"{out}_{n}"], value_int=v) for n, v in (("0", 0), ("1", 1))]
            made += [
                onnx.helper.make_node("Constant", [], [f"{out}_axis"], value_ints=[0]),
                onnx.helper.make_node("Size", [node.input[0]], [f"{out}_size"]),
                onnx.helper.make_node("Range", [f"{out}_0", f"{out}_size", f"{out}_1"], [f"{out}_all"]),
                onnx.helper.make_node("Unsqueeze", [f"{out}_all", f"{out}_axis"], [out]),
            ]
            nodes = [*function.node[:i], *made, *function.node[i + 1 :]]
            del function.node[:]
            function.node.extend(nodes)
            return _judge_every_row(function)
    return None


def _bound_loops(function: onnx.FunctionProto, longest: int) -> None:
    """A loop over tokens runs at most `longest` times; it ends by itself (builders crash on a count that is computed)."""
    for node in list(function.node):
        if node.op_type == "Loop":
            node.input[0] = f"{node.output[0]}_limit"
            function.node.insert(0, onnx.helper.make_node("Constant", [], [node.input[0]], value_int=longest))


def _known_slots(edit: Edit) -> None:
    """KeepTokens gets its T from the length of an input: kept_slots [T], and kept_slots_first for an earlier cut."""
    nodes = [n for n in edit.graph.nodes if n.op == "KeepTokens"]
    if not nodes:
        return
    function = edit.functions["KeepTokens"]
    at = [i for i, n in enumerate(function.node) if list(n.output) == ["kept"]]
    if len(at) != 1:
        raise SurgeryError("nothing computes `kept`", where="function KeepTokens")
    function.input.append("slots")
    function.node[at[0]].CopyFrom(onnx.helper.make_node("Shape", ["slots"], ["kept"]))
    for node in nodes:
        later = any(other is not node and _reaches(node, other) for other in nodes)
        name = f"{SLOTS}_first" if later else SLOTS
        node.inputs.append(edit.add_input(name, np.int32, [dims.KEPT + ("_first" if later else "")]))


def _reaches(start: gs.Node, end: gs.Node) -> bool:
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node is end:
            return True
        if id(node) not in seen:
            seen.add(id(node))
            todo.extend(user for out in node.outputs for user in out.outputs)
    return False


def _static_cache(edit: Edit, target: Target, capacity: int, several: bool) -> None:
    """Concat(past, new) -> rows of a cache of `capacity` rows. The mask says which rows count, the new ones included.

    `several`: tokens at once, of which each sees those before it.
    """
    copy = written.CACHE_COPY_SEVERAL if several else written.CACHE_COPY
    update = written.CACHE_IN_PLACE if target.kv == "in_place" else copy
    where = edit.add_input("write_index", np.int64, [dims.BATCH])
    outputs = [t for t in edit.graph.outputs if t.name.startswith("present.")]
    for present in outputs:
        node, past = present.inputs[0], edit.input(present.name.replace("present", "past", 1))
        if node.op != "Concat" or node.inputs[0] is not past:
            raise SurgeryError(f"a {node.op} makes {present.name}, not a Concat with the past", where=edit.graph.name)
        shape = [past.shape[0], past.shape[1], capacity, past.shape[3]]
        past.shape = present.shape = shape
        new = node.inputs[1]
        present.inputs.clear()
        edit.functions.setdefault(update.name, update)
        edit.graph.nodes.append(gs.Node(update.name, present.name, {}, [past, new, where], [present], domain=DOMAIN))
    given = edit.input("attention_mask")
    given.shape = [dims.BATCH, capacity]
    counts = edit.op("Cast", given, to=onnx.TensorProto.BOOL)
    if several:
        rows = edit.constant(np.arange(capacity), np.int64)
        counts = edit.call(written.SEEN, counts, where, rows, edit.input("inputs_embeds"))[0]
        seen = edit.op("Unsqueeze", counts, edit.constant([1], np.int64))
    else:
        seen = edit.op("Unsqueeze", counts, edit.constant([1, 2], np.int64))
        edit.input("inputs_embeds").shape[1] = 1
        edit.input("position_ids").shape[2] = 1
        next(t for t in edit.graph.outputs if t.name == "logits").shape[1] = 1
    mask = edit.op("Where", seen, edit.constant(0, np.float32), edit.constant(halving.LOWEST, np.float32))
    for node in edit.graph.nodes:
        if node.op in ("Attention", "CoreAttention"):
            node.inputs[3] = mask


def _own_ops(edit: Edit, target: Target, block: int) -> tuple[str, ...]:
    """Decode's CoreFFN and CoreAttention as this target has them; returns the ops that stay."""
    index = next((t for t in edit.graph.inputs if t.name == "core_neurons"), None)
    counted = edit.has_input("core_counts")
    batch, hidden = dims.BATCH, edit.input("inputs_embeds").shape[2]
    nodes = [n for n in edit.graph.nodes if n.op == "CoreFFN"]
    activation = nodes[0].attrs["activation"]  # every layer of decode has a CoreFFN
    if any(n.attrs["activation"] != activation for n in nodes):
        fix = "build the bundle again: one function stands for all of them"
        raise SurgeryError("CoreFFN nodes of several activations", where="decode", fix=fix)
    if edit.has_input(active.THRESHOLDS):
        if target.plugins:
            active_products.products(edit, activation)
            _read_listed_rows(edit)
        return ("CoreLinear", "CoreAttention") if target.plugins else ()
    if any(n.op == "PredictNeurons" for n in edit.graph.nodes):
        predicted.choose(edit, activation)
        _drop_inputs(edit, {"core_counts"})
        if target.plugins:
            _read_listed_rows(edit)
        return ("CoreFFN", "CoreAttention") if target.plugins else ()
    for node in nodes:
        layer = node.attrs["layer"]
        node.attrs["block"] = block
        count = f"{dims.CORE_NEURONS}.{layer}" if counted else dims.CORE_NEURONS
        if not target.plugins:
            rows = [edit.add_input(f"ffn.{layer}.{part}", np.float32, [batch, count, hidden]) for part in ROWS]
            node.op, node.inputs = "CoreRows", [node.inputs[0], *rows]
            node.attrs.clear()
        elif counted:  # an input of its own for each layer, since a length that depends on data is no shape here
            node.inputs[4] = edit.add_input(f"core_neurons.{layer}", np.int32, [batch, count])
    if not target.plugins:
        edit.functions["CoreRows"] = written.core_rows(activation)
    _drop_inputs(
        edit, {"core_counts"} | ({index.name} if index is not None and (counted or not target.plugins) else set())
    )
    if target.plugins:
        _read_listed_rows(edit)
        edit.functions["CoreFFN"] = core_ffn.function("request", activation)
    return ("CoreFFN", "CoreAttention") if target.plugins else ()


def _read_listed_rows(edit: Edit) -> None:
    """Every CoreAttention reads the rows in core_tokens [B,M]: most of a static cache is empty."""
    rows = edit.add_input("core_tokens", np.int32, [dims.BATCH, dims.CORE_TOKENS])
    for node in [n for n in edit.graph.nodes if n.op == "CoreAttention"]:
        node.inputs = [*node.inputs[:4], rows]
    edit.functions["CoreAttention"] = core_attention.function(index=True)


def _write_out_attention(edit: Edit) -> None:
    """CoreAttention that reads every row is Attention; one that reads listed rows is its function's body."""
    for node in edit.graph.nodes:
        if node.op == "CoreAttention" and len(node.inputs) == 4:
            node.op, node.domain, node.attrs = "Attention", None, {"scale": node.attrs["scale"]}


def _drop_inputs(edit: Edit, names: set[str]) -> None:
    for tensor in [t for t in edit.graph.inputs if t.name in names]:
        tensor.outputs.clear()
        edit.graph.inputs.remove(tensor)


def _replace(edit: Edit, kind: str, attribute: str, *functions: onnx.FunctionProto) -> None:
    """Every node of `kind` becomes a call of the function with as many inputs, which takes `attribute` alone ("": none)."""
    by_inputs = {len(f.input): f for f in functions}
    for node in [n for n in edit.graph.nodes if n.op == kind]:
        if len(node.inputs) not in by_inputs:
            raise SurgeryError(f"{kind} of {len(node.inputs)} inputs has no written form", where=node.name)
        function = by_inputs[len(node.inputs)]
        if other := [key for key in ("interleaved", "rotary_embedding_dim") if node.attrs.get(key)]:
            raise SurgeryError(f"{kind} with {other[0]} has no written form", where=node.name)
        node.op, node.domain = function.name, DOMAIN
        node.attrs = {attribute: node.attrs[attribute]} if attribute else {}
        edit.functions[function.name] = function


def _read_weights_directly(graph: onnx.GraphProto) -> None:
    """Identity(W) is W: what looks for the weights of a product afterwards need not know how functions name them."""
    stored = {t.name for t in graph.initializer}
    other = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.input[0] in stored}
    kept = [n for n in graph.node if not (n.op_type == "Identity" and n.output[0] in other)]
    for node in kept:
        node.input[:] = [other.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)


def _drop_image_mask(graph: onnx.GraphProto) -> None:
    """Where every token votes, no function looks at which ones are a picture's. Other inputs must have readers."""
    read = set().union(*(names_read(n) for n in graph.node))
    kept = [v for v in graph.input if v.name != "image_mask" or v.name in read]
    del graph.input[:]
    graph.input.extend(kept)


def _set_opset(model: onnx.ModelProto, opset: int) -> None:
    for holder in (model, *model.functions):
        for entry in holder.opset_import:
            if entry.domain == "":
                entry.version = opset
