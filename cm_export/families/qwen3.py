"""Qwen3: what is particular to `model_type = qwen3` (dense Qwen3 text models): Qwen2's layout, norms on q and k, no biases.

The norms of queries and keys sit inside what is traced; a head's size is stated apart (head_dim) and need not be
hidden_size / num_attention_heads. Source: Qwen3 (arXiv 2505.09388), section 2.
"""

import random
from typing import Any

from . import Family
from .llama import sampled_decoder


class Qwen3(Family):
    """Everything as the contract's defaults say."""

    model_class = "Qwen3ForCausalLM"

    def sample(self, seed: int) -> dict[str, Any]:
        """A tiny decoder with heads of a size of their own."""
        r = random.Random(f"qwen3 {seed}")
        return sampled_decoder("qwen3", seed) | {"head_dim": r.choice([8, 10, 12]), "attention_bias": r.random() < 0.3}


FAMILY = Qwen3()
