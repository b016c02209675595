"""The attention that every token receives from the voters, head by head: behind `attention`, `value` and `diverse`.

    p_ht = mean over voting tokens r of softmax(scale q_rh . k_th + mask_rt)

Computed in float64, because a score must fall on the same integer in every runtime and float32 softmax sums differ in
the seventh digit. Rows that do not vote are never computed.
"""

from __future__ import annotations

from ._torch import torch


def received(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, vote: torch.Tensor, scale: float) -> torch.Tensor:
    """[B,H,S] float64; q [B,H,S,d] and k [B,Hk,S,d] after RoPE, mask [B,1,S,S] additive, vote [B,S] float32 (1: votes).

    For a later question q, the rows of mask, and vote are those of its own tokens.
    """
    heads = q.shape[1]
    factor = torch.tensor(scale, dtype=torch.float32).double()  # as the graph reads it
    rows = vote.amax(0).nonzero()[:, 0]
    votes = vote[:, None, rows, None].double()
    shared_k = k.double().repeat_interleave(heads // k.shape[1], dim=1)
    logits = q[:, :, rows].double() * factor @ shared_k.mT + torch.where(votes > 0, mask[:, :, rows].double(), 0.0)
    return (votes * logits.softmax(-1)).sum(2) / vote.double().sum(1).clamp_min(1.0)[:, None, None]


def by_value(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B,S] float64 in 0..1: sum over heads of p [B,H,S] times the length of v [B,Hk,S,d], the largest of a row being 1."""
    v = v.double()
    length = (v * v).sum(-1).sqrt().repeat_interleave(p.shape[1] // v.shape[1], dim=1)
    moved = (p * length).sum(1)
    return moved / moved.amax(1, keepdim=True).clamp_min(1e-30)


def received_text(out: str) -> str:
    """The nodes that compute `out` = received(q, k, mask, vote, @scale); they also define zero, one, half and axis_1."""
    return f"""
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        axis_2 = Constant <value_ints = [2]> ()
        rest = Constant <value_ints = [-1]> ()
        zero = Constant <value = double {{{0.0}}}> ()
        one = Constant <value = double {{{1.0}}}> ()
        half = Constant <value = double {{{0.5}}}> ()
        scale32 = Constant <value_float: float = @scale> ()
        scale64 = Cast <to = 11> (scale32)

        any_vote = ReduceMax <keepdims = 0> (vote, axis_0)
        any_rows = NonZero (any_vote)
        rows = Squeeze (any_rows, axis_0)
        q_rows = Gather <axis = 2> (q, rows)
        mask_rows = Gather <axis = 2> (mask, rows)
        vote_rows = Gather <axis = 1> (vote, rows)
        votes = Cast <to = 11> (vote_rows)

        # query heads of one key head lie side by side: [B,H,R,d] is [B,Hk,H/Hk*R,d]
        batch = Shape <start = 0, end = 1> (q)
        heads = Shape <start = 1, end = 2> (q)
        key_heads = Shape <start = 1, end = 2> (k)
        size = Shape <start = 3> (q)
        voters = Shape (rows)
        prompt = Shape <start = 2, end = 3> (k)
        group = Div (heads, key_heads)
        group_rows = Mul (group, voters)
        q_shape = Concat <axis = 0> (batch, key_heads, group_rows, size)
        logit_shape = Concat <axis = 0> (batch, heads, voters, prompt)
        q64 = Cast <to = 11> (q_rows)
        q_scaled = Mul (q64, scale64)
        q_grouped = Reshape <allowzero = 1> (q_scaled, q_shape)
        k64 = Cast <to = 11> (k)
        k_t = Transpose <perm = [0, 1, 3, 2]> (k64)
        product = MatMul (q_grouped, k_t)
        logits = Reshape <allowzero = 1> (product, logit_shape)

        # a padding row may be masked everywhere; where it does not vote its mask is dropped, so it cannot make NaN
        is_vote = Greater (votes, zero)
        is_vote_1 = Unsqueeze (is_vote, axis_1)
        is_vote_col = Unsqueeze (is_vote_1, rest)
        mask64 = Cast <to = 11> (mask_rows)
        own_mask = Where (is_vote_col, mask64, zero)
        masked = Add (logits, own_mask)
        attention = Softmax <axis = -1> (masked)
        votes_1 = Unsqueeze (votes, axis_1)
        vote_row = Unsqueeze (votes_1, axis_1)
        summed_row = MatMul (vote_row, attention)
        summed = Squeeze (summed_row, axis_2)
        vote_count = ReduceSum <keepdims = 1> (votes_1, rest)
        voted = Max (vote_count, one)
        {out} = Div (summed, voted)"""


def by_value_text(out: str, p: str) -> str:
    """The nodes that compute `out` = by_value(p, v), after received_text in the same function."""
    return f"""
        least = Constant <value = double {{1e-30}}> ()
        v64 = Cast <to = 11> (v)
        v_squares = Mul (v64, v64)
        v_square = ReduceSum <keepdims = 0> (v_squares, rest)
        v_length = Sqrt (v_square)
        # [B,Hk,S] -> [B,H,S]: every value head once for each of its query heads
        v_length_1 = Unsqueeze (v_length, axis_2)
        v_grouped = Concat <axis = 0> (batch, key_heads, group, prompt)
        v_repeated = Expand (v_length_1, v_grouped)
        v_flat = Concat <axis = 0> (batch, heads, prompt)
        v_per_head = Reshape <allowzero = 1> (v_repeated, v_flat)
        p_by_v = Mul ({p}, v_per_head)
        moved = ReduceSum <keepdims = 0> (p_by_v, axis_1)
        most = ReduceMax <keepdims = 1> (moved, axis_1)
        divisor = Max (most, least)
        {out} = Div (moved, divisor)"""
