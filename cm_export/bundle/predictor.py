"""The predictor of `predicted` neurons: 4-bit copies of gate and up, read for every token to choose what is read in full.

    W [F,D] float32 -> q [F,D] int4 (-8..7, packed two to a byte) and scale [F,D/g] float32        W ~ q * scale

    share of the FFN's bytes read = K/F + predictor_share        rows of 16 bits: 2/3 (4 + 32/g) / 16, .1875 for g = 64

Fitted at export time: each group of g weights of a neuron takes the scale with the least squared error. A low-rank
predictor of the same size chose worse on a real language model (docs/quality.md).
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..base.errors import InputError
from . import weights
from .names import core_row_names
from .weights import Planned, WeightFile

FILE = "predictor.safetensors"
ROW_BITS = 16  # what a weight of a row counts in shares of bytes, whatever a bundle stores: the usual deployment
_GROUPS = (64, 32, 16)
_FACTORS = np.linspace(0.6, 1.1, 11, dtype=np.float32)


def group_of(hidden: int) -> int:
    """How many weights share a scale: the largest of 64, 32, 16 that divides D. Raises InputError if none does."""
    for group in _GROUPS:
        if hidden % group == 0:
            return group
    fix = f"hidden size {hidden} is no multiple of {_GROUPS[-1]}; choose another neuron policy"
    raise InputError("policy 'predicted' cannot pack this model's rows", where="recipe: neurons.policy", fix=fix)


def predictor_share(hidden: int) -> float:
    """Bytes read to choose, as a share of the bytes of the FFN's three matrices at ROW_BITS."""
    return 2 / 3 * (4 + 32 / group_of(hidden)) / ROW_BITS


def quantize(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [F,D] float32 -> q [F,D] int8 in -8..7 and scale [F,D/group] float32: least squared error per group."""
    blocks = weight.reshape(len(weight), -1, group)
    # The value largest in magnitude takes the side that has eight levels.
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    best = np.full(peak.shape, np.inf, np.float32)
    scale, q = np.ones_like(peak), np.zeros(blocks.shape, np.int8)
    for factor in _FACTORS:
        step = peak * (factor / -8)
        step = np.where(np.abs(step) < 1e-30, np.float32(1), step)
        tried = np.clip(np.rint(blocks / step), -8, 7)
        error = np.square(tried * step - blocks).sum(-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, step, scale)
        q = np.where(better, tried.astype(np.int8), q)
    return q.reshape(weight.shape), scale[..., 0]


def pack(q: np.ndarray) -> np.ndarray:
    """q [F,D] int8 in -8..7 -> [F,D/2] uint8, the earlier value in the low half: how ONNX stores int4."""
    nibbles = (q & 15).astype(np.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """[F,D/2] uint8 -> [F,D] int8: the way back, written on its own so that it can tell a wrong `pack`."""
    out = np.empty((len(packed), 2 * packed.shape[1]), np.int8)
    out[:, 0::2] = (packed << 4).astype(np.uint8).view(np.int8) >> 4
    out[:, 1::2] = packed.view(np.int8) >> 4
    return out


def copy_error(copies: WeightFile, file: WeightFile, family: ModuleType, shape: Any) -> tuple[float, str]:
    """The worst copy's distance from its matrix (root of summed squares, relative) and its name; rounding gives about .1.

    Row norms are not rounded: where one is off by more than a thousandth, the distance is infinite.
    """
    worst, where = -1.0, ""
    for layer, (gate, up, down) in enumerate(core_row_names(family, shape.layers)):
        own = names(layer)
        if not np.allclose(copies[own["norm"]], np.linalg.norm(file[down].astype(np.float64), axis=1), rtol=1e-3):
            return float("inf"), own["norm"]
        pairs = {}
        for part, source in (("gate", gate), ("up", up)):
            scale = copies[own[f"{part}_scale"]]
            q = unpack(copies[own[part]]).reshape(*scale.shape, -1)
            pairs[own[part]] = ((q * scale[..., None]).reshape(shape.ffn, -1), file[source])
        for name, (ours, theirs) in pairs.items():
            error = float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))
            if not error <= worst:  # also takes nan
                worst, where = error, name
    return worst, where


def names(layer: int) -> dict[str, str]:
    """Names in the predictor file of one layer's parts: gate, gate_scale, up, up_scale, norm."""
    return {part: f"predictor.{layer}.{part}" for part in ("gate", "gate_scale", "up", "up_scale", "norm")}


def tensors(file: WeightFile, family: ModuleType, shape: Any) -> list[Planned]:
    """The predictor of every layer, made when it is read, from the rows of the weight file. Raises InputError."""
    group, out = group_of(shape.hidden), []
    kinds = {
        "": (np.dtype("u1"), (shape.ffn, shape.hidden // 2)),
        "_scale": (np.dtype("<f4"), (shape.ffn, shape.hidden // group)),
    }
    for layer, (gate, up, down) in enumerate(core_row_names(family, shape.layers)):
        own, made = names(layer), {}  # both parts of a matrix come from one fit

        def read(source: str, part: str, made: dict = made) -> list[np.ndarray]:
            if source not in made:
                q, scale = quantize(np.asarray(file[source], np.float32), group)
                made[source] = {"": pack(q), "_scale": scale}
            return [made[source].pop(part)]

        for name, source in (("gate", gate), ("up", up)):
            for part, (dtype, size) in kinds.items():
                out.append(Planned(own[name + part], dtype, size, lambda s=source, p=part, r=read: r(s, p)))
        out.append(Planned(own["norm"], np.dtype("<f4"), (shape.ffn,), lambda d=down: [row_norms(file[d])]))
    return out


def write(path: Path, file: WeightFile, family: ModuleType, shape: Any) -> str:
    """Fit and write the predictor of a weight file; returns the sha256. Raises InputError."""
    return weights.write(path, tensors(file, family, shape))


def row_norms(down: np.ndarray) -> np.ndarray:
    """[F] float32: ||W_down[n]||, W_down [F,D]: what a unit of z is worth to the hidden state."""
    return np.sqrt(np.square(down.astype(np.float64)).sum(1)).astype(np.float32)
