"""How a weight of the portable backend becomes codes: the one place that picks a quantiser.

    W [K,N] by inputs, bits, group, what is known of its inputs  ->  Quantised: codes [Kp,N], scale and zero [Kp/group,N]

Kp is K made up to whole groups with rows of zeros, which are stored exactly. The more is known of the inputs, the closer:

    nothing          least squares of the weights
    `square`         of the outputs, as if inputs were independent of each other (AWQ's and llama.cpp's importance)
    `gram`           GPTQ: of the outputs, each input's error taken up by the inputs after it

docs/precision.md has what each is worth.
"""

from dataclasses import dataclass

import numpy as np

from ..base.errors import InputError
from .compensate import compensated
from .rounding import Quantiser, least_squares, weighted
from .scheme import Quantised, Scheme

HALF = np.dtype(np.float16)


def by_inputs(bits: int, group: int, symmetric: bool = False) -> Scheme:
    """The scheme of weights [K,N] whose groups lie along the inputs, with 16-bit scales. Raises InputError."""
    return Scheme(bits, group, axis=0, scale=HALF, symmetric=symmetric)


# Precision of a build -> part of the decoder -> how its weights are stored; `attention` is q, k and o, `value` is v.
# docs/precision.md has the figures. v is small, and its 8 bits take a quarter off the KL of 4 bits for a tenth of a bit;
# zeros take a fifth off for a quarter of a bit; groups longer than 32 cost more than they save.
_EIGHT, _FOUR = by_inputs(8, 32, symmetric=True), by_inputs(4, 32)
STORED = {
    "int8": {"ffn": _EIGHT, "attention": _EIGHT, "value": _EIGHT, "head": _EIGHT},
    "int4": {"ffn": _FOUR, "attention": _FOUR, "value": _EIGHT, "head": _EIGHT},
}


@dataclass(frozen=True)
class Inputs:
    """What calibration saw of the inputs x [T,K] of a product. Either may be unknown."""

    square: np.ndarray | None = None  # mean of x^2, [K]
    gram: np.ndarray | None = None  # X^T X [K,K], in any unit

    @classmethod
    def of(cls, x: np.ndarray) -> "Inputs":
        """Of inputs x [..,K]: every token counts, the first of a text as well, whose inputs are often by far the largest.

        Without that token compensation does harm: on SmolLM2 the KL of an FFN in 4 bits is 0.22, with it 0.08.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)
        gram = rows.T @ rows / np.float32(max(len(rows), 1))
        return cls(np.diagonal(gram).copy(), gram)


UNKNOWN = Inputs()


def quantise(weight: np.ndarray, scheme: Scheme, name: str, inputs: Inputs = UNKNOWN) -> Quantised:
    """weight [K,N] of any float type -> what is stored of it; rows up to a whole group are zeros. Raises InputError.

    Weights with the same inputs (gate and up; q, k and v) go faster side by side, as one weight.
    """
    if weight.ndim != 2:
        raise InputError(f"a weight of shape {list(weight.shape)}", where=name, fix="give a matrix [inputs, outputs]")
    if scheme.axis != 0:
        raise InputError(f"groups along axis {scheme.axis}", where=name, fix="give a scheme of `by_inputs`")
    more = -len(weight) % scheme.group
    return _quantiser(inputs, more)(np.pad(weight, ((0, more), (0, 0))), scheme, name)


def _quantiser(inputs: Inputs, more: int) -> Quantiser:
    """The closest quantiser for what is known of the inputs, of which `more` are zeros that fill the last group."""
    if inputs.gram is not None:
        return compensated(np.pad(inputs.gram, (0, more)))
    if inputs.square is not None:
        return weighted(np.pad(inputs.square, (0, more)))
    return least_squares
