"""Policy `active` in torch: channels of x and neurons of z below a threshold are left out, beside random ones of the same number.

    keep channel i of x  if |x_i| ||(Wg, Wu)[:, i]|| >= tau_x,  z from those,  keep neuron n  if |z_n| ||Wd[n]|| >= tau_z

Shares of layers and sides are allotted by sensitivity, as a bundle's are (bundle/thresholds.py); FFNs only, the rest is dense.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cm_export.bundle.thresholds import FFN_IN, FFN_OUT, SIDES, Thresholds
from cm_export.calibrating.thresholds import HALF, LEVELS

SENSITIVITY_PROMPTS = 4  # calibration prompts whose answers the sites are measured on
Keep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Of = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # values, norm, threshold or share -> bool


class Sites:
    """The norms and thresholds of both sides of every FFN of a neuron_quality.Model."""

    def __init__(self, model: Any, xs: Sequence[torch.Tensor], prompts: Sequence[str]):
        """`xs`: of each layer, x [N,D] of calibration text."""
        self.model = model
        both = [torch.cat([m.gate_proj.weight, m.up_proj.weight]).norm(dim=0) for m in model.ffns]
        self.norms = [n for pair in zip(both, model.norms, strict=True) for n in pair]  # x, z, x, z, ..
        weights = [self._weights(i, x) for i, x in enumerate(xs)]
        sites = SIDES * len(model.ffns) + 1
        self.own = [SIDES * i + side for i in range(len(model.ffns)) for side in (FFN_IN, FFN_OUT)]
        thresholds, sizes = np.zeros((sites, len(LEVELS)), np.float32), np.ones(sites, np.float32)
        for site, found in zip(self.own, (w for pair in weights for w in pair), strict=True):
            thresholds[site, :-1] = np.quantile(found.numpy(), 1 - LEVELS[:-1])
            sizes[site] = model.hidden * model.ffn * (2 if site % SIDES == FFN_IN else 1)
        self.table = Thresholds(LEVELS, np.minimum.accumulate(thresholds, 1), np.ones(sites, np.float32), sizes)
        self.table = Thresholds(LEVELS, self.table.thresholds, self._sensitivity(prompts), sizes)

    def _weights(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m, (x_norm, z_norm) = self.model.ffns[layer], self.norms[2 * layer : 2 * layer + 2]
        z = F.silu(m.gate_proj(x)) * m.up_proj(x)
        return x.abs() * x_norm, z.abs() * z_norm

    def _sensitivity(self, prompts: Sequence[str]) -> np.ndarray:
        """[T]: KL to dense, nats per token, with one site at HALF of its channels."""
        out, half = np.ones(len(self.table.sizes), np.float32), self.table.at(np.full(len(self.table.sizes), HALF))
        for prompt in prompts[:SENSITIVITY_PROMPTS]:
            ids = self.model.ids(prompt)
            answer = self.model.answer(ids)
            dense = self.model.read(ids, answer, None).log_softmax(-1)
            for site in self.own:
                alone = np.where(np.arange(len(half)) == site, half, 0)
                found = self.model.read(ids, answer, self.above(alone)).log_softmax(-1)
                out[site] += float((dense.exp() * (dense - found)).sum(-1).mean())
        return (out - 1) / SENSITIVITY_PROMPTS + (out == 1)

    def above(self, thresholds: np.ndarray) -> Keep:
        """What is above thresholds [T]."""
        return self._keep(thresholds, lambda values, norm, limit: values.abs() * norm >= limit)

    def at_random(self, shares: np.ndarray) -> Keep:
        """As many as shares [T] say, drawn once."""
        drawn: dict[int, torch.Tensor] = {}

        def of(values: torch.Tensor, norm: torch.Tensor, share: float) -> torch.Tensor:
            if id(norm) not in drawn:
                order = torch.randperm(len(norm), generator=torch.Generator().manual_seed(len(drawn)))
                drawn[id(norm)] = order < round(share * len(norm))
            return drawn[id(norm)]

        return self._keep(shares, of)

    def _keep(self, limits: np.ndarray, of: Of) -> Keep:
        def keep(layer: int, x: torch.Tensor, active: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            m, (x_norm, z_norm) = self.model.ffns[layer], self.norms[2 * layer : 2 * layer + 2]
            x = x * of(x, x_norm, float(limits[SIDES * layer + FFN_IN]))
            z = F.silu(m.gate_proj(x)) * m.up_proj(x)
            return z * of(z, z_norm, float(limits[SIDES * layer + FFN_OUT]))

        return keep


def methods(
    model: Any, xs: Sequence[torch.Tensor], prompts: Sequence[str]
) -> dict[str, tuple[str, Callable[[float], Keep]]]:
    """Name -> (kind, what keeps a share of the FFN's bytes)."""
    sites = Sites(model, xs, prompts)
    return {
        "active (thresholds on x and z)": (
            "per token",
            lambda s: sites.above(sites.table.at(sites.table.shares(s, 1.0))),
        ),
        "random channels of x and z": ("control", lambda s: sites.at_random(sites.table.shares(s, 1.0))),
    }
