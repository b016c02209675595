"""Stage `packed`, where the recipe stores weights in few bits: weights and what products read -> packed.safetensors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ...base.errors import GateFailed
from ...bundle import packed, weights
from ...bundle.packed import REMAINDER, Entry
from ...bundle.weights import Planned, WeightFile
from ...quant import rows
from ...quant.choose import UNKNOWN, Inputs, by_inputs, quantise
from ...quant.remainder import pack_remainder, row_bytes
from ...recipe.stored import StoredWeights
from ...surgery.packable import entries
from ..kept import Codes
from ..stage import Stage
from . import measured

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    file, stored = WeightFile(stages.file("weights", weights.FILE)), _stored(job)
    names = ("decode_dense", "vision") if job.tower else ("decode_dense",)
    graphs = [onnx.load(stages.file("graphs", f"{name}.onnx"), load_external_data=False) for name in names]
    codes = job.codes.kept if job.codes else {}
    kept = {name: (held.bits, held.group) for name, held in codes.items()}
    found = entries(graphs[0], graphs[1] if job.tower else None, file, job.family, job.shape, stored, kept)
    seen = WeightFile(stages.file("measured", measured.CHANNELS)) if "measured" in stages.keys else None
    planned = []
    for i, (name, entry) in enumerate(found.items()):
        note = partial(job.progress, "store the weights in few bits", i, len(found))
        if entry.kept:
            assert job.codes is not None  # it came from there
            zeros, make = any(codes[w].zeros for w in entry.weights), partial(_kept, name, entry, file, job.codes, note)
        else:
            zeros, make = not _symmetric(entry, stored), partial(_packed, name, entry, file, stored, seen, note)
        planned += _planned(name, entry, zeros, make)
    weights.write(folder / packed.FILE, planned)
    return {"entries": {name: entry.to_dict() for name, entry in found.items()}}


def _packed(
    name: str, entry: Entry, file: WeightFile, stored: StoredWeights, seen: WeightFile | None, note: Any
) -> Any:
    """One matrix [K,N] in the kernels' order."""
    note()
    parts = [file[w].T if entry.turned else file[w] for w in entry.weights]
    if len(parts) > 1:
        parts = [np.pad(p, ((0, 0), (0, n - p.shape[1]))) for p, n in zip(parts, entry.widths, strict=True)]
    weight = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    weight = np.ascontiguousarray(weight, np.float32)
    scheme = by_inputs(entry.bits, entry.group, symmetric=_symmetric(entry, stored))
    inputs, remainder = UNKNOWN, None
    if seen is not None and entry.site is not None:
        inputs = Inputs.of(seen[f"site.{entry.site}"])
    # Compensation would leave out more than 4 bits can hold.
    made = quantise(weight, scheme, name, replace(inputs, gram=None) if entry.refined else inputs)
    if entry.refined:
        left_out = made.numbers()[: entry.inputs]
        remainder = pack_remainder(np.subtract(weight, left_out, out=left_out).T, name)
    codes, zero = made.unsigned()
    return replace(rows.pack(codes[: entry.inputs], made.scale, zero, entry.bits, entry.group), remainder=remainder)


def _symmetric(entry: Entry, stored: StoredWeights) -> bool:
    """Whether its groups have no zero points."""
    return entry.bits == 8 or entry.refined or not stored.zeros


def _kept(name: str, entry: Entry, file: WeightFile, codes: Codes, note: Any) -> rows.PackedRows:
    """The checkpoint's own codes [K,N] in the kernels' order. Raises GateFailed unless they are the weight file's numbers."""
    note()
    parts, middle, symmetric = [], 1 << (entry.bits - 1), True
    for weight, width in zip(entry.weights, entry.widths, strict=True):
        read, scale, zero = codes.source.matrix(codes.kept[weight].module).stored()
        symmetric &= not codes.kept[weight].zeros
        more = ((0, 0), (0, width - read.shape[1]))
        pad = partial(np.pad, pad_width=more, constant_values=middle)
        parts.append((pad(read), np.pad(scale, more), pad(zero)))
    read, scale, zero = (np.concatenate(of, axis=1) for of in zip(*parts, strict=True))
    packed = rows.pack(read, scale, None if symmetric else zero, entry.bits, entry.group)
    numbers, begin = rows.numbers(packed), 0
    for weight, width, outputs in zip(entry.weights, entry.widths, entry.outputs, strict=True):
        expected = file[weight].T if entry.turned else file[weight]
        if not np.array_equal(numbers[: entry.inputs, begin : begin + outputs], expected):
            raise GateFailed("its codes are not the numbers of the weight", where=f"{name}: {weight}", fix="report it")
        begin += width
    return packed


def _planned(name: str, entry: Entry, zeros: bool, make: Any) -> list[Planned]:
    """The tensors of an entry; whichever is written first makes all of them."""
    columns, groups = entry.panels * rows.PANEL, entry.rows // entry.group
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "codes": (np.dtype("u1"), (groups * entry.group, columns * entry.bits // 8)),
        "scale": (np.dtype("<f2"), (groups, columns)),
        "zero": (np.dtype("u1"), (groups, columns) if zeros else (0,)),
        REMAINDER: (np.dtype("u1"), (entry.columns, row_bytes(entry.inputs))),
    }
    made: dict[str, np.ndarray] = {}

    def read(part: str) -> list[np.ndarray]:
        if part not in made:
            found = make()
            made.update({p: getattr(found, p) for p in entry.parts})
        return [made.pop(part)]

    return [Planned(f"{name}.{part}", *tensors[part], partial(read, part)) for part in entry.parts]


def _stored(job: "Job") -> StoredWeights:
    """As the recipe says; beside engines, which have weights of their own, token embeddings stay float32."""
    return replace(job.recipe.weights, embedding="fp32") if job.aim else job.recipe.weights


def _inputs(job: "Job") -> dict[str, Any]:
    return _stored(job).storing() | {"kept": sorted(job.codes.kept) if job.codes else []}


STAGE = Stage(
    "packed", ("weights", "graphs", "measured"), _inputs, _run,
    needed=lambda job: job.recipe.weights.packs,
)  # fmt: skip
