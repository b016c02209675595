"""SmolVLM: what is particular to `model_type = smolvlm` (SmolVLM2): Idefics3's tiles and tower under another name.

Source: SmolVLM (arXiv 2504.05299), section 2.
"""

from .idefics3 import Idefics3


class SmolVLM(Idefics3):
    """Idefics3 in everything but transformers' class."""

    model_class = "SmolVLMForConditionalGeneration"
    model_type = "smolvlm"


FAMILY = SmolVLM()
