"""How many voting tokens have a neuron among their strongest: the count behind `coreinfer` and `overlap`.

    C_rho(t) = {n : z_tn > 0 and z_tn >= the ceil(rho F)-th largest of z_t}     count_n = |{t : w_t > 0, n in C_rho(t)}|

CoreInfer (arXiv 2410.18311, section 3) and CoreMatching (arXiv 2505.19235, section 3): token-wise core neurons. Equal
activations at the border are all in the set, which needs no sorted order and so no agreement on how ties are sorted.
"""

from __future__ import annotations

import math

from ._torch import torch

# A float32 attribute cannot say 0.2 exactly; without this factor, ceil of the stored 0.2 times 10 would be 3.
_SHRINK = 1 - 2**-23


def share_count(share: float, width: int) -> int:
    """ceil(share * width) for the share as a float32 attribute stores it; 1..width for share in (0, 1]."""
    return math.ceil(torch.tensor(share, dtype=torch.float32).item() * width * _SHRINK)


def count_votes(z: torch.Tensor, weight: torch.Tensor, rho: float) -> torch.Tensor:
    """count [B,F] float32 (whole numbers) of z [B,S,F] float32 over the tokens with weight [B,S] > 0."""
    threshold = z.topk(share_count(rho, z.shape[-1]), dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return ((z >= threshold) & (z > 0) & (weight > 0)[..., None]).sum(1).to(torch.float32)


def share_count_text(out: str, attribute: str, width: str) -> str:
    """The nodes that compute `out` [1] int64 = share_count(@attribute, width [1] int64)."""
    return f"""
        {out}_share32 = Constant <value_float: float = @{attribute}> ()
        {out}_share = Cast <to = 11> ({out}_share32)
        {out}_width = Cast <to = 11> ({width})
        {out}_shrink = Constant <value = double {{{_SHRINK!r}}}> ()
        {out}_product = Mul ({out}_share, {out}_width)
        {out}_below = Mul ({out}_product, {out}_shrink)
        {out}_ceil = Ceil ({out}_below)
        {out} = Cast <to = 7> ({out}_ceil)"""


def count_votes_text(out: str, weight: str) -> str:
    """The nodes that compute `out` = count_votes(z, weight, @rho); they also define axis_0, axis_1, axis_last, zero.

    Columns in which no row of the batch votes are taken out first: the top-rho search is the dear part, and with few
    voters (the text after an image) almost all of it goes away.
    """
    return f"""
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        axis_last = Constant <value_ints = [-1]> ()
        zero = Constant <value_float = 0.0> ()
        ffn = Shape <start = -1> (z)
        {share_count_text("top", "rho", "ffn")}
        column_weight = ReduceMax <keepdims = 0> ({weight}, axis_0)
        column_rows = NonZero (column_weight)
        columns = Squeeze (column_rows, axis_0)
        column_z = Gather <axis = 1> (z, columns)
        column_w = Gather <axis = 1> ({weight}, columns)
        strongest, strongest_ids = TopK <axis = -1, sorted = 0> (column_z, top)
        threshold = ReduceMin <keepdims = 1> (strongest, axis_last)
        is_strong = GreaterOrEqual (column_z, threshold)
        is_positive = Greater (column_z, zero)
        is_core = And (is_strong, is_positive)
        core_number = Cast <to = 1> (is_core)
        is_voter = Greater (column_w, zero)
        voter_number = Cast <to = 1> (is_voter)
        voter_row = Unsqueeze (voter_number, axis_1)
        # [B,1,R] x [B,R,F]: a sum of zeros and ones, exact below 2^24
        count_row = MatMul (voter_row, core_number)
        {out} = Squeeze (count_row, axis_1)"""
