"""Qwen3: what is particular to `model_type = qwen3` (dense Qwen3 text models): Qwen2's layout, norms on q and k, no biases.

The norms of queries and keys sit inside what is traced; a head's size is stated apart (head_dim) and need not be
hidden_size / num_attention_heads. Source: Qwen3 (arXiv 2505.09388), section 2.
"""

from . import Family


class Qwen3(Family):
    """Everything as the contract's defaults say."""

    model_class = "Qwen3ForCausalLM"


FAMILY = Qwen3()
