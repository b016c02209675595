"""Image tokens that cover the picture as attention looks it up: each next one has the key most unlike those taken.

    score(t) = round(2^30 distance when taken)      distance = 1 - cosine with the nearest taken key, all heads together

DivPrune's order (arXiv 2503.02175, algorithm 1) on the keys of layer l-1 after RoPE, which hold content and place: what
is dropped has a neighbour that answers the same queries.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._farthest import farthest, farthest_text
from .._torch import torch

WIRES = ("k", "image_mask")
ATTRIBUTES = ()


def score(k: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """[B,S] int64, at least 0; k [B,Hk,S,d] float32 after RoPE, image_mask [B,S] bool."""
    return farthest(k.transpose(1, 2).flatten(2), image_mask)


FUNCTION = function(f"""
    SpreadKeysTokens (k, image_mask) => (score) {{
        by_token = Transpose <perm = [0, 2, 1, 3]> (k)
        batch_prompt = Shape <start = 0, end = 2> (by_token)
        rest = Constant <value_ints = [-1]> ()
        flat = Concat <axis = 0> (batch_prompt, rest)
        keys = Reshape (by_token, flat)
        {farthest_text("score", "keys")}
    }}""")
