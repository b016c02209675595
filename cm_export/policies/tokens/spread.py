"""Image tokens that cover the picture: one after the other, the one whose embedding is most unlike those already taken.

    score(t) = round(2^30 distance when taken)      distance = 1 - cosine with the nearest taken embedding

DivPrune (arXiv 2503.02175, algorithm 1): max-min diversity. It needs no layer, so it can also choose before the first
one (recipe: tokens.first). `distinct` is the same idea without the order: there, two alike tokens are both distinct.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._farthest import farthest, farthest_text
from .._torch import torch

WIRES = ("embeds", "image_mask")
ATTRIBUTES = ()


def score(embeds: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """[B,S] int64, at least 0; embeds [B,S,D] float32 before the first layer, image_mask [B,S] bool."""
    return farthest(embeds, image_mask)


FUNCTION = function(f"""
    SpreadTokens (embeds, image_mask) => (score) {{
        {farthest_text("score", "embeds")}
    }}""")
