"""Image tokens that drive the same neurons as the question.

    score(t) = round((1 + mean cosine of z_t with the voters' z) 2^30)      z: FFN activations of layer l-1

The smooth form of the paper's overlap (CoreMatching, arXiv 2505.19235, section 3): directions instead of sets. The
voters should be the text after the picture; a question asked before it cannot have seen the image.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._direction import UNIT, alike, alike_text
from .._torch import torch

WIRES = ("z", "vote")
ATTRIBUTES = ()


def score(z: torch.Tensor, vote: torch.Tensor) -> torch.Tensor:
    """[B,S] int64, at least 0; z [B,S,F] float32, vote [B,S] float32 (1: the token votes)."""
    return torch.floor((1.0 + alike(z, vote)).clamp_min(0.0) * UNIT + 0.5).long()


FUNCTION = function(f"""
    AnchorTokens (z, vote) => (score) {{
        one = Constant <value = double {{1.0}}> ()
        zero = Constant <value = double {{0.0}}> ()
        half = Constant <value = double {{0.5}}> ()
        unit = Constant <value = double {{{UNIT}}}> ()
        {alike_text("alike", "z", "vote")}
        moved = Add (one, alike)
        positive = Max (moved, zero)
        fine = Mul (positive, unit)
        raised = Add (fine, half)
        whole = Floor (raised)
        score = Cast <to = 7> (whole)
    }}""")
