"""Weights -> codes and scales. Every function here that makes them is a `Quantiser`.

    nearest         scale = max |w| of the group / 7 (127)                      code = round(w / scale)
    least_squares   scale = (w of largest |w|) / -8 (-128) * .6, .65 .. 1.1     the one with the least squared error

A quantiser that needs more than the weight, such as what its inputs look like, is a function that takes this and returns
a `Quantiser`.
"""

from collections.abc import Callable

import numpy as np

from ..base.errors import InputError
from .scheme import Quantised, Scheme

# (weight [F,D] of any float type, scheme, the weight's name for errors) -> what is stored. Raises InputError.
Quantiser = Callable[[np.ndarray, Scheme, str], Quantised]
_FACTORS = np.linspace(0.6, 1.1, 11, dtype=np.float32)


def nearest(weight: np.ndarray, scheme: Scheme, name: str = "weight") -> Quantised:
    """Symmetric, to the nearest code: off by half a step at most. A group of zeros has scale 1.

    Weights are rounded against the scale as it is stored, and the lowest code is used only where rounding the scale down
    makes it the nearest.
    """
    groups, along = _grouped(weight, scheme, name), scheme.axis + 1
    highest = -scheme.lowest - 1
    with np.errstate(over="ignore"):
        scale = (np.abs(groups).max(along, keepdims=True) / highest).astype(scheme.scale)
    scale[scale.astype(np.float32) == 0] = 1
    _check_finite(scale, f"a scale does not fit into {scheme.scale}", name, "keep the weights in bf16 or fp32")
    codes = np.clip(np.rint(groups / scale.astype(np.float32)), scheme.lowest, highest).astype(np.int8)
    return Quantised(codes.reshape(weight.shape), scale.squeeze(along), scheme)


def least_squares(weight: np.ndarray, scheme: Scheme, name: str = "weight") -> Quantised:
    """The best of 11 scales in squared error; scales may be negative. Weights below 1e-18 count as noise.

    The value that is largest in magnitude takes the side that has one code more.
    """
    groups, along = _grouped(weight, scheme, name), scheme.axis + 1
    lowest, highest = scheme.lowest, -scheme.lowest - 1
    peak = np.take_along_axis(groups, np.expand_dims(np.abs(groups).argmax(along), along), along)
    least = np.full(peak.shape, np.inf, np.float32)
    scale, codes = np.ones_like(peak), np.zeros(groups.shape, np.int8)
    for factor in _FACTORS:
        with np.errstate(over="ignore", invalid="ignore"):
            step = (peak * (factor / lowest)).astype(scheme.scale).astype(np.float32)
            step = np.where(np.abs(step) < 1e-30, np.float32(1), step)
            tried = np.clip(np.rint(groups / step), lowest, highest)
            error = np.square(tried * step - groups).sum(along, keepdims=True)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, step, scale)
        codes = np.where(better, tried.astype(np.int8), codes)
    _check_finite(least, "a weight is too large for its error to be squared", name, "check the checkpoint")
    return Quantised(codes.reshape(weight.shape), scale.squeeze(along).astype(scheme.scale), scheme)


def _grouped(weight: np.ndarray, scheme: Scheme, name: str) -> np.ndarray:
    """[F,D] -> float32 [F,D/group,group] or, with axis 0, [F/group,group,D]. Raises InputError for what has no scale."""
    scheme.scale_shape(weight.shape)
    axis, shape = scheme.axis, list(weight.shape)
    shape[axis : axis + 1] = [shape[axis] // scheme.group, scheme.group]
    groups = weight.astype(np.float32, copy=False).reshape(shape)
    _check_finite(groups, "a weight is not finite", name, "check the checkpoint")
    return groups


def _check_finite(values: np.ndarray, what: str, name: str, fix: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(what, where=name, fix=fix)
