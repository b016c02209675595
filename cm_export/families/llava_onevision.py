"""LLaVA-OneVision: what is particular to `model_type = llava_onevision`: LLaVA's tower on tiles of one picture.

    one picture      whole, shrunk to a tile [729] ; tiles of the best grid, joined, without their border, a newline a row
                     .----.  .----.----.           x x x x x n
                     |    |  |    |    |           x x x x x n      more than anyres_max times a tile: interpolated
                     '----'  '----'----'
    several          each padded to a square, one tile, a newline

The tower answers tile by tile; which of its rows a token of the prompt is, or the four around it and their weights, are
two arrays from the host.

Source: LLaVA-OneVision (arXiv 2408.03326), section 3; LLaVA-NeXT's anyres.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base import dims
from ..base.colours import BICUBIC, CLIP_MEAN, CLIP_STD, RULE_FILE, Colours, of_bands
from ..base.errors import InputError
from ..base.settings import FIX, flag
from . import Arrays, Config, Layout, Picture, Port, Range
from .idefics3 import TILES
from .llava import CLIP, Llava, SquaresTower, covering, padded, square_size

if TYPE_CHECKING:
    from PIL import Image

TAPS = 4  # of an interpolated token: the corners around it
NEWLINE = -1  # in Tiles.rows
WHERE = "config.json"


class LlavaOnevision(Llava):
    """LLaVA's decoders, Qwen2 in what was published."""

    model_class = "LlavaOnevisionForConditionalGeneration"

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        super().check_config(config)
        size, grids = config["vision_config"]["image_size"], config["image_grid_pinpoints"]
        whole = isinstance(grids, list) and all(isinstance(g, list) and len(g) == 2 for g in grids)
        if not whole or not grids or not all(type(n) is int and n > 0 and n % size == 0 for g in grids for n in g):
            what = f"image_grid_pinpoints are not heights and widths of whole tiles of {size} pixels"
            raise InputError(what, where=WHERE)
        most = config["vision_aspect_ratio"].strip("anyres_max_")  # noqa: B005 (as transformers reads it)
        if not most.isdecimal() or int(most) < 1:
            what = f"vision_aspect_ratio = {config['vision_aspect_ratio']!r} is not anyres_max_ and a number"
            raise InputError(what, where=WHERE)
        tower = OnevisionTower(config)
        if len(tower.cells) != tower.side**2:
            what = (
                f"vision_feature_select_strategy leaves {len(tower.cells)} tokens of a tile of {tower.side**2} patches"
            )
            raise InputError(what, where=WHERE, fix='set "full" for SigLIP, "default" for CLIP')

    def tower(self, config: Config) -> OnevisionTower:
        """The vision tower of a checkpoint."""
        return OnevisionTower(config)

    def sample(self, seed: int) -> dict[str, Any]:
        """Any set of grids, from one tile a picture to nine before interpolation."""
        r, config = random.Random(seed), super().sample(seed)
        size, clip = config["vision_config"]["image_size"], config["vision_config"]["model_type"] == CLIP
        grids = [[size * h, size * w] for h in (1, 2, 3) for w in (1, 2, 3)]
        found = {"model_type": "llava_onevision", "video_token_index": 6}
        found |= {"image_grid_pinpoints": sorted(r.sample(grids, r.choice([4, 6, 9])))}
        found |= {"vision_aspect_ratio": f"anyres_max_{r.choice([1, 2, 9])}"}
        return config | found | {"vision_feature_select_strategy": "default" if clip else "full"}


@dataclass(frozen=True)
class Tiles(Picture):
    """A picture and the rows of the tower's answer that its tokens are made of."""

    size: tuple[int, int]  # height and width, of which transformers infers the grid
    rows: np.ndarray  # [I,4] int64: of all tiles [T*n], or NEWLINE
    weights: np.ndarray  # [I,4] float32


