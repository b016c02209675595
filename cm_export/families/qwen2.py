"""Qwen2: what is particular to `model_type = qwen2` (Qwen2 and Qwen2.5 text models): Llama's layout, biases on q, k, v.

The biases sit inside what the tracer sees, so that here the two families differ in nothing but transformers' class.
Source: Qwen2 (arXiv 2407.10671), section 2.2.1.
"""

from .llama import ATTENTION_OUT, DOWN, EMBEDDING, GATE, LAYER, UP, check_config, image_tokens, position_ids, shape

__all__ = [
    "ATTENTION_OUT",
    "DOWN",
    "EMBEDDING",
    "GATE",
    "LAYER",
    "UP",
    "check_config",
    "image_tokens",
    "position_ids",
    "shape",
]

MODEL_CLASS = "Qwen2ForCausalLM"
