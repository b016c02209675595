"""Find the FFN and the attention of every decoder layer by the names of their weights, never by visiting order.

gate_proj.weight, up_proj.weight, down_proj.weight_t  -> FFN(x, z, y)
o_proj.weight -> MatMul -> ... -> Attention           -> Attention(q, k, v, mask)
"""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ..base.errors import SurgeryError
from ..bundle.names import stored_name
from ..families import Family
from .edit import Edit

# What may stand between gate and up and the product that enters down: the activation's own arithmetic.
_BETWEEN = {
    "Mul",
    "Add",
    "Sub",
    "Div",
    "Pow",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Relu",
    "Gelu",
    "Exp",
    "Softplus",
    "Mish",
    "Clip",
    "LeakyRelu",
    "HardSigmoid",
    "HardSwish",
    "Swish",
    "CastLike",
}
_VIEW = {"Reshape", "Transpose", "Cast", "Identity"}


@dataclass(frozen=True)
class FFN:
    """One FFN: y [B,S,D] = (act(x Wg^T) * (x Wu^T)) Wd, with z [B,S,F] in the middle."""

    layer: int
    x: gs.Tensor
    z: gs.Tensor
    y: gs.Tensor
    w_gate: gs.Tensor
    w_up: gs.Tensor
    w_down_t: gs.Tensor


def ffn_sites(edit: Edit, family: Family, layers: int) -> list[FFN]:
    """The FFN of every layer. Raises SurgeryError naming the layers without one and why."""
    return _all(edit, family, layers, _ffn, "FFN")


def attention_sites(edit: Edit, family: Family, layers: int) -> list[gs.Node]:
    """The Attention node of every layer. Raises SurgeryError naming the layers without one and why."""
    return _all(edit, family, layers, _attention, "attention")


def _all(edit, family, layers, find, what):
    found, missing = [], []
    for layer in range(layers):
        try:
            found.append(find(edit, family, layer))
        except SurgeryError as e:
            missing.append(f"layer {layer}: {e.what}")
    if missing:
        more = f" (and {len(missing) - 3} more)" if len(missing) > 3 else ""
        raise SurgeryError(f"{what} not found in {'; '.join(missing[:3])}{more}", where=edit.graph.name)
    return found


def _ffn(edit: Edit, family: Family, layer: int) -> FFN:
    prefix = family.layer.format(layer=layer)
    w_gate, w_up = edit.tensor(prefix + family.gate), edit.tensor(prefix + family.up)
    w_down_t = edit.tensor(stored_name(prefix + family.down, family))
    gate, up, down = linear(w_gate), linear(w_up), linear(w_down_t)
    if gate.inputs[0] is not up.inputs[0]:
        raise SurgeryError("gate and up do not read the same tensor")
    z = down.inputs[0]
    _only_activation_between(z, {id(gate.outputs[0]), id(up.outputs[0])})
    return FFN(layer, gate.inputs[0], z, down.outputs[0], w_gate, w_up, w_down_t)


def linear(weight: gs.Tensor) -> gs.Node:
    """The one MatMul that a weight feeds, directly or through a Transpose."""
    users = list(weight.outputs)
    if len(users) == 1 and users[0].op == "Transpose":
        users = list(users[0].outputs[0].outputs)
    if len(users) != 1 or users[0].op != "MatMul":
        raise SurgeryError(f"{weight.name} feeds {[u.op for u in users]}, not one MatMul")
    return users[0]


def _only_activation_between(z: gs.Tensor, ends: set[int]) -> None:
    seen, todo = set(), [z]
    while todo:
        tensor = todo.pop()
        if id(tensor) in ends:
            seen.add(id(tensor))
            continue
        if isinstance(tensor, gs.Constant):
            continue
        if not tensor.inputs or tensor.inputs[0].op not in _BETWEEN:
            op = tensor.inputs[0].op if tensor.inputs else "a graph input"
            raise SurgeryError(f"{op} stands between the projections of the FFN")
        todo.extend(tensor.inputs[0].inputs)
    if seen != ends:
        raise SurgeryError("down does not read the product of gate and up")


def _attention(edit: Edit, family: Family, layer: int) -> gs.Node:
    node = linear(edit.tensor(family.layer.format(layer=layer) + family.attention_out))
    while node.op in _VIEW | {"MatMul"} and node.inputs[0].inputs:
        node = node.inputs[0].inputs[0]
        if node.op == "Attention":
            if len(node.inputs) != 4:
                raise SurgeryError(f"Attention has {len(node.inputs)} inputs, expected q, k, v and mask")
            return node
        if node.op not in _VIEW:
            break
    raise SurgeryError(f"o_proj reads a {node.op}, not an Attention")