class OnevisionTower(SquaresTower):
    """Several tiles a picture; newlines and interpolation."""

    prefixes = (*SquaresTower.prefixes, "model.image_newline")

    def __init__(self, config: Config):
        super().__init__(config)
        self.grids = [tuple(grid) for grid in config["image_grid_pinpoints"]]
        self.most = int(config["vision_aspect_ratio"].strip("anyres_max_"))  # noqa: B005 (as transformers reads it)
        self.inputs = (
            *self.inputs,
            Port("token_rows", np.int64, (dims.IMAGE_TOKENS, TAPS)),
            Port("token_weights", np.float32, (dims.IMAGE_TOKENS, TAPS)),
        )

    def compute(self, model: Any, pixel_values: Any, **given: Any) -> tuple[Any, ...]:
        """What the vision graph gives (torch)."""
        import torch

        tiles = self.projected(model, pixel_values).flatten(0, 1)
        table = torch.cat([model.image_newline[None], tiles])
        rows, weights = given["token_rows"], given["token_weights"]
        parts = [table.index_select(0, rows[:, i]) * weights[:, i : i + 1] for i in range(TAPS)]
        return (parts[0] + parts[1] + parts[2] + parts[3],)

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together. The newline is row 0 of its table."""
        rows, start = [], 1
        for picture in map(_tiles, pictures):
            rows.append(np.where(picture.rows == NEWLINE, 0, picture.rows + start))
            start += len(picture.pixels) * len(self.cells)
        weights = np.concatenate([_tiles(p).weights for p in pictures])
        return super().feeds(pictures) | {"token_rows": np.concatenate(rows), "token_weights": weights}

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings from stock transformers."""
        import torch

        return {"image_embeds": torch.cat(tuple(model.get_image_features(**given, return_dict=True).pooler_output))}

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids. Pictures of one tile are several of one question there."""
        most = max(len(p.pixels) for p in pictures)
        pixels = [np.pad(p.pixels, ((0, most - len(p.pixels)), (0, 0), (0, 0), (0, 0))) for p in pictures]
        counts: list[int] = []
        for i, picture in enumerate(pictures):
            joins = i and len(picture.pixels) == 1 and len(pictures[i - 1].pixels) == 1
            counts = [*counts[:-1], counts[-1] + 1] if joins else [*counts, 1]
        sizes = np.array([_tiles(p).size for p in pictures], np.int64)
        return {"pixel_values": np.stack(pixels), "image_sizes": sizes, "batch_num_images": np.array(counts, np.int64)}

    def rule(self, processor: Config) -> TileRule:
        """The rule in a preprocessor_config.json; sizes that it leaves out are the tower's own. Raises InputError."""
        return _tile_rule(processor, self.size, self.grids)

    def rule_for(self, rule: TileRule, pictures: int) -> TileRule:
        """Only one picture alone is tiled."""
        return replace(rule, tiled=pictures == 1)

    def picture(self, image: Image.Image, rule: TileRule) -> Tiles:
        """A PIL RGB picture as tiles. Raises InputError for one that is too long and thin."""
        width, height = image.size
        if rule.tiled:
            grid, (w, h) = self.grid(height, width), self.resized(image.size, rule)
            canvas = rule.colours.resized(image, w, h)
            left, top = ((n - m) // 2 for n, m in zip(grid[::-1], (w, h), strict=True))
            canvas = canvas.crop((-left, -top, grid[1] - left, grid[0] - top))  # black beyond the picture
            shown = [rule.colours.resized(image, self.size, self.size), *self._cut(canvas)]
            layout, rows, weights = self._joined(height, width)
        else:
            shown = [rule.colours.resized(padded(image, rule.background), self.size, self.size)]
            layout, rows, weights = self._single(height, width)
        pixels = np.stack([rule.colours.read(tile) for tile in shown])
        return Tiles(pixels, layout, (height, width), rows, weights)

    def _cut(self, canvas: Image.Image) -> list[Image.Image]:
        corners = [(x, y) for y in range(0, canvas.height, self.size) for x in range(0, canvas.width, self.size)]
        return [canvas.crop((x, y, x + self.size, y + self.size)) for x, y in corners]

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        """Of the grids in config.json (height, width) the one that keeps most of a picture, the smallest of several."""

        def kept(grid: tuple[int, ...]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - math.prod(grid)

        return max(self.grids, key=kept)

    def resized(self, size: tuple[int, int], rule: TileRule) -> tuple[int, int]:
        """(width, height) at which its largest version is read."""
        width, height = size
        if not rule.tiled:
            return (max(1, round(width * self.size / max(size))), max(1, round(height * self.size / max(size))))
        grid = self.grid(height, width)
        if grid[1] / width < grid[0] / height:
            return grid[1], min(math.ceil(height * (grid[1] / width)), grid[0])
        return min(math.ceil(width * (grid[0] / height)), grid[1]), grid[0]

    def _single(self, height: int, width: int) -> tuple[Layout, np.ndarray, np.ndarray]:
        """One tile with the picture in its middle, and a newline."""
        cell, side = max(height, width) * self.patch / self.size, max(height, width)
        down, along = ((-((side - n) // 2), cell, n) for n in (height, width))
        layout = covering(down, along, self.side, (*self.cells, -1))
        rows, weights = _alone(np.append(np.arange(self.side**2), NEWLINE))
        return layout, rows, weights

    def _joined(self, height: int, width: int) -> tuple[Layout, np.ndarray, np.ndarray]:
        """The whole picture as one tile, then all others as one grid without their border; a newline after each row.

        Raises InputError where interpolation leaves nothing.
        """
        side, count = self.side, self.side**2
        grid = [n // self.size for n in self.grid(height, width)]
        (y, x), (down, along) = np.divmod(np.indices((grid[0] * side, grid[1] * side)), side)
        rows = count + (y * grid[1] + x) * count + down * side + along  # of the tower's answer, [rows, columns]
        rows = _filled(rows, height, width)
        h, w = rows.shape
        whole = _alone(np.arange(count))
        ratio = math.sqrt(h * w / (self.most * count))
        if ratio > 1.1:
            h, w = int(h // ratio), int(w // ratio)
        if rows.size and not h * w:
            what = f"interpolation leaves {h}x{w} cells of {width}x{height} pixels"
            raise InputError(what, fix="crop the picture")
        taps, weights = _interpolated(rows, (h, w))
        taps = np.concatenate([taps, np.full((h, 1, TAPS), NEWLINE)], 1).reshape(-1, TAPS)
        ends = np.zeros((h, 1, TAPS), np.float32)
        ends[..., 0] = 1
        weights = np.concatenate([weights, ends], 1).reshape(-1, TAPS)
        cells = np.pad(np.arange(h * w).reshape(h, w), ((0, 0), (0, 1)), constant_values=-1).ravel()
        layout = Layout((1, h, w), (-1,) * count + tuple(cells.tolist()))
        if not rows.size:  # of a thin strip no row or column is left: its cells are those of the whole picture
            layout = Layout((1, side, side), (*range(count), *cells.tolist()))
        return layout, np.concatenate([whole[0], taps]), np.concatenate([whole[1], weights])

    def probes(self, rng: np.random.Generator) -> list[Picture]:
        """A flat strip and a high one, each in the smallest grid that it fits."""
        found: list[Picture] = []
        for height, width in ((2 * self.patch, 2 * self.size), (2 * self.size, 2 * self.patch + 1)):
            layout, rows, weights = self._joined(height, width)
            count = 1 + math.prod(self.grid(height, width)) // self.size**2
            found.append(Tiles(self.smooth(count, rng), layout, (height, width), rows, weights))
        return found

    def sized(self, tokens: int, rng: np.random.Generator) -> list[Picture]:
        """Several pictures of one tile each. Raises InputError if none have so many image tokens."""
        layout, rows, weights = self._single(self.size, self.size)
        count, rest = divmod(tokens, layout.tokens)
        if rest:
            fix = f"give a multiple of {layout.tokens}"
            raise InputError(f"{tokens} image tokens are no whole pictures", where="--image-tokens", fix=fix)
        size = (self.size, self.size)
        return [Tiles(tile[None], layout, size, rows, weights) for tile in self.smooth(count, rng)]

    def memory(self, picture: Picture) -> int:
        """Besides the tower's: rows that were gathered and their sum."""
        return super().memory(picture) + 3 * 4 * picture.tokens * self.hidden

    def engine_memory(self, patches: int, fused: bool) -> int:
        """Besides the tower's: rows that were gathered and their sum."""
        return (
            super().engine_memory(patches, fused)
            + 3 * 4 * self.axis_ranges(patches)[dims.IMAGE_TOKENS][2] * self.hidden
        )

    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """One picture at a time; the most tokens are those of tiles above one another, each row with its newline."""
        tiles, count = self.most_tiles(patches), self.side**2
        most = tiles * count + max(1, tiles - 1) * self.side
        return {
            TILES: (1, max(1, tiles // 2), tiles),
            dims.IMAGE_TOKENS: (count, max(count, most // 2), most),
        }


def _tiles(picture: Picture) -> Tiles:
    assert isinstance(picture, Tiles)  # this tower made it
    return picture


FAMILY = LlavaOnevision()


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class TileRule:
    """How pictures become tiles: the fields of preprocessor_config.json that LLaVA-OneVision's processor reads."""

    colours: Colours
    background: tuple[int, ...]  # around one of several pictures
    tiled: bool = True  # else one tile


def _tile_rule(processor: Config, size: int, grids: Sequence[tuple[int, ...]]) -> TileRule:
    """Read as transformers' processor reads it: null is an absent key. Raises InputError."""
    processor, where = {k: v for k, v in processor.items() if v is not None}, RULE_FILE
    kind = str(processor.get("image_processor_type") or "LlavaOnevisionImageProcessor")
    if not kind.startswith("LlavaOnevision"):
        fix = "give the file of the LLaVA-OneVision checkpoint that this one was made from"
        raise InputError(f"image_processor_type {kind!r} cuts pictures in another way", where=where, fix=fix)
    if not flag(processor, "do_resize", True, where) or flag(processor, "do_center_crop", False, where):
        what = "do_resize = false and do_center_crop = true are not supported"
        raise InputError(what, where=where, fix="remove the key")
    if square_size(processor, "size", size) not in (size, (size, size)):
        what = f"size = {processor['size']!r}, the tower of {WHERE} reads {size} pixels"
        raise InputError(what, where=where, fix=FIX)
    given = processor.get("image_grid_pinpoints", grids)
    listed = [tuple(g) if isinstance(g, list | tuple) else g for g in given] if isinstance(given, list | tuple) else []
    if listed != list(grids):
        fix = "the two files belong to different models"
        raise InputError(f"image_grid_pinpoints differ from those of {WHERE}", where=where, fix=fix)
    background = tuple(int(x * 255) for x in of_bands(processor, "image_mean", CLIP_MEAN))
    return TileRule(Colours.of(processor, CLIP_MEAN, CLIP_STD, BICUBIC), background)


def _filled(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """The cells [rows, columns] that a picture of this size fills, in the middle of them."""
    rows, columns = cells.shape
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return cells[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return cells[:, border : columns - border]


def _alone(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [I] taken as they are: [I,4] of which the first counts."""
    weights = np.zeros((len(rows), TAPS), np.float32)
    weights[:, 0] = 1
    return np.repeat(rows[:, None], TAPS, 1).astype(np.int64), weights


def _interpolated(rows: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows [h,w] and weights of a grid of another size, [h2,w2,4] int64 and float32: bilinear, corners not aligned."""
    index, weight = [], []
    for axis in range(2):
        there, here = rows.shape[axis], size[axis]
        at = (np.arange(here, dtype=np.float32) + np.float32(0.5)) * np.float32(there / max(here, 1)) - np.float32(0.5)
        at = np.maximum(at, 0)
        low = np.minimum(np.floor(at).astype(np.int64), there - 1)
        index.append(np.stack([low, np.minimum(low + 1, there - 1)], 1))
        weight.append(np.stack([1 - (at - low), at - low], 1).astype(np.float32))
    taps = rows[index[0][:, None, :, None], index[1][None, :, None, :]]
    weights = weight[0][:, None, :, None] * weight[1][None, :, None, :]
    return taps.reshape(*size, TAPS).astype(np.int64), weights.reshape(*size, TAPS)
