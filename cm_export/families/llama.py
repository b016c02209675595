"""Llama: what is particular to `model_type = llama` (Llama 2 and 3, SmolLM2, TinyLlama ...), a decoder without vision.

Source: LLaMA (arXiv 2302.13971), section 2.2; grouped-query attention and explicit head_dim as in transformers.
"""

from . import Family


class Llama(Family):
    """Everything as the contract's defaults say."""

    model_class = "LlamaForCausalLM"


FAMILY = Llama()
