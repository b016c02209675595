"""Neurons in an order drawn by hash: the control that any criterion has to beat.

    score(n) = hash(n; seed, layer)      distinct whole numbers below 2^20, the same for every row of the batch

A share of these is a uniform draw without replacement: METHOD's `random` control for neurons.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._hash import scramble, scramble_text
from .._torch import torch

WIRES = ("z", "seed")
ATTRIBUTES = ("layer",)


def score(z: torch.Tensor, seed: torch.Tensor, layer: int) -> torch.Tensor:
    """[B,F] float32; of z [B,S,F] only the sizes are read; seed [1] int64."""
    ids = torch.arange(z.shape[-1], device=z.device)
    return scramble(ids, seed, layer).to(torch.float32).expand(z.shape[0], -1).contiguous()


FUNCTION = function(f"""
    RandomNeurons <layer> (z, seed) => (score) {{
        layer_id = Constant <value_int: int = @layer> ()
        first = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        rows = Shape <start = 0, end = 1> (z)
        ffn = Shape <start = -1> (z)
        width = Squeeze (ffn)
        ids = Range (first, width, step)
        {scramble_text("order", "ids", "seed", "layer_id")}
        numbers = Cast <to = 1> (order)
        shape = Concat <axis = 0> (rows, ffn)
        score = Expand (numbers, shape)
    }}""")
