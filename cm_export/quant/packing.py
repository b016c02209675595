"""Codes -> the bytes that kernels read. There is one order of bits; layouts differ in the type that it goes by.

    codes  int8  [F,D]              -2^(bits-1) .. 2^(bits-1) - 1
    packed uint8 [F,D*bits/8]       two's complement, the earlier code in the low half of a byte: ONNX INT4 and INT8
    words  int32 [F,D*bits/32]      the same bytes, four to a word: TensorRT takes int32 constants into any plugin
    blocks uint8 [F,D/g,g*bits/8]   the same codes above a zero point of 8 or 128: ONNX Runtime's MatMulNBits

Each row stands alone, so a large weight can be packed piece by piece.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ..base.errors import InputError
from .scheme import Quantised


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes int8 [F,D] -> uint8 [F,D*bits/8]. Raises InputError for rows that end within a byte."""
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint8)
    _check_whole(codes.shape[1], 2, "bytes")
    halves = codes.view(np.uint8) & 15
    return halves[:, ::2] | halves[:, 1::2] << 4


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes int8 [F,D] -> int32 [F,D*bits/32]: code j of a word lies in its bits j*bits and up. Raises InputError."""
    _check_whole(codes.shape[1], 32 // bits, "words")
    return packed(codes, bits).view("<i4")


def blocks(stored: np.ndarray, bits: int, group: int) -> np.ndarray:
    """packed uint8 [F,D*bits/8] -> uint8 [F,D/group,group*bits/8] of unsigned codes: adding 2^(bits-1) flips a bit."""
    flipped = stored ^ np.uint8({4: 0x88, 8: 0x80}[bits])
    return flipped.reshape(len(stored), -1, group * bits // 8)


def parts(fit: Callable[[], Quantised], pack: Callable[[Quantised], np.ndarray]) -> dict[str, Callable]:
    """ "codes" and "scale" -> what returns them, packed and as they are. One call of `fit` does for both.

    Files are written part by part: whichever is asked for first fits, and the other is kept until it is asked for.
    """
    made: dict[str, np.ndarray] = {}

    def part(name: str) -> np.ndarray:
        if name not in made:
            found = fit()
            made.update(codes=pack(found), scale=found.scale)
        return made.pop(name)

    return {name: partial(part, name) for name in ("codes", "scale")}


def _check_whole(columns: int, number: int, name: str) -> None:
    if columns % number:
        what, fix = f"rows of {columns} do not fill {name}", f"rows must be whole {number}s"
        raise InputError(what, where="packed weight", fix=fix)
