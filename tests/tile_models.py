"""Random configurations of SmolVLM, Idefics3 and InternVL, the sizes of published checkpoints, and their chat templates."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

from random_models import IMAGE, random_checkpoint, random_text_config

from cm_export.recipe.aliases import DEMO


def _text(kinds: list[str], seed: int) -> dict[str, Any]:
    return random_text_config(random.Random(seed).choice(kinds), seed)


def random_idefics3(seed: int, model_type: str = "idefics3") -> dict[str, Any]:
    """A valid configuration; also tiles of which a patch does not use all pixels, as in SmolVLM2-2.2B."""
    r, text = random.Random(seed), _text(["llama", "llama", "qwen2"], seed)
    patch, merge, side, heads = r.choice([2, 3, 4]), r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 2, 4])
    vision = {
        "hidden_size": heads * r.choice([8, 16]),
        "intermediate_size": r.choice([20, 33]),
        "num_hidden_layers": r.choice([1, 2]),
        "num_attention_heads": heads,
        "num_channels": 3,
        "image_size": patch * merge * side + r.choice([0, patch - 1]),
        "patch_size": patch,
        "hidden_act": r.choice(["gelu_pytorch_tanh", "gelu", "relu"]),
    }
    tied = text["tie_word_embeddings"]
    found = {"model_type": model_type, "text_config": text, "vision_config": vision, "scale_factor": merge}
    return found | {"image_token_id": IMAGE, "tie_word_embeddings": tied, "pad_token_id": 0}


def random_smolvlm(seed: int) -> dict[str, Any]:
    """The same of the other type."""
    return random_idefics3(seed, "smolvlm")


def random_internvl(seed: int) -> dict[str, Any]:
    """A valid InternVL configuration: norms, biases and which layer's features are taken drawn at random."""
    r, text = random.Random(seed), _text(["qwen2", "qwen2", "qwen3", "llama"], seed)
    patch, merge, side, heads = r.choice([2, 3, 4]), r.choice([1, 2, 2]), r.choice([1, 2, 3]), r.choice([1, 2, 4])
    size = patch * merge * side
    vision = {
        "hidden_size": heads * r.choice([8, 16]),
        "intermediate_size": r.choice([20, 33]),
        "num_hidden_layers": r.choice([2, 3]),
        "num_attention_heads": heads,
        "attention_bias": r.random() < 0.5,
        "use_qk_norm": r.random() < 0.5,
        "norm_type": r.choice(["layer_norm", "rms_norm"]),
        "use_mean_pooling": r.random() < 0.5,
        "use_absolute_position_embeddings": r.random() < 0.8,
        "image_size": [size, size],
        "patch_size": [patch, patch],
        "hidden_act": r.choice(["gelu", "relu"]),
    }
    tied = text["tie_word_embeddings"]
    found = {"model_type": "internvl", "text_config": text, "vision_config": vision, "image_token_id": IMAGE}
    found |= {"downsample_ratio": 1 / merge, "vision_feature_layer": r.choice([-1, -1, -2, 1]), "tie_word_embeddings": tied}
    return found | {"projector_hidden_act": r.choice(["gelu", "relu"]), "image_seq_length": side**2}


RANDOM = {"smolvlm": random_smolvlm, "idefics3": random_idefics3, "internvl": random_internvl}
