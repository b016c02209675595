"""Image tokens by the attention they receive: the control from the literature.

    score(t) = round(2^30 p_t)      p_t = mean over heads and voting tokens of the attention that t receives

FastV (arXiv 2403.06764, section 4).
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._attention import received, received_text
from .._torch import torch

WIRES = ("q", "k", "mask", "vote")
ATTRIBUTES = ("scale",)
_ONE = 2.0**30


def score(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, vote: torch.Tensor, scale: float) -> torch.Tensor:
    """[B,S] int64; q [B,H,S,d] and k [B,Hk,S,d] after RoPE, mask [B,1,S,S] additive, vote [B,S] float32 (1: votes)."""
    return torch.floor(received(q, k, mask, vote, scale).mean(1) * _ONE + 0.5).long()


FUNCTION = function(f"""
    AttentionTokens <scale> (q, k, mask, vote) => (score) {{
        {received_text("received")}
        unit = Constant <value = double {{{_ONE}}}> ()
        share = ReduceMean <keepdims = 0> (received, axis_1)
        fine = Mul (share, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
