"""`quant_method = fp8`: 8-bit floats with a scale for each block, each output or each weight; read as float32.

    weight fp8 [N,K]      weight_scale_inv [N/128, K/128] (weight_block_size, 128 x 128 where it is not given), or
                          weight_scale [N,1], [1], []
    W = weight * scale    "inv" is in its name because activations were divided by it

Source: transformers (integrations/finegrained_fp8.py), DeepSeek-V3's report (arXiv 2412.19437), section 3.3.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Matrix, Parts, block_of, eight_bit_floats

MARKS = ("weight_scale_inv", "weight_scale")
PARTS = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_BLOCK = [128, 128]  # what transformers takes where the configuration does not say it


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for blocks that are no pair of lengths."""
    block_of(settings, "weight_block_size", settings.get("weight_block_size"), where)


def matrix(parts: Parts, settings: Mapping[str, Any]) -> Matrix:
    """The matrix of a module."""
    scale = parts.scale("weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale")
    block = block_of(settings, "weight_block_size", settings.get("weight_block_size", _BLOCK), Path("config.json"))
    return eight_bit_floats(parts, scale, block)
