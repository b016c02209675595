"""Image tokens that look unlike the rest of the picture: what is everywhere needs to be said only once.

    score(t) = round((1 - mean cosine of embedding t with all image tokens) 2^30)

Read from the image embeddings, before the language model: neither question nor layer matters. DivPrune (arXiv 2503.02175)
and CDPruner (arXiv 2506.10967) also choose by dissimilarity, one token after the other; this is one pass, in any runtime.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._direction import UNIT, alike, alike_text
from .._torch import torch

WIRES = ("embeds", "image_mask")
ATTRIBUTES = ()


def score(embeds: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """[B,S] int64, at least 0; embeds [B,S,D] float32 before the first layer, image_mask [B,S] bool."""
    return torch.floor((1.0 - alike(embeds, image_mask.float())).clamp_min(0.0) * UNIT + 0.5).long()


FUNCTION = function(f"""
    DistinctTokens (embeds, image_mask) => (score) {{
        one = Constant <value = double {{1.0}}> ()
        zero = Constant <value = double {{0.0}}> ()
        half = Constant <value = double {{0.5}}> ()
        unit = Constant <value = double {{{UNIT}}}> ()
        image = Cast <to = 1> (image_mask)
        {alike_text("alike", "embeds", "image")}
        unlike = Sub (one, alike)
        positive = Max (unlike, zero)
        fine = Mul (positive, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
