"""Neurons by the prompt's energy and by what the model needs in general, ranks added: GLASS as published.

    score(n) = -((1 - mix) rank(energy_n d_n) + mix rank(prior_n d_n))       rank 0 = largest; d = ||W_down[n]||^2

GLASS (arXiv 2508.14302, section 3; there without d). Ranks forget how much stronger one neuron is than the next; `glass`
adds shares instead.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._energy import energy_share, energy_share_text
from .._rank import dense_rank, dense_rank_text
from .._torch import torch

WIRES = ("z", "weight", "prior", "down_energy")
ATTRIBUTES = ("mix",)


def score(
    z: torch.Tensor, weight: torch.Tensor, prior: torch.Tensor, down_energy: torch.Tensor, mix: float
) -> torch.Tensor:
    """[B,F] float32; z [B,S,F] and weight [B,S] float32 as in griffin, prior [F] and down_energy [F] float32."""
    part = torch.tensor(mix, dtype=torch.float32).double()
    local = dense_rank((energy_share(z, weight) * down_energy.double()).float())
    general = dense_rank((prior * down_energy)[None])
    return -((1 - part) * local.double() + part * general.double()).float()


FUNCTION = function(f"""
    GlassRankNeurons <mix> (z, weight, prior, down_energy) => (score) {{
        {energy_share_text("sum")}
        one = Constant <value = double {{1.0}}> ()
        part32 = Constant <value_float: float = @mix> ()
        part = Cast <to = 11> (part32)
        rest = Sub (one, part)
        down64 = Cast <to = 11> (down_energy)
        weighed = Mul (sum, down64)
        local_value = Cast <to = 1> (weighed)
        {dense_rank_text("local", "local_value")}
        general_row = Mul (prior, down_energy)
        axis_0 = Constant <value_ints = [0]> ()
        general_value = Unsqueeze (general_row, axis_0)
        {dense_rank_text("general", "general_value")}
        local64 = Cast <to = 11> (local)
        general64 = Cast <to = 11> (general)
        of_prompt = Mul (rest, local64)
        of_prior = Mul (part, general64)
        fused = Add (of_prompt, of_prior)
        fused32 = Cast <to = 1> (fused)
        score = Neg (fused32)
    }}""")
