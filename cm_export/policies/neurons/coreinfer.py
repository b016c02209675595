"""The paper's core neurons: those that are among the strongest positive activations of the most tokens.

    score(n) = |{t : w_t > 0, z_tn > 0, z_tn in the top ceil(rho F) of z_t}|

CoreInfer (arXiv 2410.18311, section 3), CoreMatching (arXiv 2505.19235, section 3; rho = 0.2 there).
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._count import count_votes, count_votes_text
from .._torch import torch

WIRES = ("z", "weight")
ATTRIBUTES = ("rho",)
ADDS = True  # counts of two texts add up to those of both


def score(z: torch.Tensor, weight: torch.Tensor, rho: float) -> torch.Tensor:
    """[B,F] float32 whole numbers; z [B,S,F] float32, weight [B,S] float32 (0: the token does not count)."""
    return count_votes(z, weight, rho)


FUNCTION = function(f"CoreinferNeurons <rho> (z, weight) => (score) {{ {count_votes_text('score', 'weight')} }}")
