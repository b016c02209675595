"""What packed bytes mean, and how far that is from the weight: written without `packing`, so that it can tell a wrong pack.

bytes, scales -> numbers [F,D] float32        error = |numbers - w| / |w|, roots of summed squares
"""

import numpy as np

from .scheme import Quantised, Scheme


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
    """Distance of what is stored from `weight` [F,D], relative to the weight; infinite where a scale is no number."""
    off = numbers(stored, scale, scheme) - weight
    error = float(np.linalg.norm(off) / max(float(np.linalg.norm(weight)), 1e-30))
    return error if np.isfinite(error) else float("inf")
