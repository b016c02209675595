"""Random configurations of Qwen2.5-VL and Qwen3-VL, and the sizes of published checkpoints."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from random_models import random_checkpoint

from cm_export import families
from cm_export.recipe.aliases import DEMO

RANDOM = {name: families.find(name).sample for name in ("qwen2_5_vl", "qwen3_vl")}
_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
_TOKENS |= {"vision_end_token_id": 151653}
_VISION_2_5 = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2,
    "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_VISION_3 = {
    "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
    "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def _flat_2_5(vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    """As Qwen2.5-VL's config.json is written: the decoder's settings beside vision_config."""
    shared = {
        "model_type": "qwen2_5_vl", "hidden_act": "silu", "max_position_embeddings": 128000, "max_window_layers": 70,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    return shared | _TOKENS | text | {"vision_config": _VISION_2_5 | vision}


def _nested_3(hidden: int, **text: Any) -> dict[str, Any]:
    """As Qwen3-VL's config.json is written."""
    shared = {
        "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "vocab_size": 151936, "hidden_size": hidden,
    }  # fmt: skip
    vision = _VISION_3 | {"out_hidden_size": hidden}
    found = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "vision_config": vision}
    return found | _TOKENS | {"text_config": shared | text}


# config.json of published checkpoints, and their weights of a decoded token in 10^9 (FFN, attention, head).
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        _flat_2_5({"out_hidden_size": 2048}, hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
                  num_hidden_layers=36, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936),
        3.085,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        _flat_2_5({"out_hidden_size": 3584}, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                  num_hidden_layers=28, num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064),
        7.070,
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        _nested_3(2048, intermediate_size=6144, num_attention_heads=16, num_hidden_layers=28), 1.720,
    ),
    "Qwen/Qwen3-VL-4B-Instruct": (
        _nested_3(2560, intermediate_size=9728, num_attention_heads=32, num_hidden_layers=36), 4.022,
    ),
    "Qwen/Qwen3-0.6B": (
        {"model_type": "qwen3", "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
         "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
         "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
        0.596,
    ),
}  # fmt: skip


def published(name: str, **text: Any) -> dict[str, Any]:
    """A published config.json with some settings of its decoder changed."""
    config = copy.deepcopy(PUBLISHED[name][0])
    (config.get("text_config") or config).update(text)
    return config


def answering(name: str, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint that takes questions: the demo model's tokenizer and chat template, and picture rules.

    Widths that can be packed in 4 bits and predicted; three layers.
    """
    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 2048, "num_hidden_layers": 3, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if name == "qwen3":
        config = text | {"model_type": name, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": rope}
    else:
        config = RANDOM[name](5)
        config["text_config"] = text | {"rope_parameters": rope | {"mrope_section": [4, 2, 2]}}
        config["text_config"] |= {"head_dim": 16} if name == "qwen3_vl" else {}
        config["vision_config"] |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        config["vision_config"] |= {"out_hidden_size": 64} | ({"window_size": 20} if name == "qwen2_5_vl" else {})
    random_checkpoint(config, folder, seed)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO / file, folder / file)
    template = (DEMO / "chat_template.jinja").read_text()
    seen = (
        "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    )
    (folder / "chat_template.jinja").write_text(template.replace("{% elif 'text' in content %}", seen))
    if name != "qwen3":
        size = {"shortest_edge": 2048, "longest_edge": 6144}
        rule = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size, "patch_size": 4, "merge_size": 2}
        rule |= {"temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(rule))
    return folder
