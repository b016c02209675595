"""Which weights of a model are stored in few bits, under which names, and what reads them together.

decode_dense: gate, up -> layers.0.ffn_in      down -> layers.0.ffn_out      q, k -> layers.0.attention_in      v, o, head
              the token embedding, unless it is the head           -> embedding
              a large head of 8 bits beside others of 4            -> head, in 4 bits and a remainder (quant/remainder.py)
vision:       every MatMul and Gemm with a weight -> vision.<its name>
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx

from ..bundle.names import core_row_names
from ..bundle.packed import TOWER, Entry
from ..bundle.thresholds import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT, SIDES
from ..bundle.weights import WeightFile
from ..families import Family, Shape
from ..recipe.stored import StoredWeights
from .edit import Edit
from .nodes import is_plain_gemm
from .products import head_product, layer_products

# Weights of a head from which on reading half of them saves more than looking through the logits costs (30 us, SmolLM2's).
WORTH_REFINING = 1 << 22
_NONE: Mapping[str, tuple[int, int]] = {}


def entries(
    decode: onnx.ModelProto, vision: onnx.ModelProto | None, file: WeightFile, family: Family, shape: Shape,
    stored: StoredWeights, kept: Mapping[str, tuple[int, int]] = _NONE,
) -> dict[str, Entry]:  # fmt: skip
    """Name -> entry, of the kinds that the recipe stores in 8 or 4 bits. Raises SurgeryError.

    kept: weight -> (bits, group) of codes that the checkpoint holds; an entry keeps them where all of its weights have such.
    """

    def entry(
        kind: str, weights: list[str], turned: bool = True, site: int | None = None, table: bool = False
    ) -> Entry:
        shapes = [file.tensors[name].shape for name in weights]
        inputs, outputs = shapes[0][turned], tuple(s[not turned] for s in shapes)
        codes = {kept.get(name) for name in weights}
        own = codes.pop() if len(codes) == 1 else None
        # What a checkpoint in few bits left as floats was left so for a reason.
        bits, group = own or (max(8, stored.of(kind)) if kept else stored.of(kind), stored.group)
        return Entry(tuple(weights), bits, group, inputs, outputs, kind == "ffn", turned, site, own is not None, table)

    found: dict[str, Entry] = {}
    if stored.of("ffn") < 32:
        for i, (gate, up, down) in enumerate(core_row_names(family, shape.layers)):
            found[f"layers.{i}.ffn_in"] = entry("ffn", [gate, up], site=SIDES * i + FFN_IN)
            found[f"layers.{i}.ffn_out"] = entry("ffn", [down], turned=False, site=SIDES * i + FFN_OUT)
    edit = Edit(decode)
    for own in layer_products(edit, family, shape.layers):
        at, into = SIDES * own.layer, [p.weight.name for p in own.into]
        parts = _parts(into, family.value, stored, kept)
        parts["attention_out"] = ("attention", [own.out.weight.name])
        for part, (kind, names) in parts.items():
            side = ATTENTION_OUT if part == "attention_out" else ATTENTION_IN
            if stored.of(kind) < 32:
                found[f"layers.{own.layer}.{part}"] = entry(kind, names, site=at + side)
    head, tables = head_product(edit).weight.name, stored.of("embedding") < 32
    if stored.of("head") < 32:
        made = entry("head", [head], site=SIDES * shape.layers, table=tables and head == family.embedding)
        refined = stored.refines_head and not made.kept and made.inputs * sum(made.outputs) >= WORTH_REFINING
        found["head"] = replace(made, bits=4, refined=True) if refined else made
    if tables and head != family.embedding:
        found["embedding"] = entry("embedding", [family.embedding], table=True)
    if stored.of("vision") < 32 and vision is not None:
        found |= {f"{TOWER}{name}": entry("vision", [name]) for name in _weights_of_products(vision)}
    return found


def _parts(
    into: list[str], value: str, stored: StoredWeights, kept: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[str, list[str]]]:
    """q, k and v by the name of their entry, with their kind: those side by side that are stored in the same way."""
    alike: dict[tuple, list[str]] = {}
    for name in into:
        kind = "value" if name.endswith(value) else "attention"
        alike.setdefault((stored.of(kind), kept.get(name)), []).append(name)
    found: dict[str, tuple[str, list[str]]] = {}
    for names in alike.values():
        if all(name.endswith(value) for name in names):
            found["value"] = ("value", names)
        else:
            found["attention_in" if "attention_in" not in found else "attention_in_2"] = ("attention", names)
    return found


def _weights_of_products(model: onnx.ModelProto) -> Iterator[str]:
    """Weights [N,K] that one product reads, each once: through a Transpose, or by a Gemm that turns them itself."""
    known = {t.name for t in model.graph.initializer if len(t.dims) == 2}
    turned = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in known}
    seen = set()
    for node in model.graph.node:
        name = None
        if node.op_type == "Gemm" and is_plain_gemm(node):
            name = node.input[1] if node.input[1] in known else None
        elif node.op_type == "MatMul":
            name = turned.get(node.input[1])
        if name is not None and name not in seen:
            seen.add(name)
            yield name
