"""Random configurations of LLaVA-1.5 and LLaVA-OneVision, prompts with pictures of theirs, and what transformers is given."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_models import random_checkpoint

from cm_export import families
from cm_export.families import Pictures
from cm_export.host.request import Request
from cm_export.recipe.aliases import DEMO

RANDOM = {name: families.find(name).sample for name in ("llava", "llava_onevision")}


_CLIP_L = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
# config.json of published checkpoints, their weights of a decoded token in 10^9, and the id of the image token.
PUBLISHED: dict[str, tuple[dict[str, Any], float, int]] = {
    "llava-hf/llava-1.5-7b-hf": (
        {"model_type": "llava", "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu",
         "pad_token_id": 32001, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
         "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
                         "vocab_size": 32064},
         "vision_config": _CLIP_L},
        6.607, 32000,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        {"model_type": "llava_onevision", "image_token_index": 151646, "projector_hidden_act": "gelu",
         "video_token_index": 151647, "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full", "use_image_newline_parameter": True, "tie_word_embeddings": False,
         "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
         "text_config": {"bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
                         "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
                         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
                         "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False,
                         "vocab_size": 152000},
         "vision_config": _SIGLIP},
        0.494, 151646,
    ),
}  # fmt: skip


def answering(name: str, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint that takes questions: the demo model's tokenizer and chat template, and picture rules.

    Its tokenizer begins a text with a token, as Llama's does and the template does not.
    """
    config = RANDOM[name](2)
    text = {
        "model_type": "llama" if name == "llava" else "qwen2", "vocab_size": 96, "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 2048, "num_hidden_layers": 4, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = config["vision_config"] | {"image_size": 14, "patch_size": 4}
    config |= {"text_config": text, "vision_config": vision}
    if name == "llava_onevision":
        config |= {"image_grid_pinpoints": [[14, 14], [14, 28], [28, 14], [28, 28], [14, 42], [42, 14]]}
        config |= {"vision_aspect_ratio": "anyres_max_2"}
    random_checkpoint(config, folder, seed)
    for file in ("chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO / file, folder / file)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    begin = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    tokenizer["post_processor"]["single"].insert(0, {"SpecialToken": {"id": begin["id"], "type_id": 0}})
    tokenizer["post_processor"]["special_tokens"] = {begin["id"]: begin}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = json.loads((DEMO / "tokenizer_config.json").read_text()) | {"bos_token": begin["id"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    rule: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3, "resample": 3}
    if name == "llava":
        rule |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 14}}
        rule |= {"crop_size": {"height": 14, "width": 14}}
    else:
        rule |= {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 14, "width": 14}}
        rule |= {"image_grid_pinpoints": config["image_grid_pinpoints"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(rule))
    return folder


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def seen(x: Any, sizes: Any, rng: np.random.Generator) -> list[Any]:
    """Pictures of one question, of random pixels and these sizes (width, height), as the tower reads them."""
    rule = x.tower.rule_for(x.tower.rule({}), len(sizes))
    return [x.tower.picture(noise(rng, *size), rule) for size in sizes]


def ids_of(x: Any, pictures: Any, rng: np.random.Generator, words: int = 3) -> np.ndarray:
    """Words around every picture; pictures stand side by side where words is 0."""
    high = min(x.shape.vocab, 32000)  # beyond lie the tokens of pictures and videos
    ids = rng.integers(7, high, words + 1).tolist()
    for picture in pictures:
        ids += [x.shape.image_token] * picture.tokens + rng.integers(7, high, words).tolist()
    return np.array([*ids, 8], np.int64)


def asked(x: Any, backend: Any, pictures: Any, ids: np.ndarray) -> Request:
    """The request, with what our vision graph makes of the pictures, one by one as a bundle does."""
    parts = [Pictures(backend.vision(x.tower.feeds([p])), (p.layout,)) for p in pictures]
    return Request.of(ids, Pictures.joined(parts), x.family, x.shape, x.weights[x.family.embedding])


def request(x: Any, seed: int, sizes: Any = ((30, 20), (9, 31))) -> Request:
    """A prompt with pictures of random embeddings."""
    rng = np.random.default_rng(seed)
    pictures = seen(x, sizes, rng)
    total = sum(p.tokens for p in pictures)
    embeds = {"image_embeds": rng.standard_normal((total, x.shape.hidden)).astype(np.float32)}
    found = Pictures(embeds, tuple(p.layout for p in pictures)) if pictures else Pictures()
    return Request.of(ids_of(x, pictures, rng), found, x.family, x.shape, x.weights[x.family.embedding])


def stock(x: Any, pictures: Any, ids: np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
    """Stock generate(): greedy tokens, and the logits of every step."""
    given = (
        {n: torch.from_numpy(v) for n, v in x.tower.stock(pictures, ids == x.shape.image_token).items()}
        if pictures
        else {}
    )
    prompt = torch.from_numpy(ids)[None]
    out = x.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **given, max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).numpy()
