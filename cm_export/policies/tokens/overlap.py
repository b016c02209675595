"""The paper's core tokens: image tokens that drive the sentence's core neurons.

    C = the ceil(beta F) neurons with the most votes (ties: lower id)     score(t) = |{n : z_tn > 0} intersected with C|

CoreMatching (arXiv 2505.19235, section 3). The votes are those of `coreinfer`, over the tokens that vote; the neurons
are ranked by the unique integer key count * F + (F - 1 - n), so every runtime picks the same C.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._count import count_votes, count_votes_text, share_count, share_count_text
from .._torch import torch

WIRES = ("z", "vote")
ATTRIBUTES = ("rho", "beta")


def score(z: torch.Tensor, vote: torch.Tensor, rho: float, beta: float) -> torch.Tensor:
    """[B,S] int64; z [B,S,F] float32, vote [B,S] float32 (1: the token votes)."""
    width = z.shape[-1]
    key = count_votes(z, vote, rho).long() * width + torch.arange(width - 1, -1, -1, device=z.device)
    core = key.topk(share_count(beta, width), dim=-1, sorted=False).indices
    is_core = torch.zeros_like(key, dtype=torch.float32).scatter(-1, core, 1.0)
    return ((z > 0).float() @ is_core[..., None]).squeeze(-1).long()


FUNCTION = function(f"""
    OverlapTokens <rho, beta> (z, vote) => (score) {{
        {count_votes_text("votes", "vote")}
        {share_count_text("core_size", "beta", "ffn")}
        # the key's tie-break F-1-n, counted down: the lower id wins
        step = Constant <value_int = -1> ()
        width = Squeeze (ffn)
        highest = Add (width, step)
        tie_break = Range (highest, step, step)
        votes64 = Cast <to = 7> (votes)
        votes_key = Mul (votes64, ffn)
        key = Add (votes_key, tie_break)
        best, best_ids = TopK <axis = -1, sorted = 0> (key, core_size)
        least = ReduceMin <keepdims = 1> (best, axis_last)
        in_core = GreaterOrEqual (key, least)
        in_core_number = Cast <to = 1> (in_core)
        core_col = Unsqueeze (in_core_number, axis_last)
        is_active = Greater (z, zero)
        active_number = Cast <to = 1> (is_active)
        # [B,S,F] x [B,F,1]: counts below 2^24 are exact in float32
        hits = MatMul (active_number, core_col)
        hits_row = Squeeze (hits, axis_last)
        score = Cast <to = 7> (hits_row)
    }}""")
