"""What 4 bits leave out of a head, in 4 bits more: read only of the outputs that may be chosen (plugins/cpu/refine.cpp).

W [K,N]  ~  numbers of 4 bits, stored by inputs (rows.py)  +  remainder, stored by outputs          as near as 8 bits

remainder  uint8 [N,9K'/16]     of an output: the codes of 32 inputs in 16 bytes (byte j: input j, above it input j + 16),
                                and again; then a float16 scale for each 32. K' is K made up to whole groups of 32

what an output has = scale * (code - 8)
"""

import numpy as np

from ..base.errors import InputError
from .rounding import nearest
from .scheme import Scheme

GROUP = 32
_HALF = GROUP // 2
_SCHEME = Scheme(4, GROUP, axis=1, scale=np.dtype("<f2"))
_PIECE = 1 << 22  # numbers that are rounded at a time: a head has hundreds of millions


def row_bytes(inputs: int) -> int:
    """Bytes of one output's remainder."""
    return -(-inputs // GROUP) * (_HALF + _SCHEME.scale.itemsize)


def pack_remainder(left_out: np.ndarray, name: str = "remainder") -> np.ndarray:
    """left_out [N,K], what is to be added to the numbers of 4 bits -> uint8 [N,row_bytes(K)]. Raises InputError: not finite."""
    outputs, inputs = left_out.shape
    stored, step = np.empty((outputs, row_bytes(inputs)), np.uint8), max(1, _PIECE // max(inputs, 1))
    for begin in range(0, outputs, step):
        piece = left_out[begin : begin + step]
        made = nearest(np.pad(piece, ((0, 0), (0, -inputs % GROUP))), _SCHEME, name)
        codes = made.unsigned()[0].reshape(len(piece), -1, 2, _HALF)
        both = codes[:, :, 0] | codes[:, :, 1] << 4
        scale = np.ascontiguousarray(made.scale).view(np.uint8)
        stored[begin : begin + step] = np.concatenate([both.reshape(len(piece), -1), scale], axis=1)
    return stored


def unpack_remainder(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N,w] -> codes uint8 [N,K'], scale float16 [N,K'/32]. Raises InputError for rows of another width."""
    each = _HALF + _SCHEME.scale.itemsize
    if stored.ndim != 2 or stored.dtype != np.uint8 or stored.shape[1] % each:
        what = f"it is {stored.dtype} {list(stored.shape)}"
        raise InputError(what, where="remainder", fix=f"give uint8 [N, a multiple of {each}]")
    groups = stored.shape[1] // each
    both = stored[:, : groups * _HALF].reshape(len(stored), groups, _HALF)
    codes = np.stack([both & 15, both >> 4], axis=2).reshape(len(stored), groups * GROUP)
    return codes, np.ascontiguousarray(stored[:, groups * _HALF :]).view(_SCHEME.scale)


def numbers(stored: np.ndarray) -> np.ndarray:
    """uint8 [N,w] -> float32 [N,K']: what is added to the numbers of 4 bits."""
    codes, scale = unpack_remainder(stored)
    return (codes.astype(np.float32) - 8) * np.repeat(scale.astype(np.float32), GROUP, axis=1)
