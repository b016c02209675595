"""Neurons by their share of each token's activation energy.

    score(n) = row_n sum_t w_t (z_tn / ||z_t||_2)^2            row_n = 1, or ||W_down[n]||^2 with neurons.row_norm

GRIFFIN (arXiv 2404.01365, section 4). With the norms it is the energy of what the neuron adds to the hidden state.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._energy import energy_share, energy_share_text
from .._torch import torch

WIRES = ("z", "weight", "row")
ATTRIBUTES = ()
ADDS = True  # scores of two texts add up to those of both


def score(z: torch.Tensor, weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[B,F] float32; z [B,S,F] float32, weight [B,S] float32 (0: the token does not count), row [F] float32."""
    return (energy_share(z, weight) * row.double()).float()


FUNCTION = function(f"""
    GriffinNeurons (z, weight, row) => (score) {{
        {energy_share_text("sum")}
        row64 = Cast <to = 11> (row)
        weighed = Mul (sum, row64)
        score = Cast <to = 1> (weighed)
    }}""")
