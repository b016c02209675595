"""Image tokens by what attention really takes from them: the mass they receive times the length of their value rows.

    score(t) = round(2^30 m_t / max m)      m_t = sum over heads h of p_ht ||v_ht||

A token that everybody looks at and that says nothing (an attention sink) has a short value row: `attention` keeps it,
this does not. Value-aware token pruning, VATP (arXiv 2406.12335, section 3), there for the KV cache of text.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._attention import by_value, by_value_text, received, received_text
from .._torch import torch

WIRES = ("q", "k", "v", "mask", "vote")
ATTRIBUTES = ("scale",)
_ONE = 2.0**30


def score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, vote: torch.Tensor, scale: float
) -> torch.Tensor:
    """[B,S] int64; q [B,H,S,d], k and v [B,Hk,S,d] after RoPE, mask [B,1,S,S] additive, vote [B,S] float32."""
    return torch.floor(by_value(received(q, k, mask, vote, scale), v) * _ONE + 0.5).long()


FUNCTION = function(f"""
    ValueTokens <scale> (q, k, v, mask, vote) => (score) {{
        {received_text("received")}
        {by_value_text("relevance", "received")}
        unit = Constant <value = double {{{_ONE}}}> ()
        fine = Mul (relevance, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
