"""Neurons by their share of each token's activation energy.

    score(n) = sum_t w_t (z_tn / ||z_t||_2)^2                          a token without energy adds nothing

GRIFFIN (arXiv 2404.01365, section 4). The squares and w_t / ||z_t||^2 are float32, so their products are exact in
float64, in which the sums run: runtimes that add in different orders differ near the 16th digit, and agree again once
the sum is rounded to float32.
"""

import torch

from ...onnx_text import function

WIRES = ("z", "weight")
ATTRIBUTES = ()
_NO_ENERGY = 2.0**-100  # at or below it, w / energy could leave float32


def score(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B,F] float32; z [B,S,F] float32, weight [B,S] float32 (0: the token does not count)."""
    square = (z * z).double()
    energy = square.sum(-1).float()
    factor = torch.where(energy > _NO_ENERGY, weight / energy, 0.0)
    return (factor.double()[:, None] @ square).squeeze(1).float()


FUNCTION = function(f"""
    GriffinNeurons (z, weight) => (score) {{
        axis_1 = Constant <value_ints = [1]> ()
        axis_last = Constant <value_ints = [-1]> ()
        zero = Constant <value_float = 0.0> ()
        no_energy = Constant <value_float = {_NO_ENERGY}> ()
        square32 = Mul (z, z)
        square = Cast <to = 11> (square32)
        energy64 = ReduceSum <keepdims = 0> (square, axis_last)
        energy = Cast <to = 1> (energy64)
        has_energy = Greater (energy, no_energy)
        quotient = Div (weight, energy)
        factor32 = Where (has_energy, quotient, zero)
        factor = Cast <to = 11> (factor32)
        # [B,1,S] x [B,S,F]: one pass over the squares, no second [B,S,F] tensor in float64
        factor_row = Unsqueeze (factor, axis_1)
        sum_row = MatMul (factor_row, square)
        sum = Squeeze (sum_row, axis_1)
        score = Cast <to = 1> (sum)
    }}""")
