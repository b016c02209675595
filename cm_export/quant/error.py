"""What packed bytes mean, and how far that is from the weight: written without `packing`, so that it can tell a wrong pack.

bytes, scales -> numbers [F,D] float32        error = |numbers - w| / |w|, roots of summed squares
                                              of one group of g weights at most sqrt(g) / (2^bits - 2)

The bound of a group: no weight is further from its number than half a step, and a step is at most 1 / (2^(bits-1) - 1) of the
largest weight in the group (with a zero, 1 / (2^bits - 1) of twice that). One wrong row or scale among thousands hardly changes
the error of a matrix, but breaks it.
"""

import numpy as np

from .scheme import Quantised, Scheme

_FAINT = 1e-3  # of the typical norm of a group
_SLACK = 1.02  # a scale of 16 bits is rounded itself


def codes_of(stored: np.ndarray, bits: int) -> np.ndarray:
    """Packed bytes or int32 words of F rows -> codes int8 [F,D]. Arithmetic shifts keep the sign."""
    width = 8 * stored.dtype.itemsize
    signed, each = stored.view(f"i{stored.dtype.itemsize}"), width // bits
    moved = [(signed << (width - (j + 1) * bits)) >> (width - bits) for j in range(each)]
    return np.stack(moved, axis=-1).astype(np.int8).reshape(len(stored), each * stored.shape[1])


def numbers(stored: np.ndarray, scale: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Packed bytes or int32 words with their scales -> float32 [F,D]."""
    return Quantised(codes_of(stored, scheme.bits), scale, scheme).numbers()


def relative_error(weight: np.ndarray, stored: np.ndarray, scale: np.ndarray, scheme: Scheme) -> float:
    """`distance` of packed bytes or int32 words with their scales from `weight` [F,D]."""
    return distance(weight, numbers(stored, scale, scheme), scheme)


def distance(weight: np.ndarray, found: np.ndarray, scheme: Scheme) -> float:
    """Distance of `found`, what codes stand for, from `weight` [F,D], relative to the weight; with zeros or without.

    Infinite where a scale is no number, and where a group is further from its weights than rounding can bring it. What
    `compensate` makes may well be further: its measure is `output_error`.
    """
    off = found - weight
    error = float(np.linalg.norm(off) / max(float(np.linalg.norm(weight)), 1e-30))
    each, own = _group_norms(off, scheme), _group_norms(weight, scheme)
    # A group of weights that are next to nothing beside the others may have a scale too small for its type.
    least = np.maximum(own, _FAINT * np.sqrt(np.square(own).mean()))
    bound = _SLACK * scheme.group**0.5 / (2**scheme.bits - 2)
    return error if np.isfinite(error) and (each <= bound * least).all() else float("inf")


def output_error(weight: np.ndarray, found: np.ndarray, gram: np.ndarray) -> float:
    """|X found - X weight| / |X weight| for weights [F,D] by inputs and `gram` = X^T X [F,F] of those inputs X [T,F]."""
    off, own = (float((w * (gram.astype(np.float64) @ w)).sum()) for w in (found - weight, weight.astype(np.float64)))
    return float(np.sqrt(max(off, 0.0) / max(own, 1e-30)))


def _group_norms(values: np.ndarray, scheme: Scheme) -> np.ndarray:
    rows, columns = scheme.scale_shape(values.shape)
    split = (rows, 1, columns, scheme.group) if scheme.axis else (rows, scheme.group, columns, 1)
    return np.sqrt(np.square(values.astype(np.float64).reshape(split)).sum((1, 3)))
