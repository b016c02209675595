"""Weights that were inputs of the traced graph become initializers that point into the weight file.

    before: input down_proj.weight [D,F] -> Transpose -> MatMul        after: initializer down_proj.weight_t [F,D] -> MatMul

A neuron of the down projection is a column in the checkpoint; stored transposed it is a contiguous row, as in gate and up.
"""

import onnx

from ..base.errors import SurgeryError
from ..bundle.names import stored_name
from ..bundle.weights import FILE, Tensor
from ..families import Family


def bind_weights(model: onnx.ModelProto, weights: dict[str, Tensor], family: Family) -> int:
    """Rewrite in place; returns how many weights were bound. Raises SurgeryError for a weight the file lacks."""
    graph, transposed, bound = model.graph, {}, []
    used = {i for node in graph.node for i in node.input}
    for value in list(graph.input):
        stored = stored_name(value.name, family)
        if not _is_weight(value.name, family, weights, stored):
            continue
        graph.input.remove(value)
        if value.name not in used:
            continue
        if stored != value.name:
            transposed[value.name] = stored
        bound.append(initializer(stored, weights[stored]))
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.input[0] in transposed:
            _rename_input(graph, node.output[0], transposed.pop(node.input[0]))
            graph.node.remove(node)
    if transposed:
        raise SurgeryError(f"{next(iter(transposed))} is not read through a Transpose", where=graph.name)
    graph.initializer.extend(bound)
    return len(bound)


def _is_weight(name: str, family: Family, weights: dict[str, Tensor], stored: str) -> bool:
    if stored in weights:
        return True
    if name.endswith((".weight", ".bias")):
        raise SurgeryError(f"the weight file has no {stored}", where="bind_weights")
    return False


def initializer(
    name: str, tensor: Tensor, file: str = FILE, dtype: int | None = None, shape: list[int] | None = None
) -> onnx.TensorProto:
    """An initializer whose bytes are a tensor of `file`; dtype and shape, where ONNX knows it by another type."""
    out = onnx.TensorProto(
        name=name,
        dims=tensor.shape if shape is None else shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype) if dtype is None else dtype,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    point_at(out, file, tensor)
    return out


def point_at(initializer: onnx.TensorProto, file: str, tensor: Tensor) -> None:
    """Say that the bytes of an external initializer are a tensor of `file`, whatever was said before."""
    del initializer.external_data[:]
    for key, value in (("location", file), ("offset", tensor.offset), ("length", tensor.length)):
        initializer.external_data.add(key=key, value=str(value))


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
