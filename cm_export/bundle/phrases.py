"""What a model usually writes: its dense answers to prompts, kept for drafts that cost nothing (host/phrases.py).

phrases.safetensors, or the same arrays in a calibration
  answers     [T] i32   one after the other: the last tokens of the prompt (LEAD at most), the answer, the stop id if one ended it
  answer_ends [A,2] i32 of each where its own tokens begin and where they end
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..base.errors import BundleError
from . import weights
from .weights import WeightFile

FILE = "phrases.safetensors"
LEAD = 12  # tokens of a prompt, which the first tokens of an answer follow
MOST = 1 << 15  # tokens that are kept; a guarded answer waits some .3 s for a table of them
ARRAYS = ("answers", "answer_ends")


@dataclass(frozen=True, eq=False)
class Phrases:
    """The arrays of the file, by their names there."""

    answers: np.ndarray
    answer_ends: np.ndarray

    def __post_init__(self) -> None:
        """Raises BundleError for places that are not inside, in their order."""
        ends = self.answer_ends
        integers = all(getattr(self, name).dtype == np.int32 for name in ARRAYS)
        fits = integers and self.answers.ndim == 1 and ends.ndim == 2 and ends.shape[1:] == (2,)
        flat = ends.ravel()
        if not fits or (np.diff(flat, prepend=0, append=len(self.answers)) < 0).any() or (self.answers < 0).any():
            raise BundleError("its phrases cannot be", where=FILE, fix="calibrate or build again")

    @classmethod
    def of(cls, written: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Phrases:
        """(prompt, answer) pairs, up to MOST tokens of them."""
        tokens: list[int] = []
        ends: list[tuple[int, int]] = []
        for prompt, answer in written:
            lead = list(prompt[-LEAD:])
            if len(tokens) + len(lead) + len(answer) > MOST:
                break
            tokens += [*lead, *answer]
            ends.append((len(tokens) - len(answer), len(tokens)))
        return cls(np.array(tokens, "<i4"), np.array(ends, "<i4").reshape(-1, 2))

    def texts(self) -> list[tuple[list[int], int]]:
        """Each answer with what it follows, and how many tokens that are."""
        out, last = [], 0
        for begin, end in self.answer_ends.tolist():
            out.append((self.answers[last:end].tolist(), begin - last))
            last = end
        return out


def write(path: Path, found: Phrases) -> str:
    """Write the file; returns its sha256."""
    return weights.write_arrays(path, {name: getattr(found, name).astype("<i4") for name in ARRAYS})


def read(path: Path) -> Phrases:
    """The phrases at `path`. Raises BundleError for a file that is damaged or holds something else."""
    file = WeightFile(path)
    if missing := [name for name in ARRAYS if name not in file]:
        raise BundleError(f"it has no {missing[0]}", where=path, fix="build the bundle again")
    return Phrases(**{name: np.array(file[name]) for name in ARRAYS})
