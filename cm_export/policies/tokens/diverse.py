"""Relevance times diversity: image tokens that drive the question's neurons and look unlike the rest of the picture.

    score(t) = round((1 + cosine with the question's z) (1 - cosine with the picture) 2^29)      anchor x distinct

The product that CDPruner (arXiv 2506.10967) puts into the kernel of a determinantal point process, without its greedy
selection: one pass, in any runtime.
"""

import torch

from ...onnx_text import function
from .._direction import UNIT, alike, alike_text

WIRES = ("z", "vote", "embeds", "image_mask")
ATTRIBUTES = ()


def score(z: torch.Tensor, vote: torch.Tensor, embeds: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """[B,S] int64, at least 0; z [B,S,F], vote [B,S], embeds [B,S,D] float32, image_mask [B,S] bool."""
    relevant = (1.0 + alike(z, vote)).clamp_min(0.0)
    unlike = (1.0 - alike(embeds, image_mask.float())).clamp_min(0.0)
    return torch.floor(relevant * unlike * (UNIT / 2) + 0.5).long()


FUNCTION = function(f"""
    DiverseTokens (z, vote, embeds, image_mask) => (score) {{
        one = Constant <value = double {{1.0}}> ()
        zero = Constant <value = double {{0.0}}> ()
        half = Constant <value = double {{0.5}}> ()
        unit = Constant <value = double {{{UNIT / 2}}}> ()
        {alike_text("like_question", "z", "vote")}
        moved = Add (one, like_question)
        relevant = Max (moved, zero)
        image = Cast <to = 1> (image_mask)
        {alike_text("like_picture", "embeds", "image")}
        turned = Sub (one, like_picture)
        unlike = Max (turned, zero)
        product = Mul (relevant, unlike)
        fine = Mul (product, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
