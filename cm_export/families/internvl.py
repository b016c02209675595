"""InternVL: what is particular to `model_type = internvl` (InternVL3 and 3.5 in transformers' own form, names with -hf).

    picture -> the grid of at most 12 tiles that is nearest to its shape, resized to fill it -> tiles, then a thumbnail
    tile    -> a class row and (S / p)^2 patches -> InternViT -> 2 x 2 neighbours become one image token -> n tokens
    prompt     <img> n tokens of every tile, the thumbnail's last </img>

Source: InternVL 1.5 (arXiv 2404.16821), section 3.2 (dynamic resolution); tiles as in transformers' GotOcr2ImageProcessor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.colours import RULE_FILE, Colours
from ..base.errors import InputError
from ..base.settings import FIX, flag, number
from . import IMAGE, Config, Family, Shape
from .idefics3 import TileTower, check_text, check_tile, sampled_text, text_shape, tiles_of

if TYPE_CHECKING:
    from PIL import Image

MOST = 12  # tiles of a picture besides the thumbnail, where the file says nothing
ENOUGH = 1000  # tiles that a file may ask for: all grids of so many are tried for each picture
# CLIP's colours, which the processor takes where the file says nothing.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class InternVL(Family):
    """Plain rotary positions; the decoder is a text model of its own type, such as Qwen2."""

    model_class = "InternVLForConditionalGeneration"
    layer = "model.language_model.layers.{layer}."
    embedding = "model.language_model.embed_tokens.weight"

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        return self.tower(config).holding(text_shape(config), MOST)

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        check_text(config)
        vision, where = config["vision_config"], "config.json"
        for key in ("image_size", "patch_size"):
            if len({*vision[key]}) != 1 or len(vision[key]) != 2:
                raise InputError(f"vision_config.{key} = {vision[key]!r} is not square", where=where)
        size, patch = vision["image_size"][0], vision["patch_size"][0]
        check_tile(vision, size, patch)
        ratio, side = config["downsample_ratio"], size // patch
        if ratio <= 0 or 1 % ratio or side % int(1 / ratio):
            raise InputError(f"downsample_ratio {ratio!r} does not divide {side} patches", where=where)
        if config["vision_feature_select_strategy"] != "default":
            strategy = config["vision_feature_select_strategy"]
            what = f"vision_feature_select_strategy {strategy!r} keeps the class row, which is part of no tile"
            raise InputError(what, where=where)
        layer, layers = config["vision_feature_layer"], vision["num_hidden_layers"]
        if type(layer) is not int or not -layers - 1 <= layer <= layers:
            what = f"vision_feature_layer {layer!r} is not one of the tower's {layers} layers"
            raise InputError(what, where=where)

    def tower(self, config: Config) -> TileTower:
        """The vision tower of a checkpoint."""
        return InternVLTower(config)

    def sample(self, seed: int) -> dict[str, Any]:
        """Any plain decoder; norms, biases and which layer's features are taken drawn at random."""
        r, text = random.Random(seed), sampled_text(("qwen2", "qwen2", "qwen3", "llama"), seed)
        patch, merge, side, heads = r.choice([2, 3, 4]), r.choice([1, 2, 2]), r.choice([1, 2, 3]), r.choice([1, 2, 4])
        vision = {
            "hidden_size": heads * r.choice([8, 16]), "intermediate_size": r.choice([20, 33]),
            "num_hidden_layers": r.choice([2, 3]), "num_attention_heads": heads, "attention_bias": r.random() < 0.5,
            "use_qk_norm": r.random() < 0.5, "norm_type": r.choice(["layer_norm", "rms_norm"]),
            "use_mean_pooling": r.random() < 0.5, "use_absolute_position_embeddings": r.random() < 0.8,
            "image_size": [patch * merge * side] * 2, "patch_size": [patch] * 2, "hidden_act": r.choice(["gelu", "relu"]),
        }  # fmt: skip
        found = {"model_type": "internvl", "text_config": text, "vision_config": vision, "image_token_id": 5}
        found |= {"downsample_ratio": 1 / merge, "vision_feature_layer": r.choice([-1, -1, -2, 1])}
        found |= {"projector_hidden_act": r.choice(["gelu", "relu"]), "image_seq_length": side**2}
        return found | {"tie_word_embeddings": text["tie_word_embeddings"]}


