"""Weights in 4 and 8 bit: the FFN rows of decode as our plugin reads them, other products of the decoder as TensorRT does.

    CoreFFN(x, Wg, Wu, Wd_t, ids)  ->  CoreFFN(x, words x 3, scales x 3, ids)        int8, int4: groups along a row
    CoreLinear(x, W by inputs, ..) ->  CoreLinear(x, words, scale, ..)               the same
    MatMul(x, W)                   ->  MatMul(x, DequantizeLinear(W int4, scale))    int4: groups along what is summed

The new initializers point at no bytes yet: `quantize_graph` returns a `Part` for each, which says how the weight file gets
it from which weight. Rounding to nearest, symmetric. Logits, embeddings and the vision tower stay in 16 bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner

from ...base.errors import InputError
from ...base.onnx_text import DOMAIN, function
from ...bundle.weights import WeightFile
from ...plugins.core_ffn import body as core_ffn
from ...plugins.core_linear import op as core_linear
from ...plugins.threshold import above
from ...quant import packing
from ...quant.groups import fitting
from ...quant.precision import Precision
from ...quant.rounding import nearest
from ...quant.scheme import Quantised, Scheme
from ...surgery.halve import as_half

CHOSEN = "chosen."  # how the names of lists that the graph itself makes begin


@dataclass(frozen=True)
class Part:
    """How the bytes of one initializer are made from a weight [F,D] of the bundle, and their form in the weight file."""

    weight: str
    scheme: Scheme | None  # None: numbers
    kind: str  # "codes", "scale" or "turned"
    dtype: np.dtype  # int32: codes as words; uint8: as packed bytes
    shape: tuple[int, ...]
    scale: str = ""  # of codes: the initializer that holds their scales
    turned: bool = False  # of codes and scales: whether they are those of the weight [D,F]


Parts = dict[str, Part]  # by initializer
_New = dict[str, tuple[TensorProto, Part]]


# ------------------------------------------------------------------------------------------------- the graph
def quantize_graph(model: onnx.ModelProto, precision: Precision, plugins: bool, made: Parts) -> Parts:
    """Rewrite a lowered graph in 16 bit, in place; returns how its new initializers are made.

    `made`: initializers that are no weights as the bundle has them. Raises InputError for sizes that do not pack, or
    where nothing would.
    """
    graph, most = model.graph, precision.weights
    assert most is not None  # asked only of a precision that packs something
    if precision.packs == "ffn" and not plugins:
        int8_needs_the_plugin()
    stored = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL and len(t.dims) == 2}
    rows = [n for n in graph.node if n.op_type == "CoreFFN"]
    linear = [n for n in graph.node if n.op_type == "CoreLinear"] if plugins else []
    new: _New = {}
    for node in rows:
        new |= _read_words(node, 3, stored, most, made)
    logits = _product_of(graph, "logits", "CoreLinear")
    packed = {
        n.name for n in linear if n.output[0] != logits and (precision.packs == "layers" or ".ffn." in f".{n.name}")
    }
    for node in [n for n in linear if n.name in packed]:
        new |= _read_words(node, 1, stored, most, made)
    for node in [n for n in linear if n.name not in packed]:  # a graph has one form of an op, so they are written out
        node.op_type = KEPT_LINEAR.name
        del node.attribute[:]
    if rows:
        activation = helper.get_node_attr_value(rows[0], "activation").decode()
        form = "token" if rows[0].input[-1].startswith(CHOSEN) else "request"
        put_function(model, core_ffn.function(form, activation, bits=most.bits))
    if packed:
        put_function(model, core_linear.function(by_inputs=True, bits=most.bits))
        put_function(model, KEPT_LINEAR)
        written = inliner.inline_selected_functions(model, [(DOMAIN, KEPT_LINEAR.name)])
        model.CopyFrom(written)
        graph = model.graph
    if precision.packs == "layers":
        stored = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL and len(t.dims) == 2}
        new |= _dequantize(graph, stored, most)
    read = {i for n in graph.node for i in n.input}
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(tensor for tensor, _ in new.values())])
    return {name: part for name, (_, part) in new.items()}


def int8_needs_the_plugin() -> NoReturn:
    """Raises InputError."""
    fix = "build with fp16 or int4, or with TensorRT and the plugin library"
    raise InputError("int8 rows need the plugin", where="engine.precision", fix=fix)


def _read_words(node: onnx.NodeProto, count: int, stored: dict[str, TensorProto], most: Scheme, made: Parts) -> _New:
    """The first weights of a node of ours as words and scales."""
    weights = [stored[name] for name in node.input[1 : 1 + count]]
    scheme = _scheme(weights[0], 1, most)
    codes, scales = zip(*(_parts(w, scheme, made).items() for w in weights), strict=True)
    new = {name: (_initializer(name, part), part) for name, part in (*codes, *scales)}
    node.input[1 : 1 + count] = list(new)
    for a in node.attribute:
        if a.name in ("bits", "group"):
            a.i = {"bits": scheme.bits, "group": scheme.group}[a.name]
    return new


KEPT_LINEAR = function(f"""KeptLinear (x, w, norm, threshold) => (y) {{
    {above("x", "norm", "threshold", "x_kept")}
    y = MatMul (x_kept, w)
}}""")


def put_function(model: onnx.ModelProto, body: onnx.FunctionProto) -> None:
    """A function of this model, in its opset and in the place of one of the same name."""
    put = next((known for known in model.functions if known.name == body.name), None)
    if put is None:
        put = model.functions.add()
    put.CopyFrom(body)
    ours = {entry.domain: entry.version for entry in model.opset_import}
    for entry in put.opset_import:
        entry.version = ours.get(entry.domain, entry.version)


def _dequantize(graph: onnx.GraphProto, stored: dict[str, TensorProto], most: Scheme) -> _New:
    """W -> DequantizeLinear(W int4) wherever a MatMul other than that of the logits reads it, turned or not."""
    turned = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored}
    logits = _product_of(graph, "logits")
    nodes: dict[str, onnx.NodeProto] = {}
    new: _New = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.output[0] == logits:
            continue
        transpose = turned.get(node.input[1])
        reader, place = (node, 1) if transpose is None else (transpose, 0)
        weight = stored.get(reader.input[place])
        if weight is None:
            continue
        axis = 0 if transpose is None else 1
        scheme = _scheme(weight, axis, most)
        (codes, of_codes), (scale, of_scale) = _parts(weight, scheme, {}).items()
        new[codes] = external(codes, TensorProto.INT4, weight.dims), of_codes
        new[scale] = _initializer(scale, of_scale), of_scale
        out = f"{weight.name}/whole.{axis}"
        nodes[out] = helper.make_node(
            "DequantizeLinear", [codes, scale], [out], out, axis=axis, block_size=scheme.group
        )
        reader.input[place] = out
    everything = [*nodes.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(everything)
    return new


def _product_of(graph: onnx.GraphProto, output: str, kind: str = "MatMul") -> str:
    """What the product that makes an output is called, found through casts and slices."""
    makers = {o: n for n in graph.node for o in n.output}
    while output in makers and makers[output].op_type != kind:
        output = makers[output].input[0]
    return output


def _scheme(weight: TensorProto, axis: int, most: Scheme) -> Scheme:
    """`most` with the group that fits a weight along `axis`. Raises InputError."""
    where, fix = f"weight {weight.name}", "build with --precision fp16"
    if weight.dims[1] % 2:
        raise InputError(f"rows of {weight.dims[1]} end within a byte", where=where, fix=fix)
    group = fitting(weight.dims[axis], ("column length", "row length")[axis], where=where, fix=fix, most=most.group)
    return replace(most, group=group, axis=axis)


def _parts(weight: TensorProto, scheme: Scheme, made: Parts) -> Parts:
    """Codes and scales of a weight, in this order. Words are ONNX's bytes, too: decode and prefill share them."""
    turned = weight.name in made
    source = made[weight.name].weight if turned else weight.name
    form, (rows, columns) = f"{weight.name}/int{scheme.bits}", weight.dims
    words = scheme.axis == 1
    codes, scale = (f"{form}.words", f"{form}.scale") if words else (f"{form}.codes", f"{form}.codes.scale")
    dtype = np.dtype("<i4" if words else "u1")
    shape = (rows, columns * scheme.bits // (8 * dtype.itemsize))
    return {
        codes: Part(source, scheme, "codes", dtype, shape, scale, turned),
        scale: Part(source, scheme, "scale", scheme.scale, scheme.scale_shape((rows, columns)), turned=turned),
    }


def _initializer(name: str, part: Part) -> TensorProto:
    """Of the type and shape that the part has in the file."""
    return external(name, helper.np_dtype_to_tensor_dtype(part.dtype), part.shape)


def external(name: str, kind: int, dims: Sequence[int]) -> TensorProto:
    """An initializer that points at no bytes yet."""
    return TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)


# ------------------------------------------------------------------------------------------------- bytes
def readers(file: WeightFile, weight: str, scheme: Scheme, turned: bool) -> dict[str, Callable[[], np.ndarray]]:
    """What makes the parts of a weight, by their kind: "codes" and "scale". Calls raise InputError."""

    def fit() -> Quantised:
        rows = np.ascontiguousarray(file[weight].T) if turned else file[weight]
        # Rows of the plugin are rounded from the 16-bit weights that it would read otherwise.
        return nearest(as_half(rows, scheme.scale, weight) if scheme.axis == 1 else rows, scheme, weight)

    return packing.parts(fit, _pack)


def _pack(weight: Quantised) -> np.ndarray:
    pack = packing.words if weight.scheme.axis == 1 else packing.packed
    return pack(weight.codes, weight.scheme.bits)
