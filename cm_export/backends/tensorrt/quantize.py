"""Weights in 4 and 8 bit: the FFN rows of decode as our plugin reads them, other products of the decoder as TensorRT does.

    CoreFFN(x, Wg, Wu, Wd_t, ids)  ->  CoreFFN(x, words x 3, scales x 3, ids)        int8, int4: pack.py, groups along D
    MatMul(x, W)                   ->  MatMul(x, DequantizeLinear(W int4, scale))    int4: groups along what is summed

Rounding to nearest, symmetric. Logits, embeddings and the vision tower stay in 16 bit.
"""

import json
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper

from ...base.errors import InputError
from ...plugins.core_ffn import body as core_ffn
from ...plugins.core_ffn.pack import check, quantize, scales_of, unpack

BITS = {"int8": 8, "int4": 4}
_GROUPS = (128, 64, 32, 16, 8)
_MADE = "made"  # key of an initializer's external_data: how its bytes come from the weight file


def quantize_graph(model: onnx.ModelProto, precision: str, plugins: bool) -> None:
    """Rewrite a lowered graph in 16 bit, in place. Raises InputError for sizes that do not pack, or where nothing would."""
    bits, graph = BITS[precision], model.graph
    if bits == 8 and not plugins:
        int8_needs_the_plugin()
    stored = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL and len(t.dims) == 2}
    made: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        if node.op_type == "CoreFFN":
            _words(node, stored, made, bits)
    if any(n.op_type == "CoreFFN" for n in graph.node):
        _set_function(model, bits)
    if bits == 4:
        _dequantize(graph, stored, made)
    read = {i for n in graph.node for i in n.input}
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *made.values()])


def int8_needs_the_plugin() -> NoReturn:
    """Raises InputError."""
    fix = "build with fp16 or int4, or with TensorRT and the plugin library"
    raise InputError("int8 rows need the plugin", where="engine.precision", fix=fix)


