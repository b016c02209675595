"""Idefics3: what is particular to `model_type = idefics3` (also the first SmolVLM): pictures in tiles of one size.

    picture -> rows x columns tiles, then the whole picture once more at the size of a tile; a small one: that tile alone
    tile    -> (S / p)^2 patches -> the tower -> merge x merge neighbours become one image token -> n tokens
    prompt     @<row_1_col_1> n tokens @<row_1_col_2> n tokens \\n .. \\n\\n@<global-img> n tokens @

@ is <fake_token_around_image>. Tiles are made whole: no patch is padding, and attention within a tile needs no mask. What
stands between the image tokens of two tiles is text, which no policy drops. `TileTower` serves other families of tiles, too.
Source: Idefics3 (arXiv 2408.12637); tiles as in transformers' Idefics3ImageProcessor.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..base.colours import RULE_FILE, Colours
from ..base.errors import InputError
from ..base.settings import flag
from . import IMAGE, Arrays, Config, Family, Layout, Picture, Port, Range, Shape, Tower, check_image_token, embeds, find

if TYPE_CHECKING:
    import torch
    from PIL import Image

ATTENTION = "cm_export_tiles"
TILES = "tiles"  # axis of the vision graph
PROBED = 3  # tiles of the larger picture of the probe, which every engine takes
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"
LONGEST = 4096  # pixels of the long side of a picture, whatever `size` says


class Idefics3(Family):
    """Plain rotary positions; the decoder is a text model of its own type."""

    model_class = "Idefics3ForConditionalGeneration"
    model_type: ClassVar[str] = "idefics3"
    layer = "model.text_model.layers.{layer}."
    embedding = "model.text_model.embed_tokens.weight"

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        return self.tower(config).holding(text_shape(config), 4 * 4)

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        check_text(config)
        vision, scale = config["vision_config"], config["scale_factor"]
        check_tile(vision, vision["image_size"], vision["patch_size"])
        if type(scale) is not int or scale < 1 or vision["image_size"] // vision["patch_size"] % scale:
            side = vision["image_size"] // vision["patch_size"]
            raise InputError(f"scale_factor {scale!r} does not divide {side} patches", where="config.json")

    def tower(self, config: Config) -> TileTower:
        """The vision tower of a checkpoint."""
        return Idefics3Tower(config)

    def sample(self, seed: int) -> dict[str, Any]:
        """Any plain decoder; also tiles of which a patch does not use all pixels, as in SmolVLM2-2.2B."""
        r, text = random.Random(seed), sampled_text(("llama", "llama", "qwen2"), seed)
        patch, merge, side, heads = r.choice([2, 3, 4]), r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 2, 4])
        vision = {
            "hidden_size": heads * r.choice([8, 16]), "intermediate_size": r.choice([20, 33]),
            "num_hidden_layers": r.choice([1, 2]), "num_attention_heads": heads, "num_channels": 3,
            "image_size": patch * merge * side + r.choice([0, patch - 1]), "patch_size": patch,
            "hidden_act": r.choice(["gelu_pytorch_tanh", "gelu", "relu"]),
        }  # fmt: skip
        found = {"model_type": self.model_type, "text_config": text, "vision_config": vision, "scale_factor": merge}
        return found | {"image_token_id": 5, "tie_word_embeddings": text["tie_word_embeddings"], "pad_token_id": 0}


def sampled_text(kinds: Sequence[str], seed: int) -> dict[str, Any]:
    """A tiny decoder of one of these model types."""
    return find(random.Random(seed).choice(kinds)).sample(seed)


def text_model(config: Config) -> Family:
    """The family of the decoder inside a model that sees. Raises InputError."""
    kind = config["text_config"]["model_type"]
    names = ("layer", "gate", "up", "down", "attention_out", "value")
    try:
        found = find(kind)
    except InputError as e:
        what = f"text_config.model_type {kind!r} is not supported"
        raise InputError(what, where="config.json", fix=e.fix) from e
    if any(getattr(found, name) != getattr(Family, name) for name in names):
        raise InputError(f"text_config.model_type {kind!r} is no plain decoder", where="config.json")
    return found


def text_shape(config: Config) -> Shape:
    """Sizes of a model whose decoder is of a type of its own. Raises InputError."""
    outer = config.get("eos_token_id")  # before the decoder's, where both are stated
    text = config["text_config"]
    found = text_model(config).shape(text if outer is None else {**text, "eos_token_id": outer})
    return replace(found, sees=True, image_token=config["image_token_id"])


def check_text(config: Config) -> None:
    """Raises InputError for a decoder that its own family refuses, or an image token outside the vocabulary."""
    text_model(config).check_config(config["text_config"])
    check_image_token(config["image_token_id"], config["text_config"])


def check_tile(vision: Config, size: Any, patch: Any) -> None:
    """Raises InputError unless whole numbers of pixels make a tile and a patch, and pictures have three colours."""
    where = "config.json"
    for key, value in (("image_size", size), ("patch_size", patch)):
        if type(value) is not int or value < 1:
            raise InputError(f"vision_config.{key} = {vision[key]!r} is not one whole number", where=where)
    if size < patch:
        raise InputError(f"vision_config.image_size = {size} is less than one patch, {patch}", where=where)
    if vision["num_channels"] != 3:
        raise InputError(f"vision_config.num_channels = {vision['num_channels']!r}, pictures have 3", where=where)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class TileRule:
    """How Idefics3's processor makes tiles of a picture."""

    colours: Colours
    longest: int | None  # pixels to which the long side is brought first; None: the picture's own
    splits: bool

    def canvas(self, size: tuple[int, int], tile: int) -> list[tuple[int, int]]:
        """(width, height) to which a picture is resized, one after the other; the last one is cut into tiles."""
        sizes = [] if self.longest is None else [bounded(brought_to(size, self.longest))]
        width, height = sizes[0] if sizes else size
        if not self.splits:
            return [*sizes, (tile, tile)]
        ratio = width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / ratio) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * ratio) / tile) * tile
        return [*sizes, (width, height)]


