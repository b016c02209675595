"""Low-bit weights of CoreFFN: numbers -> int32 words and one scale per group of columns, and back.

    w[F,D] -> scale[F,D/g] = max|w| of the group / (2^(bits-1) - 1),  q = round(w / scale)
    8 int4 (4 int8) to a word: element j of a word lies in its bits [j*bits, (j+1)*bits), two's complement

TensorRT takes int32 constants into any plugin, int4 and int8 only into layers of its own: hence the words.
Each row stands alone, so a large weight can be packed piece by piece.
"""

import numpy as np

from cm_export.base.errors import InputError


def check(columns: int, bits: int, group: int) -> None:
    """Raises InputError unless rows of `columns` numbers can be packed so."""
    if bits not in (4, 8):
        raise InputError(f"weights of {bits} bits", where="CoreFFN", fix="give 4 or 8")
    per_word = 32 // bits
    if group < 1 or columns % group or columns % per_word:
        what = f"rows of {columns} in groups of {group}"
        raise InputError(what, where=f"CoreFFN, {bits} bits", fix=f"rows must be whole groups and whole {per_word}s")


def quantize(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [F,D] -> (words int32 [F,D*bits/32], scales [F,D/group] in the weights' type). Raises InputError.

    Symmetric, to the nearest; a group of zeros has scale 1. Numbers are rounded against the scale as it is stored, and
    the most negative code is used only where rounding the scale down makes it the nearest.
    """
    scales = scales_of(weights, bits, group)
    rows, most = len(weights), 2 ** (bits - 1) - 1
    grouped = weights.reshape(rows, -1, group).astype(np.float32)
    q = np.clip(np.rint(grouped / scales.astype(np.float32)[..., None]), -most - 1, most).astype(np.int32)
    parts = q.reshape(rows, -1, 32 // bits) & (2**bits - 1)
    words = np.zeros(parts.shape[:2], np.uint32)
    for j in range(32 // bits):
        words |= parts[..., j].astype(np.uint32) << np.uint32(j * bits)
    return words.view(np.int32), scales


def scales_of(weights: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The scales [F,D/group] of `quantize` alone. Raises InputError."""
    rows, columns = weights.shape
    check(columns, bits, group)
    largest = np.abs(weights.reshape(rows, -1, group).astype(np.float32)).max(-1)
    if not np.isfinite(largest).all():
        raise InputError("a weight is not finite", where="CoreFFN weights", fix="check the checkpoint")
    scales = (largest / (2 ** (bits - 1) - 1)).astype(weights.dtype)
    scales[scales.astype(np.float32) == 0] = 1
    return scales


def unpack(words: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The inverse up to rounding: words [F,W] and scales [F,D/g] -> float32 [F,D]. Arithmetic shifts keep the sign."""
    parts = [(words << (32 - bits - j * bits)) >> (32 - bits) for j in range(32 // bits)]
    q = np.stack(parts, axis=-1).reshape(*scales.shape, -1).astype(np.float32)
    return (q * scales.astype(np.float32)[..., None]).reshape(len(words), -1)
