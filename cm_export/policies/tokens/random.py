"""Image tokens in an order drawn by hash: the control that any criterion has to beat.

    score(b, i) = hash(i; seed, b)      distinct whole numbers below 2^20 within a row

A share of these is a uniform draw without replacement: METHOD's `random` control for image tokens.
"""

from __future__ import annotations

from ...base.onnx_text import function
from .._hash import scramble, scramble_text
from .._torch import torch

WIRES = ("image_mask", "seed")
ATTRIBUTES = ()


def score(image_mask: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """[B,S] int64; of image_mask [B,S] bool only the sizes are read; seed [1] int64."""
    rows, columns = (torch.arange(size, device=image_mask.device) for size in image_mask.shape)
    return scramble(columns[None, :], seed, rows[:, None])


FUNCTION = function(f"""
    RandomTokens (image_mask, seed) => (score) {{
        first = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        axis_1 = Constant <value_ints = [1]> ()
        batch = Shape <start = 0, end = 1> (image_mask)
        batch_size = Squeeze (batch)
        rows = Range (first, batch_size, step)
        rows_col = Unsqueeze (rows, axis_1)
        prompt = Shape <start = 1> (image_mask)
        prompt_size = Squeeze (prompt)
        columns = Range (first, prompt_size, step)
        {scramble_text("score", "columns", "seed", "rows_col")}
    }}""")
