"""Relevance times diversity: each next image token is used by attention and has a key unlike those already taken.

    score(t) = round(2^30 r_t distance when taken)      r_t: as `value`, 1 for the best      distance: as `spread_keys`

The two factors of CDPruner (arXiv 2506.10967) and SIEVE, taken one token after the other as in DivPrune.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._attention import by_value, by_value_text, received, received_text
from .._farthest import farthest, farthest_text
from .._torch import torch

WIRES = ("q", "k", "v", "mask", "vote", "image_mask")
ATTRIBUTES = ("scale",)


def score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    vote: torch.Tensor,
    image_mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[B,S] int64, at least 0; wires as those of `value` and `spread_keys`."""
    relevance = torch.where(image_mask, by_value(received(q, k, mask, vote, scale), v), 0.0)
    relevance = relevance / relevance.amax(1, keepdim=True).clamp_min(1e-30)
    return farthest(k.transpose(1, 2).flatten(2), image_mask, relevance)


FUNCTION = function(f"""
    DiverseTokens <scale> (q, k, v, mask, vote, image_mask) => (score) {{
        {received_text("received")}
        {by_value_text("of_all", "received")}
        of_image = Where (image_mask, of_all, zero)
        best_image = ReduceMax <keepdims = 1> (of_image, axis_1)
        best_image_safe = Max (best_image, least)
        relevance = Div (of_image, best_image_safe)
        by_token = Transpose <perm = [0, 2, 1, 3]> (k)
        key_shape = Concat <axis = 0> (batch, prompt, rest)
        keys = Reshape (by_token, key_shape)
        {farthest_text("score", "keys", "relevance")}
    }}""")
