"""One proof on one configuration: a figure against its limit, or why there is none.

Proof("vision", ...).on(subject)  ->  Result("vision", PROVED, 4.1e-07, 1e-05, "3 pictures in 1 run")
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import CmExportError, GateFailed, InputError
from ..build.gates import compared
from ..source.quiet import in_short
from .subject import Subject

PROVED, FAILED, MISSING, NOT_REACHED, NOT_ASKED = "proved", "FAILED", "MISSING", "not reached", "-"
# float32 through two or three layers, summed in another order, differs by 2e-6; a wrong mask or position by above 1e-2.
LIMIT = 1e-5
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Found:
    """What a proof measured."""

    value: float
    limit: float
    detail: str


@dataclass(frozen=True)
class Result:
    """How a proof ended; NOT_ASKED: it is about pictures, and the model reads none."""

    proof: str
    state: str
    value: float | None
    limit: float | None
    detail: str

    @property
    def holds(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in (PROVED, NOT_ASKED)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Proof:
    """What is proved; `sees`: only of a model that reads pictures."""

    name: str
    what: str
    run: Callable[[Subject], Found]
    sees: bool = False

    def on(self, subject: Subject) -> Result:
        """Prove it of one configuration: whatever the family's file raises is a result, too."""
        try:
            if self.sees and not subject.shape.sees:
                return Result(self.name, NOT_ASKED, None, None, "reads no pictures")
            found = self.run(subject)
        except InputError as e:  # a refusal: what the family would need is not there
            return Result(self.name, MISSING, None, None, str(e))
        except CmExportError as e:
            return Result(self.name, FAILED, None, None, str(e))
        except Exception as e:  # of a file under way, anything
            return Result(self.name, FAILED, None, None, f"{in_short(e)}, in {_place(e)}")
        state = PROVED if found.value <= found.limit else FAILED
        return Result(self.name, state, found.value, found.limit, found.detail)


def compare(pairs: Pairs, detail: str, same: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None) -> Found:
    """The largest difference of `pairs` (ours, theirs), relative to max(1, largest of theirs).

    Raises GateFailed where shapes differ, a value is no number, or what must be the `same` is not.
    """
    gate = compared("parity", "parity", dict(pairs), None, detail, "")
    worst = max(pairs, key=lambda name: _difference(*pairs[name]))
    for name, (ours, theirs) in (same or {}).items():
        if list(ours) != list(theirs):
            raise GateFailed(
                f"{list(ours)}, transformers says {list(theirs)} ({worst} differs by {gate.value:.1e})", where=name
            )
    return Found(gate.value, LIMIT, f"{detail}; most: {worst}")


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(1.0, np.abs(theirs).max()))


def _place(e: Exception) -> str:
    """File and line in which an exception was raised: the innermost outside of libraries."""
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"
