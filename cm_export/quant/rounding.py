"""Weights -> codes and scales, each group on its own. Every function here that makes them is a `Quantiser`.

    symmetric
    nearest         scale = max |w| of the group / 7 (127)                      code = round(w / scale)
    least_squares   scale = (w of largest |w|) / -8 (-128) * .6, .65 .. 1.1     the one with the least squared error
    with a zero
    nearest         scale = (max(w, 0) - min(w, 0)) / 15 (255)                  code = round(w / scale) + zero
    least_squares   the same * .6, .65 .. 1.1, each then fitted to its codes    the one with the least squared error

A quantiser that needs more than the weight is a function that takes this and returns a `Quantiser`: `weighted` below
(how large the inputs are), `compensate.compensated` (how they go together).
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ..base.errors import InputError
from .scheme import Quantised, Scheme

# (weight [F,D] of any float type, scheme, the weight's name for errors) -> what is stored. Raises InputError.
Quantiser = Callable[[np.ndarray, Scheme, str], Quantised]
_FACTORS = np.linspace(0.6, 1.1, 11, dtype=np.float32)
_PIECE = 2**18  # weights that are searched at a time: what is made of them stays in a cache


def nearest(weight: np.ndarray, scheme: Scheme, name: str = "weight") -> Quantised:
    """To the nearest code: off by half a step at most. A group of zeros has scale 1.

    Weights are rounded against the scale as it is stored. Symmetric, the lowest code is used only where rounding the scale
    down makes it the nearest.
    """
    groups, along = _grouped(weight, scheme, name), scheme.axis + 1
    highest = -scheme.lowest - 1
    with np.errstate(over="ignore"):
        if scheme.symmetric:
            scale = (np.abs(groups).max(along, keepdims=True) / highest).astype(scheme.scale)
        else:
            scale = (_spread(groups, along) / (highest - scheme.lowest)).astype(scheme.scale)
    scale[scale.astype(np.float32) == 0] = 1
    _check_finite(scale, f"a scale does not fit into {scheme.scale}", name, "keep the weights in bf16 or fp32")
    step = scale.astype(np.float32)
    zero = np.zeros_like(step) if scheme.symmetric else _zero(groups, step, scheme)
    codes = np.clip(np.rint(groups / step) + zero, scheme.lowest, highest).astype(np.int8)
    return _assembled(weight, codes, scale, zero, scheme)


def least_squares(
    weight: np.ndarray, scheme: Scheme, name: str = "weight", importance: np.ndarray | None = None
) -> Quantised:
    """The best of 11 scales in squared error, by group. Weights below 1e-18 count as noise.

    Symmetric, scales may be negative: the value that is largest in magnitude takes the side that has one code more.
    `importance`: what an error counts at each place along the groups, [F] for axis 0 and [D] for axis 1, not negative.
    """
    groups, along = _grouped(weight, scheme, name), scheme.axis + 1
    counts = _counts(importance, scheme, groups.shape, name)
    try_ = _try_symmetric if scheme.symmetric else _try_with_zero
    shape = tuple(1 if axis == along else n for axis, n in enumerate(groups.shape))
    codes, scale, zero = np.empty(groups.shape, np.int8), np.empty(shape, np.float32), np.empty(shape, np.float32)
    for piece in _pieces(groups.shape, scheme.axis):
        some = groups[piece]
        part = None if counts is None else counts[piece[0] if scheme.axis == 0 else slice(None)]
        least, scale[piece], zero[piece], codes[piece] = _search(some, part, scheme, try_)
        _check_finite(least, f"a weight is too large for a scale of {scheme.scale}", name, "check the checkpoint")
    return _assembled(weight, codes, scale.astype(scheme.scale), zero, scheme)


def weighted(importance: np.ndarray) -> Quantiser:
    """`least_squares` of the outputs: the error at an input counts by that input's mean square.

    `importance`: mean x^2 of what the weight is multiplied with, one number for each place along the groups.
    """
    return partial(least_squares, importance=importance)


def _search(groups: np.ndarray, counts: np.ndarray | None, scheme: Scheme, try_: Callable) -> tuple[np.ndarray, ...]:
    """-> (least error, its scale, its zero, its codes) of every group."""
    along = scheme.axis + 1
    if scheme.symmetric:
        peak = np.take_along_axis(groups, np.expand_dims(np.abs(groups).argmax(along), along), along)
        widest = peak / scheme.lowest
    else:
        widest = _spread(groups, along) / (-1 - 2 * scheme.lowest)
    least = np.full(widest.shape, np.inf, np.float32)
    scale, zero, codes = np.ones_like(widest), np.zeros_like(widest), np.zeros(groups.shape, np.int8)
    for factor in _FACTORS:
        with np.errstate(over="ignore", invalid="ignore"):
            step, where, tried, error = try_(groups, widest * factor, counts, scheme)
        better = error < least
        least, scale, zero = (
            np.where(better, error, least),
            np.where(better, step, scale),
            np.where(better, where, zero),
        )
        codes = np.where(better, tried.astype(np.int8), codes)
    return least, scale, zero, codes


def _try_symmetric(groups: np.ndarray, step: np.ndarray, counts: np.ndarray | None, scheme: Scheme) -> tuple:
    step = _stored(step, scheme)
    tried = np.clip(np.rint(groups / step), scheme.lowest, -scheme.lowest - 1)
    return step, np.zeros_like(step), tried, _error(tried * step - groups, counts, scheme.axis + 1)


def _try_with_zero(groups: np.ndarray, step: np.ndarray, counts: np.ndarray | None, scheme: Scheme) -> tuple:
    """The scale is fitted to the codes that `step` gives, and the codes then to that scale."""
    along, step = scheme.axis + 1, _stored(step, scheme)
    zero = _zero(groups, step, scheme)
    low, high = scheme.lowest - zero, -scheme.lowest - 1 - zero
    off = np.clip(np.rint(groups / step), low, high)
    heavy = off if counts is None else off * counts
    fitted = (heavy * groups).sum(along, keepdims=True) / np.maximum((heavy * off).sum(along, keepdims=True), 1e-30)
    step = _stored(np.where(fitted > 0, fitted, step), scheme)
    off = np.clip(np.rint(groups / step), low, high)
    return step, zero, off + zero, _error(off * step - groups, counts, along)


def _stored(step: np.ndarray, scheme: Scheme) -> np.ndarray:
    """A scale as its type holds it, float32; one that is next to nothing becomes 1."""
    step = step.astype(scheme.scale).astype(np.float32)
    return np.where(np.abs(step) < 1e-30, np.float32(1), step)


def _error(off: np.ndarray, counts: np.ndarray | None, along: int) -> np.ndarray:
    squared = np.square(off)
    return (squared if counts is None else squared * counts).sum(along, keepdims=True)


def _spread(groups: np.ndarray, along: int) -> np.ndarray:
    """From the lowest to the highest weight of each group, 0 included: it must have a code."""
    return np.maximum(groups.max(along, keepdims=True), 0) - np.minimum(groups.min(along, keepdims=True), 0)


def _zero(groups: np.ndarray, step: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The code of 0 that centres the codes on the weights, so that what a narrow scale leaves out is left out on both sides."""
    along, highest = scheme.axis + 1, -scheme.lowest - 1
    low, high = np.minimum(groups.min(along, keepdims=True), 0), np.maximum(groups.max(along, keepdims=True), 0)
    centre = (low + high) / 2 / step
    return np.clip(np.rint((scheme.lowest + highest) / 2 - centre), scheme.lowest, highest)


