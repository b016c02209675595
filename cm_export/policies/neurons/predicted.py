"""A new set for every token, chosen inside the decode graph by 4-bit copies of gate and up.

    zp = act(x Gq) * (x Uq)         score(n) = |zp_n| ||W_down[n]||         core_neurons [B,N,K] = the K best, ascending

Most of the sparsity of a gated FFN belongs to the single token (docs/quality.md); a copy that is cheap to read finds it
well enough. What it reads counts as cost: `predictor.py`. Ties: the lower id. Prefill scores nothing. Predicting a
token's neurons: Deja Vu (arXiv 2310.17157); by a low-bit copy instead of a trained network: here.
"""

from __future__ import annotations

import onnx

from .._torch import torch
from ..choose_neurons import chooser

WIRES = ()
ATTRIBUTES = ()
SCORES = False
IN_DECODE = True
FUNCTION = None
DECODE_WIRES = ("x", "gate", "gate_scale", "up", "up_scale", "norm", "count")
DECODE_ATTRIBUTES = ("group", "block")


def score() -> None:
    """No scores in prefill: the decode graph chooses."""
    return None


def choose(zp: torch.Tensor, norm: torch.Tensor, count: int, block: int = 1) -> torch.Tensor:
    """[B,N,K] int32 ascending, of predicted activations zp [B,N,F] and row norms [F], both float32; K = count.

    block > 1: `block` neighbours are chosen together, by the sum of their scores; it divides F and count.
    """
    scores = (zp.abs() * norm).unflatten(-1, (-1, block)).sum(-1)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : count // block]
    ids = best.sort(dim=-1).values[..., None] * block + torch.arange(block)
    return ids.flatten(-2).int()


def decode_function(activation: str) -> onnx.FunctionProto:
    """The same as an ONNX function; gate and up [F,D] int4 with scales [F,D/group] float32, count [1] int64."""
    return chooser("PredictNeurons", activation)
