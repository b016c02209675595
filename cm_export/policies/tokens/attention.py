"""Image tokens by the attention they receive: the control from the literature.

    p_t = mean over heads h and voting tokens r of softmax(scale q_rh . k_th + mask_rt)      score(t) = round(p_t 2^30)

FastV (arXiv 2403.06764, section 4). Computed in float64, because the score must fall on the same integer in every
runtime and float32 softmax sums differ in the seventh digit. Rows that do not vote are never computed.
"""

import torch

from ...onnx_text import function

WIRES = ("q", "k", "mask", "vote")
ATTRIBUTES = ("scale",)
_ONE = 2.0**30


def score(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, vote: torch.Tensor, scale: float) -> torch.Tensor:
    """[B,S] int64; q [B,H,S,d] and k [B,Hk,S,d] after RoPE, mask [B,1,S,S] additive, vote [B,S] float32 (1: votes)."""
    heads = q.shape[1]
    scale = torch.tensor(scale, dtype=torch.float32).double()
    rows = vote.amax(0).nonzero()[:, 0]
    votes = vote[:, None, rows, None].double()
    shared_k = k.double().repeat_interleave(heads // k.shape[1], dim=1)
    logits = q[:, :, rows].double() * scale @ shared_k.mT + torch.where(votes > 0, mask[:, :, rows].double(), 0.0)
    received = (votes * logits.softmax(-1)).sum((1, 2))
    share = received / (heads * vote.double().sum(1, keepdim=True)).clamp_min(1.0)
    return torch.floor(share * _ONE + 0.5).long()


FUNCTION = function(f"""
    AttentionTokens <scale> (q, k, mask, vote) => (score) {{
        axis_0 = Constant <value_ints = [0]> ()
        axis_1 = Constant <value_ints = [1]> ()
        rest = Constant <value_ints = [-1]> ()
        zero = Constant <value = double {{0.0}}> ()
        one = Constant <value = double {{1.0}}> ()
        half = Constant <value = double {{0.5}}> ()
        unit = Constant <value = double {{{_ONE}}}> ()
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
        prompt = Shape <start = 1> (vote)
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
        all_heads = ReduceSum <keepdims = 0> (attention, axis_1)
        vote_row = Unsqueeze (votes, axis_1)
        received_row = MatMul (vote_row, all_heads)
        received = Squeeze (received_row, axis_1)
        vote_count = ReduceSum <keepdims = 1> (votes, axis_1)
        heads64 = Cast <to = 11> (heads)
        summands = Mul (vote_count, heads64)
        divisor = Max (summands, one)
        share = Div (received, divisor)
        fine = Mul (share, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
