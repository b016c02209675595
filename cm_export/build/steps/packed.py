"""Stage `packed`, where the recipe stores weights in few bits: weights and what products read -> packed.safetensors."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ...bundle import packed, weights
from ...bundle.packed import Entry
from ...bundle.weights import Planned, WeightFile
from ...quant import rows
from ...quant.choose import UNKNOWN, Inputs, by_inputs, quantise
from ...recipe.stored import StoredWeights
from ...surgery.packable import entries
from ..stage import Stage
from . import measured

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    file, stored = WeightFile(stages.file("weights", weights.FILE)), job.recipe.weights
    names = ("decode_dense", "vision") if job.tower else ("decode_dense",)
    graphs = [onnx.load(stages.file("graphs", f"{name}.onnx"), load_external_data=False) for name in names]
    found = entries(graphs[0], graphs[1] if job.tower else None, file, job.family, job.shape, stored)
    seen = WeightFile(stages.file("measured", measured.CHANNELS)) if "measured" in stages.keys else None
    zeros, planned = stored.zeros, []
    for i, (name, entry) in enumerate(found.items()):
        note = partial(job.progress, "store the weights in few bits", i, len(found))
        planned += _planned(name, entry, zeros, partial(_packed, name, entry, file, stored, seen, note))
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
    inputs = UNKNOWN
    if seen is not None and entry.site is not None:
        inputs = Inputs.of(seen[f"site.{entry.site}"])
    scheme = by_inputs(entry.bits, entry.group, symmetric=entry.bits == 8 or not stored.zeros)
    made = quantise(np.ascontiguousarray(weight, np.float32), scheme, name, inputs)
    codes, zero = made.unsigned()
    return rows.pack(codes[: entry.inputs], made.scale, zero, entry.bits, entry.group)


def _planned(name: str, entry: Entry, zeros: bool, make: Any) -> list[Planned]:
    """The three tensors of an entry; whichever is written first makes all of them."""
    columns, groups = entry.panels * rows.PANEL, entry.rows // entry.group
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "codes": ((groups * entry.group, columns * entry.bits // 8), np.dtype("u1")),
        "scale": ((groups, columns), np.dtype("<f2")),
        "zero": ((groups, columns) if zeros and entry.bits < 8 else (0,), np.dtype("u1")),
    }
    made: dict[str, np.ndarray] = {}

    def read(part: str) -> list[np.ndarray]:
        if part not in made:
            found = make()
            made.update(codes=found.codes, scale=found.scale, zero=found.zero)
        return [made.pop(part)]

    return [Planned(f"{name}.{part}", dtype, shape, partial(read, part)) for part, (shape, dtype) in shapes.items()]


STAGE = Stage(
    "packed", ("weights", "graphs", "measured"), lambda job: job.recipe.weights.storing(), _run,
    needed=lambda job: job.recipe.weights.packs,
)  # fmt: skip