def _assembled(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: Scheme) -> Quantised:
    along = scheme.axis + 1
    zeros = None if scheme.symmetric else zero.astype(np.int8).squeeze(along)
    return Quantised(codes.reshape(weight.shape), scale.squeeze(along), scheme, zeros)


def _grouped(weight: np.ndarray, scheme: Scheme, name: str) -> np.ndarray:
    """[F,D] -> float32 [F,D/group,group] or, with axis 0, [F/group,group,D]. Raises InputError for what has no scale."""
    scheme.scale_shape(weight.shape)
    axis, shape = scheme.axis, list(weight.shape)
    shape[axis : axis + 1] = [shape[axis] // scheme.group, scheme.group]
    groups = weight.astype(np.float32, copy=False).reshape(shape)
    _check_finite(groups, "a weight is not finite", name, "check the checkpoint")
    return groups


def _counts(importance: np.ndarray | None, scheme: Scheme, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    """importance -> as `_grouped` weights are laid out: [F/group,group,1] for axis 0, [1,D/group,group] for axis 1."""
    if importance is None:
        return None
    length = shape[scheme.axis] * shape[scheme.axis + 1]
    if importance.shape != (length,):
        what, fix = f"importance of shape {list(importance.shape)}", f"give one number for each of {length} inputs"
        raise InputError(what, where=name, fix=fix)
    _check_finite(importance, "the importance of an input is not finite", name, "check the activations")
    if (importance < 0).any():
        raise InputError("the importance of an input is negative", where=name, fix="give mean squares")
    counts = importance.astype(np.float32)
    # An input that was never seen still counts a little, or its weights would be anything. Relative: large squares overflow.
    counts = counts / max(float(counts.mean()), 1e-30) + np.float32(1e-3)
    return counts.reshape((-1, scheme.group, 1) if scheme.axis == 0 else (1, -1, scheme.group))


def _pieces(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, ...]]:
    """Parts of [A,B,C] that hold whole groups: of A, and where groups lie along B (axis 0) also of C."""
    wide = min(shape[2], max(1, _PIECE // shape[1])) if axis == 0 else shape[2]
    rows = max(1, _PIECE // max(1, shape[1] * wide))
    for row in range(0, shape[0], rows):
        for column in range(0, shape[2], max(1, wide)):
            yield slice(row, row + rows), slice(None), slice(column, column + wide)


def _check_finite(values: np.ndarray, what: str, name: str, fix: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(what, where=name, fix=fix)
