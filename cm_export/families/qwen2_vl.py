"""Qwen2-VL: what is particular to `model_type = qwen2_vl`, host side in numpy so that running a bundle needs no torch.

    picture -> patches [N, C*2*p*p] + grid (t, h, w) -> I = N / merge^2 image tokens -> positions (t, h, w) per token

Source: Qwen2-VL (arXiv 2409.12191), section 2.1: dynamic resolution and M-RoPE.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import InputError
from . import Shape, check_decoder, decoder_shape

MODEL_CLASS = "Qwen2VLForConditionalGeneration"

# Weight names of one decoder layer; the surgery finds its sites by them.
LAYER = "model.language_model.layers.{layer}."
GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
ATTENTION_OUT = "self_attn.o_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def shape(config: dict[str, Any]) -> Shape:
    """Sizes of a checkpoint from transformers' normalised configuration (a plain dict). Raises InputError."""
    vision = config["vision_config"]
    return decoder_shape(
        config["text_config"],
        traced=("vision", "prefill", "decode"),
        position_axes=3,
        patch_dim=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        merge=vision["spatial_merge_size"],
        image_token=config["image_token_id"],
    )


def check_config(config: dict[str, Any]) -> None:
    """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
    text, vision = config["text_config"], config["vision_config"]
    check_decoder(text)
    if config["image_token_id"] >= text["vocab_size"]:
        raise InputError(
            f"image_token_id {config['image_token_id']} is not below vocab_size {text['vocab_size']}",
            where="config.json",
        )
    if vision["hidden_size"] != text["hidden_size"]:
        raise InputError("vision_config.hidden_size differs from text_config.hidden_size", where="config.json")


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class ImageRule:
    """How a picture becomes patches: the fields of preprocessor_config.json that Qwen2-VL's processor reads."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3
    rescale: float = 1 / 255


def image_rule(processor: dict[str, Any]) -> ImageRule:
    """The rule in a preprocessor_config.json; absent keys take Qwen2-VL's defaults. Raises InputError."""
    if processor.get("do_resize") is False:
        # Then pictures of most sizes could not be cut into merged patches at all.
        raise InputError("do_resize = false is not supported", where="preprocessor_config.json", fix="remove the key")
    d, size = ImageRule(), processor.get("size") or {}
    normalize = processor.get("do_normalize") is not False
    return ImageRule(
        patch=processor.get("patch_size", d.patch),
        merge=processor.get("merge_size", d.merge),
        temporal=processor.get("temporal_patch_size", d.temporal),
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge", d.min_pixels),
        max_pixels=processor.get("max_pixels") or size.get("longest_edge", d.max_pixels),
        mean=tuple(processor.get("image_mean") or d.mean) if normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.get("image_std") or d.std) if normalize else (1.0, 1.0, 1.0),
        resample=processor.get("resample", d.resample),
        rescale=1.0 if processor.get("do_rescale") is False else processor.get("rescale_factor", d.rescale),
    )


def target_size(height: int, width: int, rule: ImageRule) -> tuple[int, int]:
    """Height and width in pixels after the resize: multiples of patch*merge, area within the rule. Raises InputError."""
    factor = rule.patch * rule.merge
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"aspect ratio of {width}x{height} is above 200", fix="crop the picture")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > rule.max_pixels:
        beta = math.sqrt(height * width / rule.max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < rule.min_pixels:
        beta = math.sqrt(rule.min_pixels / (height * width))
        h, w = (math.ceil(x * beta / factor) * factor for x in (height, width))
    return h, w


def patchify(images: list[Any], rule: ImageRule) -> tuple[np.ndarray, np.ndarray]:
    """PIL RGB pictures -> pixel_values [N, C*T*p*p] float32 and grid [images, 3] int64 (t, h, w in patches)."""
    rows, grids = [], []
    for image in images:
        h, w = target_size(image.height, image.width, rule)
        x = np.asarray(image.resize((w, h), rule.resample), np.float32).transpose(2, 0, 1) * np.float32(rule.rescale)
        x = (x - np.asarray(rule.mean, np.float32)[:, None, None]) / np.asarray(rule.std, np.float32)[:, None, None]
        gh, gw, m, p = h // rule.patch, w // rule.patch, rule.merge, rule.patch
        x = x.reshape(3, gh // m, m, p, gw // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)  # gh gw m m C p p
        x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], rule.temporal, p, p))
        rows.append(x.reshape(gh * gw, -1))
        grids.append((1, gh, gw))
    return np.ascontiguousarray(np.concatenate(rows)), np.asarray(grids, np.int64)


def vision_inputs(pixel_values: np.ndarray, grid: np.ndarray, merge: int) -> dict[str, np.ndarray]:
    """Feeds of the vision graph: position_ids [N,2] (row, column; merge block by merge block), cu_seqlens [segments+1]."""
    positions, lengths = [], [0]
    for t, h, w in grid.tolist():
        yx = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1)
        yx = yx.reshape(h // merge, merge, w // merge, merge, 2).swapaxes(1, 2).reshape(-1, 2)
        positions.append(np.tile(yx, (t, 1)))
        lengths += [h * w] * t
    return {
        "pixel_values": pixel_values,
        "position_ids": np.concatenate(positions).astype(np.int64),
        "cu_seqlens": np.cumsum(lengths, dtype=np.int64),
    }


def image_tokens(grid: np.ndarray, merge: int) -> list[int]:
    """Image tokens of each picture."""
    return [int(t * h * w) // merge**2 for t, h, w in grid.tolist()]


def position_ids(is_image: np.ndarray, grid: np.ndarray, merge: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, S] int64 of one prompt without padding, and the position of the first answer token.

    `is_image` [S] bool. Text counts on in all three axes; a picture starts at the next position p and gets
    (p + t, p + row, p + column); the text after it goes on at p + max(rows, columns).
    """
    out, nxt, at, picture = np.zeros((3, len(is_image)), np.int64), 0, 0, 0
    while at < len(is_image):
        if not is_image[at]:
            out[:, at] = nxt
            at, nxt = at + 1, nxt + 1
            continue
        t, h, w = (int(v) for v in grid[picture])
        h, w, n, picture = h // merge, w // merge, t * h * w // merge**2, picture + 1
        out[:, at : at + n] = nxt + np.stack(np.meshgrid(range(t), range(h), range(w), indexing="ij")).reshape(3, -1)
        at, nxt = at + n, nxt + max(h, w)
    return out, int(out.max()) + 1 if len(is_image) else 0
