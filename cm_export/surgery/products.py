"""The products of a decoder besides its FFNs, found by the weights that they multiply.

layer weights but the FFN's -> attention_in  [q, k, v: MatMuls that read one tensor]      o_proj -> attention_out
the MatMul that makes logits -> head
"""

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ..base.errors import SurgeryError
from ..bundle.names import stored_name
from ..families import Family
from .edit import Edit


@dataclass(frozen=True)
class Product:
    """y [B,S,N] = x [B,S,D] w^T, w [N,D] as it is stored."""

    node: gs.Node
    weight: gs.Tensor

    @property
    def x(self) -> gs.Tensor:
        return self.node.inputs[0]


@dataclass(frozen=True)
class LayerProducts:
    """Attention's products of one layer; those of `into` read the same tensor."""

    layer: int
    into: tuple[Product, ...]
    out: Product


def layer_products(edit: Edit, family: Family, layers: int) -> list[LayerProducts]:
    """Attention's products of every layer. Raises SurgeryError naming a layer where they are not as expected."""
    by_weight = {product.weight.name: product for product in _all(edit)}
    found = []
    for layer in range(layers):
        prefix = family.layer.format(layer=layer)
        ffn = {stored_name(prefix + part, family) for part in (family.gate, family.up, family.down)}
        own = [p for name, p in by_weight.items() if name.startswith(prefix) and name not in ffn]
        out = [p for p in own if p.weight.name == prefix + family.attention_out]
        into = tuple(p for p in own if p not in out)
        if len(out) != 1 or not into:
            raise SurgeryError(f"layer {layer}: {len(into)} products into attention, {len(out)} out of it")
        if any(p.x is not into[0].x for p in into):
            names = ", ".join(p.weight.name for p in into)
            raise SurgeryError(f"layer {layer}: {names} do not read the same tensor", where=edit.graph.name)
        found.append(LayerProducts(layer, into, out[0]))
    return found


def head_product(edit: Edit) -> Product:
    """The product that makes the logits. Raises SurgeryError."""
    logits = next(t for t in edit.graph.outputs if t.name == "logits")
    found = [p for p in _all(edit) if p.node.outputs[0] is logits]
    if len(found) != 1:
        raise SurgeryError(f"logits come from {logits.inputs[0].op}, not from a product", where=edit.graph.name)
    return found[0]


def _all(edit: Edit) -> list[Product]:
    """Every MatMul whose right factor is a weight, turned over."""
    out = []
    for node in edit.graph.nodes:
        if node.op != "MatMul":
            continue
        right = node.inputs[1]
        source = right.inputs[0] if right.inputs else None
        if source is not None and source.op == "Transpose" and isinstance(source.inputs[0], gs.Constant):
            out.append(Product(node, source.inputs[0]))
    return out
