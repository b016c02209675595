"""What becomes of a checkpoint's own codes: kept as they are, rounded anew, or read as floats; decided once, before any work.

    survey: model.layers.0.mlp.up_proj, 4 bits, groups of 128   ->   Held(weight, kind "ffn", fits the stored layout or why not)
    settle: recipe, weights.codes = auto   ->   weights.ffn = "int4", and which weights keep their codes
    rows:   for the manifest, by kind: how many matrices were kept, rounded anew, read as float32, and why

Kept codes give the same numbers as the checkpoint's, so nothing is lost by them; fewer bits are only made where
somebody asks for them.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import InputError
from ..bundle.names import stored_name
from ..bundle.packed import Entry
from ..families import Family, Tower
from ..recipe.recipe import Recipe
from ..recipe.stored import KINDS
from ..source.packings import ORIGINAL
from ..source.parameters import Parameters
from ..source.quantised import Quantised

_WHERE = "weights.codes"
# Scales of weights; those of activations and caches (k_scale, input_scale) change no weight, and the build notes them.
_SCALE = re.compile(r"\.(scales?|weight_\w*scale\w*|\w*global_scale)$")


@dataclass(frozen=True)
class Held:
    """One matrix that the checkpoint holds in few bits."""

    module: str
    parameter: str
    weight: str  # in the weight file
    kind: str  # of recipe/stored.py
    bits: int
    length: int | None  # inputs that share a scale in the checkpoint; None: they do not lie together
    group: int  # in the stored layout
    zeros: bool
    why_not: str | None  # why its codes cannot be kept


@dataclass(frozen=True)
class Codes:
    """The matrices of a checkpoint, and those of them that keep their codes, by their names in the weight file."""

    source: Quantised
    model: Parameters
    held: tuple[Held, ...]
    kept: Mapping[str, Held] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)  # weight -> why its codes are not kept
    float32_bytes: int = 0


def survey(source: Quantised, model: Parameters, family: Family, tower: Tower | None) -> Codes:
    """Every matrix with what it is in the model. Raises InputError for tensors that do not fit together or the model."""
    found, elements = [], 0
    if odd := next((n for n in source.others if _SCALE.search(n) and not model.has(n)), None):
        what = f"holds {odd}, and nothing here says what it scales"
        raise InputError(what, where=source.path, fix=ORIGINAL)
    for module in source.modules:
        name, matrix = model.find(f"{module}.weight"), source.matrix(module)
        elements += matrix.inputs * matrix.outputs
        if name is None:
            continue  # of a part that transformers' class does not have; the weights stage notes it
        if model.shapes[name] != (matrix.outputs, matrix.inputs):
            what = f"{module} is {[matrix.outputs, matrix.inputs]} in few bits, and the model has {list(model.shapes[name])}"
            raise InputError(
                what, where=source.path, fix="its quantization_config or config.json is of another checkpoint"
            )
        found.append(
            Held(
                module, name, stored_name(name, family), _kind(name, family, tower), matrix.bits, matrix.length,
                matrix.group, matrix.zero is not None and bool((matrix.zero != 1 << (matrix.bits - 1)).any()),
                matrix.why_not,
            )
        )  # fmt: skip
    return Codes(source, model, tuple(found), float32_bytes=4 * (elements + source.float_elements()))


def settle(
    codes: Codes, asked: Recipe, recipe: Recipe, changed: Iterable[str], reordered: bool
) -> tuple[Recipe, Codes]:
    """The recipe as the bundle records it, and which codes are kept.

    asked: the recipe before the model decided what was open in it (`recipe`). changed: parameters that an adapter changes.
    reordered: whether the neurons are stored in another order. Raises InputError where all were to be kept and cannot be.
    """
    others, changed, n = {}, set(changed), recipe.neurons
    in_sets = not (n.policy == "dense" or n.by_threshold)
    for held in codes.held:
        own = asked.weights.of(held.kind) if not asked.weights.is_open or getattr(asked.weights, held.kind) else None
        reasons = {
            held.why_not: held.why_not is not None,
            "weights.codes = anew": recipe.weights.codes == "anew",
            "an adapter is merged into them": held.parameter in changed,
            f"neurons.policy = {n.policy} gathers rows of float32": held.kind == "ffn" and in_sets,
            "their neurons are stored in another order": held.kind == "ffn" and reordered,
            f"the recipe asks for {own} bits": own is not None and (own == 32 or own < held.bits),
            "engines have a precision of their own": recipe.backend != "onnxruntime",
        }
        if why := next((reason for reason, holds in reasons.items() if holds), None):
            others[held.weight] = why
    if recipe.weights.codes == "kept" and others:
        weight, why = next(iter(others.items()))
        fix = "give --weight-codes auto, which keeps those that can be kept and says what became of the others"
        raise InputError(f"codes of {len(others)} matrices cannot be kept, e.g. {weight}: {why}", where=_WHERE, fix=fix)
    kept = {held.weight: held for held in codes.held if held.weight not in others}
    changes: dict[str, Any] = {}
    if kept and asked.weights.is_open:
        changes["weights__precision"] = "int8"  # what the checkpoint holds as floats
    for kind in KINDS:
        if bits := {held.bits for held in kept.values() if held.kind == kind}:
            changes[f"weights__{kind}"] = f"int{min(bits)}"
        elif kind == "ffn" and in_sets and kept:
            changes["weights__ffn"] = "fp32"
    settled = recipe.replace(**changes)
    settled = dataclasses.replace(settled, chosen=recipe.chosen)
    return settled, dataclasses.replace(codes, kept=kept, others=others)


def rows(codes: Codes, entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For the manifest: of every kind that the checkpoint holds in few bits, what became of its matrices."""
    entry_of = {w: e for e in map(Entry.of, entries.values()) for w in e.weights}
    found = []
    for kind in KINDS:
        of_kind = [held for held in codes.held if held.kind == kind]
        became: Counter[str] = Counter()
        why: Counter[str] = Counter()
        for held in of_kind:
            entry = entry_of.get(held.weight)
            if entry is not None and entry.kept:
                became["kept"] += 1
                continue
            became["float32" if entry is None else f"{entry.bits} bits anew"] += 1
            why[codes.others.get(held.weight, "a matrix that is read with it keeps no codes")] += 1
        if of_kind:
            row = {
                "kind": kind, "matrices": len(of_kind), "bits": sorted({h.bits for h in of_kind}),
                "groups": sorted({h.length or 0 for h in of_kind}), "became": dict(became), "why": [*why],
            }  # fmt: skip
            found.append(row | {"said": _said(codes.source.method, row)})
    return found


def _said(method: str, row: Mapping[str, Any]) -> str:
    """A row in words."""
    became = ", ".join(f"{count} {_WORDS.get(what, f'rounded to {what}')}" for what, count in row["became"].items())
    why = f" ({'; '.join(row['why'])})" if row["why"] else ""
    bits = " and ".join(f"{b}" for b in row["bits"])
    return f"{row['kind']}: {row['matrices']} matrices of {bits} bits in the checkpoint ({method}), {became}{why}"


_WORDS = {"kept": "kept as they are", "float32": "read as float32"}


def _kind(name: str, family: Family, tower: Tower | None) -> str:
    begin = family.layer.split("{")[0]
    if tower is not None and name.startswith(tower.prefixes):
        return "vision"
    if not name.startswith(begin):
        return "head"
    if name.endswith((family.gate, family.up, family.down)):
        return "ffn"
    return "value" if name.endswith(family.value) else "attention"
