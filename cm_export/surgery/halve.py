"""A graph in float32 becomes one in 16 and 32 bit: what moves bytes in 16, what adds up or counts in 32.

    16 bit   products with weights, convolutions, FFN, attention, the cache
    32 bit   the residual stream, norms, rotary tables, policies, logits

Types stand in the graph (strongly typed networks): a Cast where one meets the other, none where 16 bit meets 16 bit.
"""

from collections.abc import Container

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..base.errors import InputError
from .edit import Edit

# A masked score. The lowest float32 is minus infinity in 16 bit, and a row of nothing but those has no softmax.
LOWEST = -60000.0

_PRODUCTS = {"MatMul", "Gemm", "Conv"}
# Ops of which inputs are in 16 bit, and how many: what decides (thresholds, norms) and what counts (ids) comes after them.
_OWN = {"Attention": 4, "CoreFFN": 4, "CoreLinear": 2, "CoreAttention": 4, "CoreRows": 4, "CacheRow": 2}
_MASK = {"Attention": 3, "CoreAttention": 3}
_JOINS = {"Concat": (0, 1), "ScatterND": (0, 2)}  # what puts new rows behind the past ones, if it reads those


def halve(edit: Edit, weights: Container[str], products: np.dtype) -> set[str]:
    """Put what is large into the type `products` (float32 changes nothing); returns the weights to be written so.

    `weights`: names of initializers that lie in the weight file.
    """
    if products == np.float32:
        return set()
    to = onnx.helper.np_dtype_to_tensor_dtype(products)
    halves: set[str] = set()
    as_half: dict[int, gs.Tensor] = {}
    for tensor in edit.graph.inputs:
        if tensor.name.startswith(("past.", "ffn.")):
            tensor.dtype = to
            as_half[id(tensor)] = tensor
    edit.graph.toposort()
    for node in list(edit.graph.nodes):
        weight = [_weight(t, weights) for t in node.inputs]
        numbers = _numbers(node, weight)
        for i in numbers:
            if stored := weight[i]:
                halves.add(stored)
                continue
            tensor = node.inputs[i]
            if id(tensor) not in as_half:
                bounded = tensor
                if _MASK.get(node.op) == i:
                    bounded = edit.op("Max", tensor, edit.constant(LOWEST, np.float32))
                as_half[id(tensor)] = edit.op("Cast", bounded, to=to)
            node.inputs[i] = as_half[id(tensor)]
        for i, tensor in enumerate(node.outputs if numbers else ()):
            half = gs.Variable(f"{tensor.name}/half", dtype=to)
            node.outputs[i] = half
            as_half[id(tensor)] = half
            cast = gs.Node("Cast", f"{tensor.name}/whole", {"to": onnx.TensorProto.FLOAT}, [half], [tensor])
            edit.graph.nodes.append(cast)
    for i, tensor in enumerate(edit.graph.outputs):
        if tensor.name.startswith("present."):
            edit.graph.outputs[i] = _output(edit, tensor, as_half, to)
    return halves


def in_16_bit(model: onnx.ModelProto, weights: Container[str], products: np.dtype) -> onnx.ModelProto:
    """A portable graph with the types of `halve`, its weights declared as they must be given."""
    edit = Edit(model, "half")
    halves = halve(edit, weights, products)
    out = edit.export()
    for tensor in out.graph.initializer:
        if tensor.name in halves:
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(products)
    return out


def _numbers(node: gs.Node, weight: list[str | None]) -> tuple[int, ...]:
    """Which inputs of a node become 16 bit; none of a node that stays as it is."""
    if node.op in _OWN:
        return tuple(range(min(_OWN[node.op], len(node.inputs))))
    if node.op in _JOINS and node.inputs[0].name.startswith("past."):
        return _JOINS[node.op]
    return tuple(range(len(node.inputs))) if node.op in _PRODUCTS and any(weight) else ()


def _weight(tensor: gs.Tensor, weights: Container[str]) -> str | None:
    """The weight that a tensor is, as it lies in the file or transposed."""
    if isinstance(tensor, gs.Constant):
        return tensor.name if tensor.name in weights else None
    if tensor.inputs and tensor.inputs[0].op == "Transpose":
        return _weight(tensor.inputs[0].inputs[0], weights)
    return None


def _output(edit: Edit, tensor: gs.Variable, as_half: dict[int, gs.Tensor], to: int) -> gs.Variable:
    """The graph output of the same name in 16 bit."""
    half = as_half[id(tensor)] if id(tensor) in as_half else edit.op("Cast", tensor, to=to)
    name, shape = tensor.name, tensor.shape
    tensor.name += "/float"
    half.name, half.dtype, half.shape = name, to, shape
    return half


def as_half(weight: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A weight, or some rows of it, in another type. Raises InputError for a value that does not fit."""
    with np.errstate(over="ignore"):
        half = weight.astype(dtype)
    if not np.isfinite(half).all():
        fix = "build with --precision bf16"
        raise InputError("a value does not fit into 16 bit", where=f"weight {name}", fix=fix)
    return half


def no_float64(graph: onnx.GraphProto) -> None:
    """TensorRT has no float64: casts and constants become float32, in bodies of loops too."""
    double, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == double:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for node in graph.node:
        for a in node.attribute:
            if node.op_type == "Cast" and a.name == "to" and a.i == double:
                a.i = single
            elif a.type == onnx.AttributeProto.TENSOR and a.t.data_type == double:
                a.t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(a.t).astype(np.float32), a.t.name))
            elif a.type == onnx.AttributeProto.GRAPH:
                no_float64(a.g)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == double:
            value.type.tensor_type.elem_type = single