@dataclass(frozen=True)
class CanvasRule:
    """How a picture becomes tiles: at least `least` and at most `most` of them besides the thumbnail."""

    colours: Colours
    least: int
    most: int

    def grid(self, size: tuple[int, int], tile: int) -> tuple[int, int]:
        """(columns, rows) of tiles: the grid nearest to a picture's shape.

        Of equally near ones the larger, as long as the picture has more than half of its pixels.
        """
        width, height = size
        if self.most <= 1:
            return 1, 1
        best, nearest = (1, 1), float("inf")
        pairs = ((c, r) for c in range(1, self.most + 1) for r in range(1, self.most // c + 1))
        for columns, rows in sorted((p for p in pairs if p[0] * p[1] >= self.least), key=lambda p: p[0] * p[1]):
            distance = abs(width / height - columns / rows)
            if distance < nearest or (distance == nearest and width * height > 0.5 * tile * tile * columns * rows):
                best, nearest = (columns, rows), distance
        return best


class InternVLTower(TileTower):
    """InternViT with a class row, pixel shuffle, and an MLP that makes image tokens."""

    prefixes = ("model.vision_tower.", "model.multi_modal_projector.")
    processors = ("GotOcr2",)

    def __init__(self, config: Config):
        vision, merge = config["vision_config"], int(1 / config["downsample_ratio"])
        size, patch = vision["image_size"][0], vision["patch_size"][0]
        super().__init__(vision, size, patch, merge, config["text_config"]["hidden_size"], further=1)
        self.ratio, self.layer = config["downsample_ratio"], config["vision_feature_layer"]

    def network(self, model: Any) -> Callable[[Any], Any]:
        """What the vision graph computes (torch): the tower's own layers, up to the one whose features are taken."""
        import torch

        tower, projector, shuffled = (
            model.model.vision_tower,
            model.model.multi_modal_projector,
            model.model.pixel_shuffle,
        )
        layers, side = tower.encoder.layer, round(self.patches**0.5)
        layers = layers[: self.layer if self.layer >= 0 else len(layers) + 1 + self.layer]

        def seen(pixel_values: Any) -> Any:
            rows = tower.embeddings.patch_embeddings(pixel_values)
            hidden = torch.cat((tower.embeddings.cls_token.expand(rows.shape[0], -1, -1), rows), 1)
            if tower.embeddings.position_embeddings is not None:
                hidden = hidden + tower.embeddings.position_embeddings  # tiles have the size of this table
            for layer in layers:
                hidden = layer(hidden)
            if self.layer == -1:
                hidden = tower.layernorm(hidden)
            square = hidden[:, 1:].reshape(-1, side, side, self.width)
            return projector(shuffled(square, scale_factor=self.ratio).flatten(1, 2)).flatten(0, 1)

        return seen

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings from stock transformers."""
        found = model.get_image_features(given["pixel_values"], return_dict=True)
        return {"image_embeds": found.pooler_output.flatten(0, 1)}

    def text(self, rows: int, columns: int) -> str:
        """Image tokens between two marks."""
        tiles = rows * columns + (rows * columns > 1)
        return f"<img>{IMAGE * (tiles * self.side**2)}</img>"

    def rule(self, processor: Config) -> CanvasRule:
        """The rule in a preprocessor_config.json; sizes that it leaves out are the tower's own. Raises InputError.

        Its crop_to_patches is not read: transformers' InternVLProcessor asks for tiles whatever the file says.
        """
        self.check_kind(processor)
        size = processor.get("size", {"height": self.size, "width": self.size})
        if size != {"height": self.size, "width": self.size}:
            what = f"size = {size!r}, tiles of this model have {self.size} pixels (vision_config.image_size)"
            fix = f'write {{"height": {self.size}, "width": {self.size}}}'
            raise InputError(what, where=RULE_FILE, fix=fix)
        least, most = (number(processor, f"{m}_patches", d, RULE_FILE, above=0) for m, d in (("min", 1), ("max", MOST)))
        if least != int(least) or most != int(most):
            raise InputError("min_patches and max_patches are not whole numbers", where=RULE_FILE, fix=FIX)
        if most > ENOUGH:
            what = f"max_patches = {most!r}: no picture is cut into more than {ENOUGH} tiles"
            raise InputError(what, where=RULE_FILE, fix=FIX)
        if most <= 1 and not flag(processor, "do_resize", True, RULE_FILE):
            fix = "remove the key"
            raise InputError("do_resize = false, with which pictures are no tiles", where=RULE_FILE, fix=fix)
        return CanvasRule(Colours.of(processor, MEAN, STD, 3), int(least), int(most))

    def resized(self, size: tuple[int, int], rule: CanvasRule) -> tuple[int, int]:
        """(width, height) of what is cut into tiles."""
        columns, rows = rule.grid(size, self.size)
        return columns * self.size, rows * self.size

    def cut(self, image: Image.Image, rule: CanvasRule) -> tuple[list[np.ndarray], int, int]:
        """Tiles of a picture, and its thumbnail last."""
        columns, rows = rule.grid(image.size, self.size)
        whole = rule.colours.resized(image, columns * self.size, rows * self.size)
        tiles = tiles_of(rule.colours.read(whole), rows, columns)
        if len(tiles) > 1:
            tiles.append(rule.colours.read(rule.colours.resized(image, self.size, self.size)))
        return tiles, rows, columns


FAMILY = InternVL()
