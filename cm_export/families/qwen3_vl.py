"""Qwen3-VL: what is particular to `model_type = qwen3_vl`: Qwen2-VL's pictures and positions, features for several layers.

    patches + interpolated position embeddings -> tower -> image embeddings [I,D]
                                  after some blocks     -> deepstack_0, deepstack_1, .. [I,D], added after layers 0, 1, ..

Rotary positions of three axes lie interleaved within a head, which is inside what is traced. An image token that left
before the last of those layers would lose features, so that no cut comes earlier (Shape.whole_layers).

Source: Qwen3-VL (arXiv 2511.21631), section 2; DeepStack (arXiv 2406.04334).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..base import dims
from ..base.errors import InputError
from . import Arrays, Config, Picture, Port, Shape, check_decoder, check_image_token
from .qwen2_vl import Qwen2VL, Qwen2VLTower, check_sections, check_vision

TAPS = 4  # of an interpolated position embedding: the corners around it


class Qwen3VL(Qwen2VL):
    """A decoder as Qwen3's with positions of three axes."""

    model_class = "Qwen3VLForConditionalGeneration"
    tower_output = "out_hidden_size"

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

    def memory(self, picture: Picture) -> int:
        """Besides Qwen2-VL's: four position embeddings of every patch."""
        return super().memory(picture) + 2 * 4 * TAPS * len(picture.pixels) * self.width

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
