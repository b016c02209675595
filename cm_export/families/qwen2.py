"""Qwen2: what is particular to `model_type = qwen2` (Qwen2 and Qwen2.5 text models): Llama's layout, biases on q, k, v.

The biases sit inside what is traced, so that here the two families differ in nothing but transformers' class.
Source: Qwen2 (arXiv 2407.10671), section 2.2.1.
"""

from typing import Any

from . import Family
from .llama import sampled_decoder


class Qwen2(Family):
    """Everything as the contract's defaults say."""

    model_class = "Qwen2ForCausalLM"

    def sample(self, seed: int) -> dict[str, Any]:
        """A tiny decoder; its biases are always there."""
        return sampled_decoder("qwen2", seed)


FAMILY = Qwen2()
