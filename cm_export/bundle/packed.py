"""The file of low-bit weights: what ONNX Runtime's graphs multiply in their place, one copy for prefill, decode and tower.

    packed.safetensors: layers.0.ffn_in.codes, .scale, .zero, ...          quant/rows.py has the layout
    manifest: packed    layers.0.ffn_in = {weights: [gate, up], bits: 4, group: 32, inputs: D, outputs: [F, F]}

An entry holds every weight that reads the same x (gate and up; q, k and v) side by side along its outputs. A head may have a
fourth tensor, .remainder (quant/remainder.py): what its 4 bits leave out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import BundleError
from ..quant.rows import PANEL, PackedRows, numbers_of
from .weights import Checks, WeightFile

FILE = "packed.safetensors"
PARTS = ("codes", "scale", "zero")
REMAINDER = "remainder"
_FEW = 17  # tokens of a step or a check, which are looked up one by one
_KEPT = 256  # of the last of them: the same words come again and again, and a step of a small model takes less than a millisecond
TOWER = "vision."  # how the names of the tower's entries begin


@dataclass(frozen=True)
class Entry:
    """One packed matrix. `outputs`: of each weight, in the order of `weights`, names in the weight file."""

    weights: tuple[str, ...]
    bits: int
    group: int
    inputs: int
    outputs: tuple[int, ...]
    padded: bool = False  # whether each weight begins a panel of its own, as gate and up must
    turned: bool = True  # whether the weight file holds them as [outputs, inputs]
    site: int | None = None  # of bundle/thresholds.py
    kept: bool = False  # whether its codes are the checkpoint's own
    table: bool = False  # whether token embeddings are rows of its one weight, as of a head that is the embedding, too
    refined: bool = False  # whether it has a remainder

    @property
    def parts(self) -> tuple[str, ...]:
        """Its tensors."""
        return (*PARTS, REMAINDER) if self.refined else PARTS

    @property
    def rows(self) -> int:
        """Inputs, made up to whole groups."""
        return -(-self.inputs // self.group) * self.group

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of each weight, with those that fill its last panel where each begins one of its own."""
        return tuple(-(-n // PANEL) * PANEL for n in self.outputs) if self.padded else self.outputs

    def begin(self, weight: str) -> int:
        """The first output of one of its weights."""
        return sum(self.widths[: self.weights.index(weight)])

    def shape(self, weight: str) -> tuple[int, int]:
        """Of one of its weights, in the weight file."""
        outputs = self.outputs[self.weights.index(weight)]
        return (outputs, self.inputs) if self.turned else (self.inputs, outputs)

    @property
    def columns(self) -> int:
        """Outputs of the product."""
        return sum(self.widths)

    @property
    def panels(self) -> int:
        """Stored outputs, in panels."""
        return -(-self.columns // PANEL)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Entry":
        """From `to_dict`."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


class Packed:
    """The file with what its entries are; `entry_of[weight]` names the entry that holds a weight."""

    def __init__(self, path: Path, entries: Mapping[str, Mapping[str, Any]], checks: Checks | None = None):
        """`checks`: see WeightFile. Raises BundleError for a file without one of the entries' tensors."""
        self.file = WeightFile(path, checks)
        self.entries = {name: Entry.of(values) for name, values in entries.items()}
        self.entry_of = {weight: name for name, entry in self.entries.items() for weight in entry.weights}
        for name, entry in self.entries.items():
            for part in entry.parts:
                if f"{name}.{part}" not in self.file:
                    raise BundleError(f"it has no {name}.{part}", where=path, fix="build the bundle again")

    @property
    def has_ffns(self) -> bool:
        """Whether the FFNs of the decoder are among the entries."""
        return "layers.0.ffn_in" in self.entries

    @property
    def table_entry(self) -> str | None:
        """The entry that token embeddings are read from, if any."""
        return next((name for name, entry in self.entries.items() if entry.table), None)

    @cached_property
    def table(self) -> "Table | None":
        """The token embedding, where it is among the entries."""
        return Table(self.rows(self.table_entry), self.entries[self.table_entry]) if self.table_entry else None

    def rows(self, name: str) -> PackedRows:
        """The stored matrix of an entry."""
        entry = self.entries[name]
        codes, scale, zero, *remainder = (self.file[f"{name}.{part}"] for part in entry.parts)
        return PackedRows(codes, scale, zero, entry.bits, entry.group, entry.rows, entry.columns, *remainder)


class Table:
    """A token embedding [V,D] that is read a row at a time where it lies, V the outputs of its matrix."""

    def __init__(self, rows: PackedRows, entry: Entry):
        """`entry`: one whose one weight the table is."""
        # slices of a mapped file take longer
        parts: dict[str, Any] = {part: np.asarray(getattr(rows, part)) for part in entry.parts}
        self._rows, self.shape = replace(rows, **parts), (entry.outputs[0], entry.inputs)
        self._kept: dict[int, np.ndarray] = {}

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [N,D] of ids [N], of which a picture's are all the same."""
        if 0 < len(ids) <= _FEW:
            return np.stack([self._row(one) for one in ids.tolist()])
        unlike, places = np.unique(ids, return_inverse=True)
        return numbers_of(self._rows, unlike)[places, : self.shape[1]]

    def _row(self, token: int) -> np.ndarray:
        row = self._kept.get(token)
        if row is None:
            if len(self._kept) >= _KEPT:
                self._kept = {}  # another thread may still hold the old one
            row = self._kept[token] = numbers_of(self._rows, np.array([token]))[0, : self.shape[1]]
        return row
