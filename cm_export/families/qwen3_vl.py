"""Qwen3-VL: what is particular to `model_type = qwen3_vl`: Qwen2-VL's pictures and positions, features for several layers.

    patches + interpolated position embeddings -> tower -> image embeddings [I,D]
                                  after some blocks     -> deepstack_0, deepstack_1, .. [I,D], added after layers 0, 1, ..

Rotary positions of three axes lie interleaved within a head, which is inside what is traced. An image token that left
before the last of those layers would lose features, so that no cut comes earlier (Shape.whole_layers).

Source: Qwen3-VL (arXiv 2511.21631), section 2; DeepStack (arXiv 2406.04334).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..base import dims
from ..base.errors import InputError
from . import (
    IMAGE,
    UNKNOWN_FPS,
    Arrays,
    Config,
    Frames,
    Layout,
    Picture,
    Port,
    Shape,
    check_decoder,
    check_image_token,
)
from .qwen2_vl import (
    MAX_RATIO,
    ClipRule,
    Qwen2VL,
    Qwen2VLTower,
    check_sections,
    check_vision,
    clip_rule,
)

CLIP_SIZE = {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"  # as transformers writes them around each frame
TAPS = 4  # of an interpolated position embedding: the corners around it


class Qwen3VL(Qwen2VL):
    """A decoder as Qwen3's with positions of three axes."""

    model_class = "Qwen3VLForConditionalGeneration"
    tower_output = "out_hidden_size"
    frames_apart = True

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        head_dim = config["text_config"]["head_dim"]
        return replace(super().shape(config), head_dim=head_dim, whole_layers=_deepstack(config))

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        text, vision = config["text_config"], config["vision_config"]
        check_decoder(text, text["head_dim"])
        check_image_token(config["image_token_id"], text)
        check_vision(vision, self.tower_output, text["hidden_size"])
        check_sections(text, text["head_dim"], [24, 20, 20])
        blocks = vision["deepstack_visual_indexes"]
        if not all(type(block) is int and block in range(vision["depth"]) for block in blocks):
            what = f"vision_config.deepstack_visual_indexes = {blocks!r} are not blocks of its {vision['depth']}"
            raise InputError(what, where="config.json")

    def sample(self, seed: int) -> dict[str, Any]:
        """Heads of any size, features for one layer or two, a table of positions of any side."""
        r, base = random.Random(seed), super().sample(seed)
        half, features = r.choice([4, 6, 8]), r.choice([1, 2])
        third = r.choice([half // 3, half // 4])
        rope = {"rope_type": "default", "rope_theta": 0.0, "mrope_section": [half - 2 * third, third, third]}
        layers, biased = features + r.choice([1, 2]), r.random() < 0.3
        rope |= {"rope_theta": r.choice([50.0, 1e4, 5e6]), "mrope_interleaved": True}
        text = {"head_dim": 2 * half, "num_hidden_layers": layers, "attention_bias": biased, "rope_parameters": rope}
        heads, depth = r.choice([1, 2, 4]), features + 1
        vision = {
            "depth": depth, "hidden_size": heads * r.choice([8, 16]), "intermediate_size": r.choice([20, 33]),
            "hidden_act": "gelu_pytorch_tanh", "num_heads": heads, "patch_size": r.choice([2, 4]),
            "spatial_merge_size": r.choice([1, 2, 2, 3]), "temporal_patch_size": r.choice([1, 2]), "in_channels": 3,
            "num_position_embeddings": r.choice([9, 16, 49]),
            "deepstack_visual_indexes": sorted(r.sample(range(depth), features)),
            "out_hidden_size": base["text_config"]["hidden_size"],
        }  # fmt: skip
        return base | {"model_type": "qwen3_vl", "text_config": base["text_config"] | text, "vision_config": vision}

    def tower(self, config: Config) -> Qwen3VLTower:
        """The vision tower of a checkpoint."""
        return Qwen3VLTower(config["vision_config"], _deepstack(config))

    def mix_in(self, layer: int, hidden: Any, rows: Mapping[str, Any]) -> Any:
        """The hidden state [B,S,D] (torch) after `layer`, with that layer's features of pictures."""
        name = f"deepstack_{layer}"
        return hidden + rows[name] if name in rows else hidden


def _deepstack(config: Config) -> int:
    """How many layers get features of their own."""
    layers: int = config["text_config"]["num_hidden_layers"]
    return min(len({*config["vision_config"]["deepstack_visual_indexes"]}), layers)


class Qwen3VLTower(Qwen2VLTower):
    """Qwen2-VL's patches with position embeddings of a square table, and outputs for `features` layers of the decoder."""

    def __init__(self, vision: Config, features: int):
        super().__init__({**vision, "embed_dim": vision["hidden_size"], "hidden_size": vision["out_hidden_size"]})
        self.side = int(vision["num_position_embeddings"] ** 0.5)  # of the table
        self.inputs = (
            *self.inputs,
            Port("interp_indices", np.int64, (dims.PATCHES, TAPS)),
            Port("interp_weights", np.float32, (dims.PATCHES, TAPS)),
        )
        more = [Port(f"deepstack_{i}", np.float32, (dims.IMAGE_TOKENS, self.hidden)) for i in range(features)]
        self.outputs = (*self.outputs, *more)

    def compute(self, tower: Any, pixel_values: Any, **given: Any) -> tuple[Any, ...]:
        """What the vision graph gives (torch)."""
        return self._outputs(tower(pixel_values, grid_thw=None, max_seqlen=1, **given))

    def _outputs(self, found: Any) -> tuple[Any, ...]:
        """Embeddings and features that the decoder has a layer for."""
        return (found.pooler_output, *found.deepstack_features)[: len(self.outputs)]

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings and features from stock transformers."""
        import torch

        found = model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
        return {port.name: torch.cat(tuple(x)) for port, x in zip(self.outputs, self._outputs(found), strict=True)}

    def clip_rule(self, processor: Config) -> ClipRule:
        """As Qwen2-VL's, with two frames a second and values of its own where the file says nothing."""
        own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": CLIP_SIZE}
        return clip_rule(processor, own | self._checked(processor), rate=2)

    def frames_of(
        self, total: int, fps: float | None, rule: ClipRule, rate: float | None, count: int | None
    ) -> list[int]:
        """As transformers samples them: spread from the first frame to the last. Raises InputError."""
        count, rate = rule.count if count is None and rate is None else count, rule.rate if rate is None else rate
        if count is None:
            count = total if rate is None else int(total / (fps or UNKNOWN_FPS) * rate)
            count = min(max(count, rule.min_frames), rule.max_frames, total)
        if not 0 < count <= total:
            raise InputError(f"{count} frames are asked of a clip that has {total}", fix="ask for others with --frames")
        return [int(place) for place in np.linspace(0, total - 1, count).round()]

    def clip_size(self, frames: int, height: int, width: int, rule: ClipRule) -> tuple[int, int]:
        """Height and width of each frame: the limits are those of all frames together. Raises InputError."""
        factor, limits = self.patch * self.merge, rule.frames
        if frames < self.temporal:
            raise InputError(f"a clip of {frames} frames, the tower reads {self.temporal} together", fix="give more")
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_RATIO * min(height, width):
            raise InputError(f"aspect ratio of {width}x{height} is above {MAX_RATIO}", fix="crop the clip")
        h, w, times = round(height / factor), round(width / factor), round(frames / self.temporal) * self.temporal
        if times * h * w * factor**2 > limits.max_pixels:
            beta = math.sqrt(frames * height * width / limits.max_pixels)
            h, w = (max(1, math.floor(n / beta / factor)) for n in (height, width))
        elif times * h * w * factor**2 < limits.min_pixels:
            beta = math.sqrt(limits.min_pixels / (frames * height * width))
            h, w = (math.ceil(n * beta / factor) for n in (height, width))
        return h * factor, w * factor

    def clip_layout(self, frames: Frames, grid: tuple[int, int, int]) -> Layout:
        """Before each frame of the grid stands its time, the middle of the first and the last that it is made of."""
        places = [*frames.places]
        places += places[-1:] * (-len(places) % self.temporal)
        times = [place / (frames.fps or UNKNOWN_FPS) for place in places]
        starts = range(0, len(times), self.temporal)
        middles = [(times[i] + times[i + self.temporal - 1]) / 2 for i in starts]
        shown = f"{VISION_START}{IMAGE * (grid[1] * grid[2])}{VISION_END}"
        return Layout(grid, text="".join(f"<{middle:.1f} seconds>{shown}" for middle in middles), pace=1)

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""
        found, start = super().feeds(pictures), 0
        taps = []
        for picture in pictures:
            _, rows, columns = picture.grid
            places = found["position_ids"][start : start + len(picture.pixels)]
            taps.append(interpolated(places, (rows * self.merge, columns * self.merge), self.side))
            start += len(picture.pixels)
        indices, weights = (np.concatenate(parts) for parts in zip(*taps, strict=True))
        return found | {"interp_indices": indices, "interp_weights": weights}

    def engine_memory(self, patches: int, fused: bool) -> int:
        """Besides Qwen2-VL's: four position embeddings of every patch, and the further outputs."""
        features: int = (len(self.outputs) - 1) * patches // self.merge**2 * self.hidden
        return super().engine_memory(patches, fused) + 2 * 4 * TAPS * patches * self.width + 4 * features


def interpolated(places: np.ndarray, size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a table of side x side position embeddings and their weights, [N,4] int64 and float32, bilinear.

    places [N,2]: row and column of each patch in a picture of `size` (rows, columns) of patches; the corners of the
    picture are those of the table. In the types and the order of transformers: equal to the last bit.
    """
    indices, weights = [], []
    for axis in range(2):
        scale = np.float32(max(size[axis] - 1, 1))
        at = places[:, axis].astype(np.float32) * np.float32(side - 1) / scale
        floor = np.floor(at)
        near = np.arange(2)
        indices.append(np.clip(floor.astype(np.int64)[:, None] + near, 0, side - 1))
        distance = np.abs((at - floor)[:, None] - near.astype(np.float32))
        weights.append(np.maximum(1 - distance, 0))
    rows = indices[0][:, :, None] * side + indices[1][:, None]
    return rows.reshape(-1, TAPS), (weights[0][:, :, None] * weights[1][:, None]).reshape(-1, TAPS)


FAMILY = Qwen3VL()
