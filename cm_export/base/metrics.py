"""Figures with their uncertainty: shares right, what is kept of dense, and how far two models' next tokens are apart.

                   sparse right  sparse wrong
dense right             a             b          kept = (a + c) / (a + b)
dense wrong             c             d
"""

import math
from collections.abc import Callable

import numpy as np

from .errors import CmExportError, InputError

_DRAWS = 20_000


def check_floor(value: float | None, name: str) -> None:
    """Raises InputError unless a share that is required lies above 0 and is at most 1; None: nothing is required.

    Above 1 nothing could hold, at 0 or below everything would, and NaN compares with nothing.
    """
    if value is not None and not 0 < value <= 1:
        raise InputError(f"{value:g} is no share that can be required", where=name, fix="give one above 0, up to 1")


def check_numbers(logits: np.ndarray, where: str) -> None:
    """Raises CmExportError where logits [..,V] hold NaN or infinity: the first of them would count as the likeliest token."""
    if not np.isfinite(logits.max(initial=-np.inf, axis=-1)).all():
        fix = "the model overflowed: check its weights, or try another precision"
        raise CmExportError("logits that are no numbers", where=where, fix=fix)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    mid, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return min(p, max(0.0, mid - half)), max(p, min(1.0, mid + half))  # it holds p; rounding must not say otherwise


def kept_of_dense(
    dense: np.ndarray, sparse: np.ndarray, level: float = 0.95
) -> tuple[float | None, list[float] | None]:
    """Sparse accuracy over dense accuracy of the same questions [n] bool, and its interval; None if dense has none.

    The questions are paired, so the interval is far narrower than that of two separate samples. Equal-tailed posterior
    interval of the four shares under Jeffreys' prior (a half in each cell): unlike a bootstrap it does not shrink to a
    point when the two models happen to agree on every question asked. It may reach above 1: the sparse model can be right
    where the dense one is wrong.
    """
    dense, sparse = np.asarray(dense, bool), np.asarray(sparse, bool)
    if dense.shape != sparse.shape:
        raise ValueError(f"{len(sparse)} answers beside {len(dense)} dense ones")
    if not dense.any():
        return None, None
    return float(sparse.sum() / dense.sum()), kept_interval(paired(dense, sparse), level)


def kept_interval(cells: np.ndarray, level: float = 0.95) -> list[float]:
    """The interval of (a + c) / (a + b) for counts [a, b, c, d] of the square above; they need not be whole."""
    both, lost, won, _ = np.random.default_rng(0).dirichlet(cells + 0.5, _DRAWS).T
    tail = (1 - level) / 2
    low, high = np.quantile((both + won) / (both + lost), [tail, 1 - tail])
    return [float(low), float(high)]


def questions_needed(floor: float, level: float = 0.95, lost: int = 0) -> int | None:
    """The least number of questions that shows this floor where `lost` answers are lost and none is won; None if none can (1)."""

    def holds(n: int) -> bool:
        return kept_interval(np.array([n - lost, lost, 0, 0]), level)[0] >= floor

    return _smallest(holds, start=lost + 1)


def more_needed(cells: np.ndarray, floor: float, level: float = 0.95) -> int | None:
    """Rough number of further questions after which counts [a, b, c, d] that go on like this reach the floor.

    None: what is kept is not above the floor, so no number of questions would help.
    """
    both, lost, won, _ = cells.tolist()
    n = int(cells.sum())
    if not both + lost or (both + won) / (both + lost) <= floor:
        return None
    wanted = _smallest(lambda m: kept_interval(cells * m / n, level)[0] >= floor, start=n)
    return None if wanted is None else max(1, wanted - n)


def _smallest(holds: Callable[[int], bool], start: int = 1, most: int = 10**6) -> int | None:
    """The least n from `start` on for which `holds(n)`, which stays true once it is; None up to `most`."""
    low, high = start - 1, start
    while not holds(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def paired(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Counts [a, b, c, d] of the square above from right answers [n] bool."""
    dense, sparse = np.asarray(dense, bool), np.asarray(sparse, bool)
    return np.array(
        [(dense & sparse).sum(), (dense & ~sparse).sum(), (~dense & sparse).sum(), (~dense & ~sparse).sum()]
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..,V] float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    found: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found


def divergences(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """[..]: KL(reference || other) in nats of two logits [..,V]. Raises CmExportError where they are no numbers."""
    check_numbers(reference, "the model that is compared with")
    check_numbers(logits, "the model that is compared")
    p, q = log_softmax(reference), log_softmax(logits)
    found: np.ndarray = (np.exp(p) * (p - q)).sum(-1)
    return found


def divergence(reference: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Mean KL(reference || other) in nats and share of equal first choices, over the rows of two logits [T,V], T >= 1.

    Raises CmExportError where they are no numbers.
    """
    if not len(reference):
        raise CmExportError("no tokens to compare", where="divergence")
    same = reference.argmax(-1) == logits.argmax(-1)
    return float(divergences(reference, logits).mean()), float(same.mean())


def spread(values: list[float]) -> dict[str, float | int]:
    """Median and quartiles."""
    low, mid, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": mid, "q1": low, "q3": high, "n": len(values)}