def _words(node: onnx.NodeProto, stored: dict, made: dict, bits: int) -> None:
    """The three weights of a CoreFFN as words and scales."""
    weights = list(node.input[1:4])
    rows, columns = stored[weights[0]].dims
    group = _group(columns, bits, weights[0])
    names = []
    for part, kind, width in (("words", TensorProto.INT32, columns * bits // 32), ("scale", None, columns // group)):
        for weight in weights:
            name = f"{weight}/int{bits}.{part}"
            how = {"weight": weight, "part": part, "bits": bits, "group": group, "axis": 1}
            made[name] = _initializer(name, kind or stored[weight].data_type, [rows, width], how)
            names.append(name)
    node.input[1:4] = names
    for a in node.attribute:
        if a.name in ("bits", "group"):
            a.i = {"bits": bits, "group": group}[a.name]


def _set_function(model: onnx.ModelProto, bits: int) -> None:
    node = next(n for n in model.graph.node if n.op_type == "CoreFFN")
    activation = helper.get_node_attr_value(node, "activation").decode()
    for function in model.functions:
        if function.name == "CoreFFN":
            opsets = list(function.opset_import)
            function.CopyFrom(core_ffn.function("request", activation, bits=bits))
            del function.opset_import[:]
            function.opset_import.extend(opsets)


def _dequantize(graph: onnx.GraphProto, stored: dict, made: dict) -> None:
    """W -> DequantizeLinear(W int4) wherever a MatMul other than that of the logits reads it, turned or not."""
    turned = {n.output[0]: n for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored}
    logits = _product_of(graph, "logits")
    new: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.output[0] == logits:
            continue
        transpose = turned.get(node.input[1])
        weight = transpose.input[0] if transpose is not None else node.input[1]
        if weight not in stored:
            continue
        axis = 1 if transpose is not None else 0
        dims = list(stored[weight].dims)
        group = _group(dims[axis], 4, weight)
        if dims[1] % 2:
            raise InputError(f"rows of {dims[1]}", where=f"weight {weight}", fix="build with --precision fp16")
        part = "words" if axis else "codes"  # words, byte by byte, are ONNX's packing: decode and prefill share them
        q, scale = (f"{weight}/int4.{n}" for n in (("words", "scale") if axis else ("codes", "codes.scale")))
        scale_dims = [d // group if i == axis else d for i, d in enumerate(dims)]
        how = {"weight": weight, "bits": 4, "group": group, "axis": axis}
        made[q] = _initializer(q, TensorProto.INT4, dims, how | {"part": part})
        made[scale] = _initializer(scale, stored[weight].data_type, scale_dims, how | {"part": "scale"})
        out = f"{weight}/whole.{axis}"
        new[out] = helper.make_node("DequantizeLinear", [q, scale], [out], out, axis=axis, block_size=group)
        reader, place = (transpose, 0) if transpose is not None else (node, 1)
        reader.input[place] = out
    nodes = [*new.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _product_of(graph: onnx.GraphProto, output: str) -> str:
    """What the product that makes an output is called, found through casts and slices."""
    makers = {o: n for n in graph.node for o in n.output}
    while output in makers and makers[output].op_type != "MatMul":
        output = makers[output].input[0]
    return output


def _group(length: int, bits: int, where: str) -> int:
    group = next((g for g in _GROUPS[1 if bits == 4 else 0 :] if length % g == 0), 0)
    try:
        check(length, bits, group or length + 1)
    except InputError as e:
        raise InputError(e.what, where=f"weight {where}", fix="build with --precision fp16") from e
    return group


def _initializer(name: str, kind: int, dims: list[int], how: dict[str, Any]) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key=_MADE, value=json.dumps(how))
    return tensor


# ------------------------------------------------------------------------------------------------- bytes
def how_made(tensor: onnx.TensorProto) -> dict[str, Any] | None:
    """What `planned_bytes` needs of an initializer of these; None of one that is a weight as it lies in the file."""
    return next((json.loads(e.value) for e in tensor.external_data if e.key == _MADE), None)


def made_of(rows: np.ndarray, how: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    """The bytes of one initializer from its weight [F,D] float32; `dtype` is that of the scales.

    "words" int32 [F,D*bits/32] with groups along D; "codes" uint8 [F,D/2] (two int4 a byte, the lower one first) with
    groups along F; "scale".
    """
    if how["axis"] == 1:
        as_read = rows.astype(dtype), how["bits"], how["group"]
        return scales_of(*as_read) if how["part"] == "scale" else quantize(*as_read)[0]
    grouped = rows.astype(np.float32).reshape(-1, how["group"], rows.shape[1])
    scale = (np.abs(grouped).max(1) / 7).astype(dtype)
    scale[scale.astype(np.float32) == 0] = 1
    if how["part"] == "scale":
        return scale
    codes = np.clip(np.rint(grouped / scale[:, None].astype(np.float32)), -8, 7).astype(np.int8).reshape(rows.shape)
    pairs = codes.astype(np.uint8) & 15
    return pairs[:, ::2] | pairs[:, 1::2] << 4


def packed(model: onnx.ModelProto) -> list[tuple[str, dict[str, Any]]]:
    """Name and making of every initializer that holds the numbers (not the scales) of a packed weight."""
    found = ((t.name, how_made(t)) for t in model.graph.initializer)
    return [(name, how) for name, how in found if how and how["part"] != "scale"]


def error_of(rows: np.ndarray, how: dict[str, Any], numbers: np.ndarray, scale: np.ndarray) -> float:
    """Relative error of a packed weight as it lies in the file, against `rows` float32 [F,D]."""
    if how["axis"] == 1:
        whole = unpack(np.ascontiguousarray(numbers).view(np.int32), scale, how["bits"])
    else:
        codes = np.stack([numbers & 15, numbers >> 4], -1).reshape(rows.shape).astype(np.int8)
        codes = np.where(codes > 7, codes - 16, codes).astype(np.float32)
        whole = codes * np.repeat(scale.astype(np.float32), how["group"], axis=0)
    return float(np.linalg.norm(whole - rows) / max(np.linalg.norm(rows), 1e-30))
