"""What `engine.precision` stands for: the type of products, and which weights are stored in how many bits.

name   products   packed weights                     bits, scale          most weights to a scale
fp16   float16    -
bf16   bfloat16   -
fp32   float32    -
int8   float16    FFN rows of decode                 8, float16           128
int4   float16    all matrices of decoder layers     4, float16           64
"""

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from .scheme import Scheme

HALF = np.dtype(np.float16)


@dataclass(frozen=True)
class Precision:
    """`products`: of products, FFN, attention, cache and the weights that are not packed; the rest is float32."""

    products: np.dtype
    packs: Literal["", "ffn", "layers"] = ""  # nothing; FFN rows of decode; every matrix of the decoder's layers
    weights: Scheme | None = None  # of packed weights; its group is the largest that is used


PRECISIONS = {
    "fp16": Precision(HALF),
    "bf16": Precision(np.dtype(ml_dtypes.bfloat16)),
    "fp32": Precision(np.dtype(np.float32)),
    "int8": Precision(HALF, "ffn", Scheme(8, group=128, scale=HALF)),
    "int4": Precision(HALF, "layers", Scheme(4, group=64, scale=HALF)),
}
