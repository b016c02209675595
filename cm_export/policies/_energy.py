"""How much of its tokens' activation energy a neuron carries: the sum behind `griffin` and `glass`.

    energy(n) = sum_t w_t (z_tn / ||z_t||_2)^2                          a token without energy adds nothing

The squares and w_t / ||z_t||^2 are float32, so their products are exact in float64, in which the sums run: runtimes
that add in different orders differ near the 16th digit, and agree again once a result is rounded to float32.
"""

from __future__ import annotations

from ._torch import torch

_NO_ENERGY = 2.0**-100  # at or below it, w / energy could leave float32


def energy_share(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B,F] float64; z [B,S,F] float32, weight [B,S] float32 (0: the token does not count)."""
    square = (z * z).double()
    energy = square.sum(-1).float()
    factor = torch.where(energy > _NO_ENERGY, weight / energy, 0.0)
    return (factor.double()[:, None] @ square).squeeze(1)


def energy_share_text(out: str) -> str:
    """The nodes that compute `out` = energy_share(z, weight); they also define axis_1 and axis_last."""
    return f"""
        axis_1 = Constant <value_ints = [1]> ()
        axis_last = Constant <value_ints = [-1]> ()
        no_weight = Constant <value_float = 0.0> ()
        no_energy = Constant <value_float = {_NO_ENERGY}> ()
        square32 = Mul (z, z)
        square = Cast <to = 11> (square32)
        energy64 = ReduceSum <keepdims = 0> (square, axis_last)
        energy = Cast <to = 1> (energy64)
        has_energy = Greater (energy, no_energy)
        quotient = Div (weight, energy)
        factor32 = Where (has_energy, quotient, no_weight)
        factor = Cast <to = 11> (factor32)
        # [B,1,S] x [B,S,F]: one pass over the squares, no second [B,S,F] tensor in float64
        factor_row = Unsqueeze (factor, axis_1)
        sum_row = MatMul (factor_row, square)
        {out} = Squeeze (sum_row, axis_1)"""
