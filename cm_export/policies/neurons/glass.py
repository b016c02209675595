"""Neurons by the prompt's energy and by what the model needs in general, shares added.

    p_n      = energy_n / sum of energies               energy as in `griffin`, of this prompt; without voters p = 0
    score(n) = ((1 - mix) p_n + mix prior_n) d_n        prior: the same share, measured on generated text; d = ||W_down[n]||^2

After GLASS (arXiv 2508.14302, section 3), which fuses ranks (`glass_rank`): a short prompt says little about a long
answer, and the prior knows the rest.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._energy import energy_share, energy_share_text
from .._torch import torch

WIRES = ("z", "weight", "prior", "down_energy")
ATTRIBUTES = ("mix",)


def score(
    z: torch.Tensor, weight: torch.Tensor, prior: torch.Tensor, down_energy: torch.Tensor, mix: float
) -> torch.Tensor:
    """[B,F] float32; z [B,S,F] and weight [B,S] float32 as in griffin, prior [F] and down_energy [F] float32."""
    part = torch.tensor(mix, dtype=torch.float32).double()
    energy = energy_share(z, weight)
    total = energy.sum(-1, keepdim=True)
    share = torch.where(total > 0, energy / total, 0.0)
    return (((1 - part) * share + part * prior.double()) * down_energy.double()).float()


FUNCTION = function(f"""
    GlassNeurons <mix> (z, weight, prior, down_energy) => (score) {{
        {energy_share_text("sum")}
        one = Constant <value = double {{1.0}}> ()
        none = Constant <value = double {{0.0}}> ()
        part32 = Constant <value_float: float = @mix> ()
        part = Cast <to = 11> (part32)
        rest = Sub (one, part)
        total = ReduceSum <keepdims = 1> (sum, axis_last)
        has_total = Greater (total, none)
        quotient64 = Div (sum, total)
        share = Where (has_total, quotient64, none)
        of_prompt = Mul (rest, share)
        prior64 = Cast <to = 11> (prior)
        of_prior = Mul (part, prior64)
        fused = Add (of_prompt, of_prior)
        down64 = Cast <to = 11> (down_energy)
        weighed = Mul (fused, down64)
        score = Cast <to = 1> (weighed)
    }}""")