def brought_to(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with a long side of `longest` pixels and an even short one."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def bounded(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height), no side above LONGEST."""
    width, height = size
    ratio = width / height
    if width >= height and width > LONGEST:
        width, height = LONGEST, int(LONGEST / ratio)
    elif height > width and height > LONGEST:
        width, height = int(LONGEST * ratio), LONGEST
    return max(width, 1), max(height, 1)


# ---------------------------------------------------------------- towers


class TileTower(Tower):
    """Tiles of one size, attention within each; a tile becomes `side` x `side` image tokens, a picture one tile or more.

    A picture of several tiles ends with a thumbnail, whose tokens cover none of its cells.
    """

    min_side = 1  # a small picture is enlarged
    processors: ClassVar[tuple[str, ...]]  # how the names of the image processors begin whose rules these are

    def __init__(self, vision: Config, size: int, patch: int, merge: int, hidden: int, further: int = 0):
        """`merge`: patches along one side of an image token. `further`: rows that attend with the patches of a tile."""
        self.size, self.side, self.hidden = size, size // patch // merge, hidden
        self.patches = (size // patch) ** 2  # of a tile
        self.rows = self.patches + further
        self.heads, self.width = int(vision["num_attention_heads"]), int(vision["hidden_size"])
        self.ffn = int(vision["intermediate_size"])
        self.inputs = (Port("pixel_values", np.float32, (TILES, 3, size, size)),)
        self.outputs = (embeds(hidden),)

    @abstractmethod
    def network(self, model: Any) -> Callable[[Any], Any]:
        """What the vision graph computes (torch): pixels [T,3,S,S] -> image tokens [T*n,D]; `model` is transformers'."""

    @abstractmethod
    def text(self, rows: int, columns: int) -> str:
        """What stands for a picture of so many tiles in a prompt."""

    @abstractmethod
    def cut(self, image: Image.Image, rule: Any) -> tuple[list[np.ndarray], int, int]:
        """Tiles of a picture [3,S,S], row by row, then the thumbnail; rows and columns of tiles."""

    def holding(self, shape: Shape, tiles: int) -> Shape:
        """The same with a largest picture of so many tiles and a thumbnail."""
        return replace(shape, largest=((tiles + 1) * self.patches, (tiles + 1) * self.side**2))

    def module(self, model: Any) -> torch.nn.Module:
        """The tower and what makes image tokens of its patches."""
        from torch import nn

        register_attention()
        network = self.network(model)

        class Vision(nn.Module):
            """pixel_values [T,3,S,S] -> image embeddings [I,D]."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model
                for module in model.get_encoder("image").modules():
                    if hasattr(module, "config"):
                        module.config._attn_implementation = ATTENTION

            def forward(self, pixel_values: Any) -> tuple[Any]:
                return (network(pixel_values),)

        return Vision()

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids."""
        return self.feeds(pictures)

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""
        return {"pixel_values": np.concatenate([p.pixels for p in pictures])}

    def check_kind(self, processor: Config) -> None:
        """Raises InputError for the rules of another processor."""
        kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or self.processors[0]
        if not str(kind).startswith(self.processors):
            fix = "give the file of the checkpoint that this one was made from"
            raise InputError(f"image_processor_type {kind!r} cuts pictures in another way", where=RULE_FILE, fix=fix)
        if processor.get("do_center_crop"):
            what = "do_center_crop = true, yet pictures are not cropped"
            raise InputError(what, where=RULE_FILE, fix="remove the key")

    def picture(self, image: Image.Image, rule: Any) -> Picture:
        """A PIL RGB picture as tiles."""
        tiles, rows, columns = self.cut(image, rule)
        return Picture(np.ascontiguousarray(np.stack(tiles)), self.layout(rows, columns))

    def layout(self, rows: int, columns: int) -> Layout:
        """Image tokens of a picture of so many tiles: tile by tile, and those of the thumbnail where there are several."""
        side, text = self.side, self.text(rows, columns)
        cells = np.arange(rows * columns * side**2).reshape(rows, side, columns, side).swapaxes(1, 2).ravel().tolist()
        if rows * columns > 1:
            cells += [-1] * side**2
        return Layout((1, rows * side, columns * side), tuple(cells), text)

    def probes(self, rng: np.random.Generator) -> list[Picture]:
        """Two smooth pictures, of one tile and of several."""
        layouts = [self.layout(1, 1), self.layout(1, PROBED - 1)]
        phase = rng.uniform(0, 6.28, (1 + PROBED, 3, 1, 1))
        smooth = np.sin(np.linspace(0, 9, self.size**2).reshape(self.size, self.size) + phase)
        pixels = (smooth + 0.3 * rng.standard_normal(smooth.shape)).astype(np.float32)
        return [Picture(part, layout) for part, layout in zip(np.split(pixels, [1]), layouts, strict=True)]

    def sample(self, rng: np.random.Generator) -> list[Picture]:
        """One picture or two, of up to 2 x 3 tiles."""
        grids = [(int(rng.integers(1, 3)), int(rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
        return [self._random(*grid, rng) for grid in grids]

    def sized(self, tokens: int, rng: np.random.Generator) -> list[Picture]:
        """One picture. Raises InputError unless these are the tokens of whole tiles."""
        each = self.side**2
        tiles = tokens // each
        if tokens % each or tiles == 2:  # one tile, or several and the thumbnail
            fix = f"give {each}, or a multiple of it from {3 * each} on"
            raise InputError(f"no picture has {tokens} image tokens", where="--image-tokens", fix=fix)
        return [self._random(1, max(1, tiles - 1), rng)]

    def _random(self, rows: int, columns: int, rng: np.random.Generator) -> Picture:
        layout = self.layout(rows, columns)
        pixels = rng.standard_normal((layout.tokens // self.side**2, 3, self.size, self.size)).astype(np.float32)
        return Picture(pixels, layout)

    def memory(self, picture: Picture) -> int:
        """Scores of every head, the residual stream with its branches, and the FFN: all tiles of the picture at once."""
        return len(picture.pixels) * 4 * (self.heads * self.rows**2 + self.rows * (4 * self.width + 2 * self.ffn))

    def most_tiles(self, patches: int) -> int:
        """How many tiles a picture of so many patches has; every engine takes the pictures of the probe."""
        return max(PROBED, patches // self.patches)

    def engine_memory(self, patches: int, fused: bool) -> int:
        """Scores unless attention is fused, the residual stream with its branches, the FFN, pixels and embeddings."""
        tiles = self.most_tiles(patches)
        scores = 0 if fused else 2 * 2 * self.heads * self.rows**2
        stream = (4 * 4 + 2 * 4) * self.rows * self.width + 2 * 2 * self.rows * self.ffn
        return tiles * (scores + stream + 4 * (3 * self.size**2 + self.side**2 * self.hidden))

    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """One picture at a time."""
        most = self.most_tiles(patches)
        return {TILES: (1, max(1, most * 3 // 4), most)}


class Idefics3Tower(TileTower):
    """SigLIP with positions by patch, pixel shuffle, and one product that makes image tokens."""

    prefixes = ("model.vision_model.", "model.connector.")
    processors = ("Idefics3", "SmolVLM")

    def __init__(self, config: Config):
        vision = config["vision_config"]
        size, patch = vision["image_size"], vision["patch_size"]
        super().__init__(vision, size, patch, config["scale_factor"], config["text_config"]["hidden_size"])

    def network(self, model: Any) -> Callable[[Any], Any]:
        """What the vision graph computes (torch): the tower's own layers, without a mask."""
        tower, connector = model.model.vision_model, model.model.connector
        # Not in what is traced, where it would be computed each time.
        at = places(tower.embeddings.num_patches_per_side)

        def seen(pixel_values: Any) -> Any:
            patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            hidden = patches + tower.embeddings.position_embedding(at)
            for layer in tower.encoder.layers:
                hidden = layer(hidden, None)
            return connector(tower.post_layernorm(hidden)).flatten(0, 1)

        return seen

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings from stock transformers."""
        import torch

        found = model.get_image_features(given["pixel_values"], return_dict=True)
        return {"image_embeds": torch.cat(tuple(found.pooler_output))}

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids: the tiles of one conversation."""
        return {name: value[None] for name, value in self.feeds(pictures).items()}

    def text(self, rows: int, columns: int) -> str:
        """Every tile after its row and column, a line break after every row; the whole picture last."""
        tokens, cut = IMAGE * self.side**2, ""
        if rows * columns > 1:
            tiles = ([f"{FAKE}<row_{r + 1}_col_{c + 1}>{tokens}" for c in range(columns)] for r in range(rows))
            cut = "".join("".join(row) + "\n" for row in tiles) + "\n"
        return f"{cut}{FAKE}{WHOLE}{tokens}{FAKE}"

    def rule(self, processor: Config) -> TileRule:
        """The rule in a preprocessor_config.json; without one, the tower's own tiles. Raises InputError."""
        self.check_kind(processor)
        tile = processor.get("max_image_size", {"longest_edge": self.size})
        if tile != {"longest_edge": self.size}:
            what = f"max_image_size = {tile!r}, tiles of this model have {self.size} pixels (vision_config.image_size)"
            fix = f'write {{"longest_edge": {self.size}}}'
            raise InputError(what, where=RULE_FILE, fix=fix)
        size = processor.get("size", {"longest_edge": 4 * (364 if processor else self.size)})
        resizes = flag(processor, "do_resize", True, RULE_FILE)
        longest = size.get("longest_edge") if isinstance(size, dict) and len(size) == 1 else None
        if resizes and (type(longest) is not int or longest < 1):
            fix = 'write {"longest_edge": pixels}'
            raise InputError(f"size = {size!r} is not how long a picture's long side is", where=RULE_FILE, fix=fix)
        colours = Colours.of(processor, (0.5,) * 3, (0.5,) * 3, 1)
        return TileRule(colours, longest if resizes else None, flag(processor, "do_image_splitting", True, RULE_FILE))

    def resized(self, size: tuple[int, int], rule: TileRule) -> tuple[int, int]:
        """(width, height) of what is cut into tiles."""
        return rule.canvas(size, self.size)[-1]

    def cut(self, image: Image.Image, rule: TileRule) -> tuple[list[np.ndarray], int, int]:
        """Tiles of a picture, and the whole picture last."""
        for width, height in rule.canvas(image.size, self.size):
            image = rule.colours.resized(image, width, height)
        rows, columns = image.height // self.size, image.width // self.size
        tiles = tiles_of(rule.colours.read(image), rows, columns)
        if len(tiles) > 1:
            tiles.append(rule.colours.read(rule.colours.resized(image, self.size, self.size)))
        return tiles, rows, columns


def tiles_of(pixels: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """[3,H,W] -> rows x columns tiles [3,S,S], row by row."""
    return [tile for row in np.split(pixels, rows, 1) for tile in np.split(row, columns, 2)]


# ---------------------------------------------------------------- what is traced


def register_attention() -> None:
    """Tell transformers about ATTENTION: among all rows of a tile, [T,H,N,d] -> [T,N,H,d]."""
    import torch
    from transformers import AttentionInterface

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, scaling: Any = None, **_: Any
    ) -> tuple[Any, None]:
        return torch.onnx.ops.attention(query, key, value, scale=scaling)[0].transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)


def places(side: int) -> Any:
    """[side^2] int64 (torch): the row of the position table for each patch of a whole tile, as transformers finds it.

    It puts fractions of the side between borders, and where these are rounded, two patches in a row may share a place.
    """
    import torch

    borders = torch.arange(1 / side, 1.0, 1 / side)
    fraction = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    place = torch.bucketize(torch.clamp(fraction, max=1.0 - 1e-6), borders, right=True)
    return (place[:, None] * side + place).flatten()


FAMILY = Idefics3()
