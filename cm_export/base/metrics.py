"""Figures with their uncertainty: shares right, what is kept of dense, and how far two models' next tokens are apart.

                   sparse right  sparse wrong
dense right             a             b          kept = (a + c) / (a + b)
dense wrong             c             d
"""

import math

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
    return max(0.0, mid - half), min(1.0, mid + half)


def kept_of_dense(
    dense: np.ndarray, sparse: np.ndarray, level: float = 0.95
) -> tuple[float | None, list[float] | None]:
    """Sparse accuracy over dense accuracy of the same questions [n] bool, and its interval; None if dense has none.

    The questions are paired, so the interval is far narrower than that of two separate samples. Equal-tailed posterior
    interval of the four shares under Jeffreys' prior (a half in each cell): unlike a bootstrap it does not shrink to a
    point when the two models happen to agree on every question asked.
    """
    dense, sparse = np.asarray(dense, bool), np.asarray(sparse, bool)
    if dense.shape != sparse.shape:
        raise ValueError(f"{len(sparse)} answers beside {len(dense)} dense ones")
    if not dense.any():
        return None, None
    cells = [(dense & sparse).sum(), (dense & ~sparse).sum(), (~dense & sparse).sum(), (~dense & ~sparse).sum()]
    return float(sparse.sum() / dense.sum()), kept_interval(np.array(cells), level)


def kept_interval(cells: np.ndarray, level: float = 0.95) -> list[float]:
    """The interval of (a + c) / (a + b) for counts [a, b, c, d] of the square above; they need not be whole."""
    both, lost, won, _ = np.random.default_rng(0).dirichlet(cells + 0.5, _DRAWS).T
    tail = (1 - level) / 2
    low, high = np.quantile((both + won) / (both + lost), [tail, 1 - tail])
    return [float(low), float(high)]


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
