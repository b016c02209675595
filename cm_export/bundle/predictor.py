"""The predictor of `predicted` neurons: 4-bit copies of gate and up, read for every token to choose what is read in full.

    W [F,D] float32 -> q [F,D] int4 (-8..7, packed two to a byte) and scale [F,D/g] float32        W ~ q * scale

    share of the FFN's bytes read = K/F + predictor_share        rows of 16 bits: 2/3 (4 + 32/g) / 16, .1875 for g = 64

Fitted at export time: each group of g weights of a neuron takes the scale with the least squared error. A low-rank
predictor of the same size chose worse on a real language model (docs/quality.md).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.names import core_row_names
from ..families import Family, Shape
from ..quant.error import relative_error
from ..quant.groups import fitting
from ..quant.packing import packed, parts
from ..quant.rounding import least_squares
from ..quant.scheme import Quantised, Scheme
from . import weights
from .weights import Planned, WeightFile

FILE = "predictor.safetensors"
ROW_BITS = 16  # what a weight of a row counts in shares of bytes, whatever a bundle stores: the usual deployment
_MOST, _LEAST = 64, 16  # weights that share a scale; ONNX Runtime multiplies groups of 16 and up


def group_of(hidden: int) -> int:
    """How many weights share a scale: the largest of 64, 32, 16 that divides D. Raises InputError if none does."""
    where, fix = "recipe: neurons.policy 'predicted'", "choose another neuron policy"
    return fitting(hidden, "hidden size", where=where, fix=fix, most=_MOST, least=_LEAST)


def scheme(hidden: int) -> Scheme:
    """How the copies of rows of D weights are stored. Raises InputError."""
    return Scheme(4, group_of(hidden))


def predictor_share(hidden: int) -> float:
    """Bytes read to choose, as a share of the bytes of the FFN's three matrices at ROW_BITS."""
    return 2 / 3 * scheme(hidden).bits_per_weight / ROW_BITS


def copy_bytes(shape: Shape) -> float:
    """Bytes of the copies of gate and up in every layer, scales included: what is read to choose for one token."""
    return 2 * shape.layers * shape.ffn * shape.hidden * scheme(shape.hidden).bits_per_weight / 8


def copy_error(copies: WeightFile, file: WeightFile, family: Family, shape: Shape) -> tuple[float, str]:
    """The worst copy's distance from its matrix (root of summed squares, relative) and its name; rounding gives about .1.

    Row norms are not rounded: where one is off by more than a thousandth, the distance is infinite.
    """
    worst, where = -1.0, ""
    for layer, (gate, up, down) in enumerate(core_row_names(family, shape.layers)):
        own = names(layer)
        if not np.allclose(copies[own["norm"]], np.linalg.norm(file[down].astype(np.float64), axis=1), rtol=1e-3):
            return float("inf"), own["norm"]
        for part, source in (("gate", gate), ("up", up)):
            stored, scale = copies[own[part]], copies[own[f"{part}_scale"]]
            error = relative_error(file[source], stored, scale, scheme(shape.hidden))
            if error > worst:
                worst, where = error, own[part]
    return worst, where


def names(layer: int) -> dict[str, str]:
    """Names in the predictor file of one layer's parts: gate, gate_scale, up, up_scale, norm."""
    return {part: f"predictor.{layer}.{part}" for part in ("gate", "gate_scale", "up", "up_scale", "norm")}


def tensors(file: WeightFile, family: Family, shape: Shape) -> list[Planned]:
    """The predictor of every layer, made when it is read, from the rows of the weight file. Raises InputError."""
    stored, size, out = scheme(shape.hidden), (shape.ffn, shape.hidden), []
    kinds: dict[str, tuple[str, np.dtype[Any], tuple[int, ...]]] = {
        "codes": ("", np.dtype("u1"), (shape.ffn, shape.hidden * stored.bits // 8)),
        "scale": ("_scale", np.dtype("<f4"), stored.scale_shape(size)),
    }
    for layer, (gate, up, down) in enumerate(core_row_names(family, shape.layers)):
        own = names(layer)
        for name, source in (("gate", gate), ("up", up)):
            made = parts(partial(least_squares, file[source], stored, source), _packed)
            for part, (ending, dtype, dims) in kinds.items():
                out.append(Planned(own[name + ending], dtype, dims, partial(_alone, made[part])))
        norms = partial(row_norms, file[down])  # a view of the file until it is called
        out.append(Planned(own["norm"], np.dtype("<f4"), (shape.ffn,), partial(_alone, norms)))
    return out


def _alone(make: Callable[[], np.ndarray]) -> list[np.ndarray]:
    return [make()]


def _packed(copy: Quantised) -> np.ndarray:
    return packed(copy.codes, copy.scheme.bits)


def write(path: Path, file: WeightFile, family: Family, shape: Shape) -> str:
    """Fit and write the predictor of a weight file; returns the sha256. Raises InputError."""
    return weights.write(path, tensors(file, family, shape))


def row_norms(down: np.ndarray) -> np.ndarray:
    """[F] float32: ||W_down[n]||, W_down [F,D]: what a unit of z is worth to the hidden state."""
    return np.asarray(np.sqrt(np.square(down.astype(np.float64)).sum(1)), np.float32)
