"""For every token anew, both sides of each product: channels that weigh next to nothing are not read. Nothing is predicted.

    gate, up   read channel i of x   unless |x_i| ||(Wg, Wu)[:, i]|| < tau_x          q, k, v: the same with their x
    down       reads neuron n of z   unless |z_n| ||Wd[n, :]||       < tau_z          o, the head: the same

z is computed for every neuron from the channels of x that are kept, so a token's core neurons are known when down needs
them. The thresholds are per layer and side, measured on generated text (`calibrate`, or the build itself), and a table of
them for other shares is stored; `neurons.share` is the share of the FFN's weights that is read, `neurons.rest_share` that
of the other products. Prefill is dense. Sources: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427) and CATS (arXiv
2404.08763), each for one side; both together, and the allotment by sensitivity: here (docs/quality.md).
"""

from __future__ import annotations

from .._torch import torch

WIRES = ()
ATTRIBUTES = ()
SCORES = False
BY_THRESHOLD = True
FUNCTION = None  # the ops themselves compare: CoreFFN in its form "active", and CoreLinear (plugins/threshold.py)


def score() -> None:
    """No scores in prefill: the decode graph compares."""
    return None


def keeps(values: torch.Tensor, norm: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """[B,N,C] bool: which channels of values [B,N,C] are read; norms [C] of the weights, a threshold [B] for each request.

    NaN is kept, so that it is seen in the result.
    """
    return ~(values.abs() * norm < threshold[:, None, None])
