"""A Qwen2-VL checkpoint of random weights that every contestant's converter reads: weights, tokenizer, processor, template.

    write(folder, MID)   ->  config.json  model.safetensors  tokenizer.json  vocab.json  merges.txt  preprocessor_config.json ...

Names and settings are as published checkpoints have them, since the converters of peers expect those. The tokenizer is a
byte-level BPE trained on the Python library's own sources.
"""

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of the language model and, behind them, of the vision tower."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    dtype: str


MID = Sizes(1024, 4864, 12, 16, 2, 32768, 640, 8, 10, "float32")  # 241 M parameters
LARGE = Sizes(1536, 8960, 28, 12, 2, 151936, 1280, 32, 16, "bfloat16")  # those of Qwen2-VL-2B
SIZES = {"mid": MID, "2b": LARGE}

_TEXT = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"
_PICTURES = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (*_TEXT, "<|box_end|>", "<|quad_start|>", "<|quad_end|>", *_PICTURES)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, sizes: Sizes) -> None:
    """Fill the folder; the weights come last."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = processor(folder)
    _json(folder / "config.json", _config(sizes, ids))
    _weights(folder)


def processor(folder: Path) -> dict[str, int]:
    """Write tokenizer, template and rule of pictures; returns the ids of the special tokens."""
    ids = _tokenizer(folder)
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    _json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False})
    rule: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 1003520}
    rule |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    rule |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    rule |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    _json(folder / "preprocessor_config.json", rule)
    return ids


def _tokenizer(folder: Path) -> dict[str, int]:
    """Write its files; returns the ids of the special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    parted = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parted, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sources = sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py"))
    tokenizer.train(sources, trainers.BpeTrainer(vocab_size=16000, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}
    settings |= {"pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace", "model_max_length": 32768}
    settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "split_special_tokens": False}
    settings |= {"added_tokens_decoder": {str(i): {"content": t} | plain for t, i in ids.items()}}
    _json(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    _json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return ids


def _config(s: Sizes, ids: dict[str, int]) -> dict[str, Any]:
    half = s.hidden // s.heads // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    text = {"hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers, "vocab_size": s.vocab}
    text |= {"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "max_position_embeddings": 8192}
    text |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True}
    text |= {"use_sliding_window": False, "sliding_window": 8192, "max_window_layers": s.layers}
    text |= {"attention_dropout": 0.0, "initializer_range": 0.02}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    tower = {"model_type": "qwen2_vl", "depth": s.vision_layers, "embed_dim": s.vision_width, "hidden_size": s.hidden}
    tower |= {"num_heads": s.vision_heads, "mlp_ratio": 4, "patch_size": 14, "spatial_patch_size": 14}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    named = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_token_id": "<|vision_pad|>"}
    named |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": s.dtype}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": sections}, "vision_config": tower}
    return config | text | {name: ids[token] for name, token in named.items()}


def _weights(folder: Path) -> None:
    """Names as published: visual.*, model.*; the head is the embedding."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=config.dtype)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if name != "lm_head.weight":
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
