"""Llama: what is particular to `model_type = llama` (Llama 2 and 3, SmolLM2, TinyLlama ...), a decoder without vision.

Source: LLaMA (arXiv 2302.13971), section 2.2; grouped-query attention and explicit head_dim as in transformers.
"""

import random
from typing import Any

from . import Family


class Llama(Family):
    """Everything as the contract's defaults say."""

    model_class = "LlamaForCausalLM"

    def sample(self, seed: int) -> dict[str, Any]:
        """A tiny decoder, with and without biases, heads of a size of their own, every kind of rope that is supported."""
        config, r = sampled_decoder("llama", seed), random.Random(f"llama {seed}")
        rope = config["rope_parameters"]
        rope |= r.choice(ROPES) if r.random() < 0.5 else {}
        return config | {"attention_bias": r.random() < 0.3} | ({"head_dim": 10} if r.random() < 0.3 else {})


_TRAINED_ON = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", **_TRAINED_ON},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_TRAINED_ON},
)


def sampled_decoder(model_type: str, seed: int) -> dict[str, Any]:
    """A tiny decoder of Llama's layout: sizes, heads, activation and tying drawn at random."""
    r = random.Random(seed)
    kv, group, head_dim = r.choice([1, 2, 3]), r.choice([2, 3, 4]), r.choice([8, 12, 16])
    rope = {"rope_type": "default", "rope_theta": r.choice([50.0, 1e4, 1e6])}
    return {
        "model_type": model_type,
        "vocab_size": r.choice([61, 96, 131]),
        "hidden_size": kv * group * head_dim,
        "intermediate_size": r.choice([33, 64, 97]),
        "num_hidden_layers": r.randint(2, 3),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "hidden_act": r.choice(["silu", "silu", "gelu", "relu"]),
        "rms_norm_eps": r.choice([1e-2, 1e-6]),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": r.random() < 0.5,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


FAMILY = Llama()
