"""Low-bit weights of CoreFFN: numbers -> int32 words and one scale per group of columns, and back.

    w[F,D] -> scale[F,D/g] = max|w| of the group / (2^(bits-1) - 1),  q = round(w / scale)
    8 int4 (4 int8) to a word: element j of a word lies in its bits [j*bits, (j+1)*bits), two's complement

TensorRT takes int32 constants into any plugin, int4 and int8 only into layers of its own: hence the words.
"""

import numpy as np

from cm_export.quant.error import numbers
from cm_export.quant.packing import words
from cm_export.quant.rounding import nearest
from cm_export.quant.scheme import Scheme


def quantize(weights: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [F,D] -> (words int32 [F,D*bits/32], scales [F,D/group] in the weights' type). Raises InputError."""
    found = nearest(weights, Scheme(bits, group, scale=weights.dtype), "CoreFFN weights")
    return words(found.codes, bits), found.scale


def unpack(stored: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The inverse up to rounding: words [F,W] and scales [F,D/g] -> float32 [F,D]."""
    group = stored.shape[1] * 32 // bits // scales.shape[1]
    return numbers(stored, scales, Scheme(bits, group))
