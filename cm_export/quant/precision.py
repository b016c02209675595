"""What `engine.precision` stands for: the type of products, and which weights are stored in how many bits.

name   products   packed weights                     bits, scale          most weights to a scale
fp16   float16    -
bf16   bfloat16   -
fp32   float32    -
int8   float16    FFN rows of decode                 8, float16           128
int4   float16    all matrices of decoder layers     4, float16           64

The recipe and `--help` read the names; numpy is imported when types are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from .scheme import Scheme

HALF: Literal["float16"] = "float16"


@dataclass(frozen=True)
class Precision:
    """`type`: of products, FFN, attention, cache and the weights that are not packed; the rest is float32."""

    type: Literal["float16", "bfloat16", "float32"]
    packs: Literal["", "ffn", "layers"] = ""  # nothing; FFN rows of decode; every matrix of the decoder's layers
    bits: int = 0  # of packed weights
    group: int = 0  # the most packed weights that share a scale

    @property
    def products(self) -> np.dtype:
        """`type` for numpy."""
        import ml_dtypes
        import numpy as np

        return np.dtype(ml_dtypes.bfloat16 if self.type == "bfloat16" else self.type)

    @property
    def weights(self) -> Scheme | None:
        """How packed weights are stored; None where none are."""
        from .scheme import Scheme

        return Scheme(self.bits, self.group, scale=self.products) if self.packs else None


PRECISIONS = {
    "fp16": Precision(HALF),
    "bf16": Precision("bfloat16"),
    "fp32": Precision("float32"),
    "int8": Precision(HALF, "ffn", bits=8, group=128),
    "int4": Precision(HALF, "layers", bits=4, group=64),
}
