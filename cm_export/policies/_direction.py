"""How alike tokens are: cosines in float64, rounded to whole numbers, so that every runtime ranks them alike.

    unit_t = x_t / ||x_t||        mean direction m = sum_t w_t unit_t / sum_t w_t        alike(t) = unit_t . m   in [-1, 1]

The mean of the cosines with many tokens is the product with their mean direction: no [S,S] matrix is needed.
"""

from __future__ import annotations

from ._torch import torch

UNIT = 2.0**30  # a cosine of one, as a whole number
_NOTHING = 2.0**-100  # a token at or below this squared length has no direction


def unit(x: torch.Tensor) -> torch.Tensor:
    """x [B,S,N] float32 at length one in float64; a token without direction is 0."""
    x = x.double()
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(square > _NOTHING, x / square.clamp_min(_NOTHING).sqrt(), 0.0)


def alike(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B,S] float64: mean cosine of each token with the weighted ones; x [B,S,N] float32, weight [B,S] float32."""
    directions, weight = unit(x), weight.double()
    total = weight.sum(1, keepdim=True)
    mean = weight[:, None] @ directions / total.clamp_min(1.0)[..., None]
    return (directions @ mean.mT).squeeze(-1)


def unit_text(out: str, x: str) -> str:
    """The nodes that compute `out` = unit(x)."""
    return f"""
        {out}_axis = Constant <value_ints = [-1]> ()
        {out}_zero = Constant <value = double {{0.0}}> ()
        {out}_nothing = Constant <value = double {{{_NOTHING!r}}}> ()
        {out}_x = Cast <to = 11> ({x})
        {out}_squares = Mul ({out}_x, {out}_x)
        {out}_square = ReduceSum <keepdims = 1> ({out}_squares, {out}_axis)
        {out}_has = Greater ({out}_square, {out}_nothing)
        {out}_safe = Max ({out}_square, {out}_nothing)
        {out}_length = Sqrt ({out}_safe)
        {out}_quotient = Div ({out}_x, {out}_length)
        {out} = Where ({out}_has, {out}_quotient, {out}_zero)"""


def alike_text(out: str, x: str, weight: str) -> str:
    """The nodes that compute `out` = alike(x, weight); names of the enclosing function, prefixed by `out`."""
    return f"""
        {out}_axis_1 = Constant <value_ints = [1]> ()
        {out}_axis_last = Constant <value_ints = [-1]> ()
        {out}_one = Constant <value = double {{1.0}}> ()
        {unit_text(f"{out}_unit", x)}
        {out}_w = Cast <to = 11> ({weight})
        {out}_sum = ReduceSum <keepdims = 1> ({out}_w, {out}_axis_1)
        {out}_total = Max ({out}_sum, {out}_one)
        {out}_total3 = Unsqueeze ({out}_total, {out}_axis_last)
        {out}_row = Unsqueeze ({out}_w, {out}_axis_1)
        {out}_added = MatMul ({out}_row, {out}_unit)
        {out}_mean = Div ({out}_added, {out}_total3)
        {out}_mean_col = Transpose <perm = [0, 2, 1]> ({out}_mean)
        {out}_product = MatMul ({out}_unit, {out}_mean_col)
        {out} = Squeeze ({out}_product, {out}_axis_last)"""
