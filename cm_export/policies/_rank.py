"""Ranks that equal values share, the same in torch and in ONNX however a sort breaks ties.

3.0  5.0  3.0  9.0   ->   2  1  2  0          how many different values are larger
"""

from __future__ import annotations

from ._torch import torch


def dense_rank(value: torch.Tensor) -> torch.Tensor:
    """[B,F] int64 of value [B,F]; no NaN."""
    ordered, ids = value.sort(dim=-1, descending=True)
    steps = (ordered[:, 1:] != ordered[:, :-1]).long().cumsum(-1)
    rank = torch.cat([torch.zeros_like(steps[:, :1]) if steps.shape[1] else ids * 0, steps], -1)
    return torch.empty_like(ids).scatter_(-1, ids, rank)


def dense_rank_text(out: str, value: str) -> str:
    """The nodes that compute `out` [B,F] int64 = dense_rank(value [B,F] float)."""
    return f"""
        {out}_zero = Constant <value_ints = [0]> ()
        {out}_one = Constant <value_ints = [1]> ()
        {out}_back = Constant <value_ints = [-1]> ()
        {out}_width = Shape <start = -1> ({value})
        {out}_ordered, {out}_ids = TopK <axis = -1, sorted = 1> ({value}, {out}_width)
        {out}_later = Slice ({out}_ordered, {out}_one, {out}_width, {out}_one)
        {out}_earlier = Slice ({out}_ordered, {out}_zero, {out}_back, {out}_one)
        {out}_same = Equal ({out}_later, {out}_earlier)
        {out}_differs = Not ({out}_same)
        {out}_step = Cast <to = 7> ({out}_differs)
        {out}_axis = Squeeze ({out}_one)
        {out}_steps = CumSum ({out}_step, {out}_axis)
        {out}_rows = Shape <start = 0, end = 1> ({value})
        {out}_column = Concat <axis = 0> ({out}_rows, {out}_one)
        {out}_first = Expand ({out}_zero, {out}_column)
        {out}_rank = Concat <axis = 1> ({out}_first, {out}_steps)
        {out} = ScatterElements <axis = 1> ({out}_ids, {out}_ids, {out}_rank)"""
