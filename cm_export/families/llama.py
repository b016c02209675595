"""Llama: what is particular to `model_type = llama` (Llama 2 and 3, SmolLM2, TinyLlama ...), a decoder without vision.

Source: LLaMA (arXiv 2302.13971), section 2.2; grouped-query attention and explicit head_dim as in transformers.
"""

from typing import Any

from . import Shape, check_decoder, decoder_shape, image_tokens, position_ids

__all__ = ["check_config", "image_tokens", "position_ids", "shape"]

MODEL_CLASS = "LlamaForCausalLM"

# Weight names of one decoder layer; the surgery finds its sites by them.
LAYER = "model.layers.{layer}."
GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
ATTENTION_OUT = "self_attn.o_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def shape(config: dict[str, Any]) -> Shape:
    """Sizes of a checkpoint from transformers' normalised configuration (a plain dict)."""
    return decoder_shape(config, config.get("head_dim"))


def check_config(config: dict[str, Any]) -> None:
    """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
    check_decoder(config, config.get("head_dim"))
