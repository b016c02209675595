"""LLaVA-1.5: what is particular to `model_type = llava`: a CLIP or SigLIP tower, its projector, and any plain decoder.

    picture -> resized, cut to a square of s x s pixels -> tower -> features of some layers -> projector -> image tokens

A picture has always as many image tokens: (s / patch)^2, 576 of LLaVA-1.5, one more with the token of the whole picture.

Source: LLaVA-1.5 (arXiv 2310.03744), section 3.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.colours import BICUBIC, CLIP_MEAN, CLIP_STD, RULE_FILE, Bands, Colours, of_bands
from ..base.errors import InputError
from ..base.settings import FIX, flag
from . import (
    Arrays,
    Config,
    Family,
    Layout,
    Picture,
    Port,
    Range,
    Shape,
    Tower,
    check_image_token,
    embeds,
    find,
)
from .idefics3 import ATTENTION, TILES, register_attention, text_model
from .qwen2_vl import MAX_RATIO

if TYPE_CHECKING:
    import torch
    from PIL import Image

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
LARGEST = 8  # times its side: what a square is cut out of; more would take memory for pixels that nothing reads
WHOLE = {CLIP: 1, SIGLIP: 0}  # tokens before those of the patches: CLIP has one for the whole picture


class Llava(Family):
    """The decoder is another family's; `text_config` says which."""

    model_class = "LlavaForConditionalGeneration"
    layer = "model.language_model.layers.{layer}."
    embedding = "model.language_model.embed_tokens.weight"

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        outer, text = config.get("eos_token_id"), config["text_config"]  # `outer` before the decoder's
        found = text_model(config).shape(text if outer is None else {**text, "eos_token_id": outer})
        return replace(found, sees=True, image_token=config["image_token_index"])

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        text = config["text_config"]
        text_model(config).check_config(text)
        check_image_token(config["image_token_index"], text)
        _check_vision(config["vision_config"])
        _chosen_layers(config)

    def tower(self, config: Config) -> Tower:
        """The vision tower of a checkpoint."""
        return SquareTower(config)

    def sample(self, seed: int) -> dict[str, Any]:
        """CLIP or SigLIP, features of one layer or several, any plain decoder."""
        r, kind = random.Random(seed), (CLIP, SIGLIP)[seed % 2]
        layers = r.choice([2, 3])
        chosen = r.choice([-1, -2, [-1], [0, -2], [-2, 1, -1]])
        heads, patch, side = r.choice([1, 2]), r.choice([2, 4]), r.choice([2, 3])
        vision = {
            "model_type": kind, "hidden_size": heads * r.choice([8, 16]), "intermediate_size": r.choice([20, 33]),
            "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": patch * side + r.choice([0, 1]),
            "patch_size": patch, "hidden_act": r.choice(["quick_gelu", "gelu_pytorch_tanh"]),
            **({"projection_dim": 16} if kind == CLIP else {"vision_use_head": False}),
        }  # fmt: skip
        text = find(("llama", "qwen2", "qwen3")[seed % 3]).sample(seed)
        found = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": 5}
        found |= {"vision_feature_layer": chosen, "vision_feature_select_strategy": r.choice(["default", "full"])}
        found |= {"multimodal_projector_bias": r.random() < 0.7, "projector_hidden_act": r.choice(["gelu", "silu"])}
        return found


def _check_vision(vision: Config) -> None:
    """Raises InputError for a tower that is unknown or has no whole patches."""
    where, kind = "config.json: vision_config", vision["model_type"]
    if kind not in WHOLE:
        raise InputError(f"a tower of type {kind!r} is not supported", where=where, fix=f"known: {', '.join(WHOLE)}")
    for key in ("image_size", "patch_size", "num_attention_heads"):
        if type(vision[key]) is not int or vision[key] < 1:
            raise InputError(f"{key} = {vision[key]!r} is not one whole number", where=where)
    if vision["image_size"] < vision["patch_size"]:
        raise InputError("image_size is smaller than patch_size", where=where)
    if vision["num_channels"] != 3:
        raise InputError(f"num_channels = {vision['num_channels']!r}, pictures have 3", where=where)


def _chosen_layers(config: Config) -> list[int]:
    """After how many layers of the tower its features are taken; several lie side by side. Raises InputError."""
    layers, chosen = config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]
    found = chosen if isinstance(chosen, list) else [chosen]
    if not found or not all(type(i) is int and -layers - 1 <= i <= layers for i in found):
        what = f"vision_feature_layer = {chosen!r} are not among the {layers + 1} hidden states of the tower"
        raise InputError(what, where="config.json")
    return [i % (layers + 1) for i in found]


class SquaresTower(Tower):
    """Squares of one size, attention within each; tokens of patches row by row. What a picture becomes, subclasses say."""

    prefixes: tuple[str, ...] = ("model.vision_tower.", "model.multi_modal_projector.")
    min_side = 1
    max_ratio = MAX_RATIO  # a longer strip would be enlarged to gigabytes

    def __init__(self, config: Config):
        vision = config["vision_config"]
        self.size, self.patch = int(vision["image_size"]), int(vision["patch_size"])
        self.heads = int(vision["num_attention_heads"])
        self.width, self.ffn = int(vision["hidden_size"]), int(vision["intermediate_size"])
        self.side: int = self.size // self.patch  # patches along one side
        self.kind, self.layers = vision["model_type"], _chosen_layers(config)
        self.hidden = int(config["text_config"]["hidden_size"])
        self.left_out = 1 if config["vision_feature_select_strategy"] == "default" else 0  # tokens at the beginning
        whole = WHOLE[self.kind]
        self.read = whole + self.side**2  # tokens that attend to one another
        # Of every token that a tile becomes the patch that it covers, -1: all of them.
        self.cells = ((-1,) * whole + tuple(range(self.side**2)))[self.left_out :]
        self.inputs = (Port("pixel_values", np.float32, (TILES, 3, self.size, self.size)),)
        self.outputs = (embeds(self.hidden),)

    def module(self, model: Any) -> torch.nn.Module:
        """The tower and its projector, with what the host computes as keywords."""
        from torch import nn

        register_attention()
        compute = self.compute

        class Vision(nn.Module):
            """pixel_values [T,3,s,s] and the host's arrays -> image embeddings [I,D]."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model
                for module in model.model.vision_tower.modules():
                    if hasattr(module, "config"):
                        module.config._attn_implementation = ATTENTION

            def forward(self, **given: Any) -> Any:
                return compute(self.model.model, **given)

        return Vision()

    def compute(self, model: Any, pixel_values: Any, **given: Any) -> tuple[Any, ...]:
        """What the vision graph gives (torch); `given`: its further inputs by name."""
        return (self.projected(model, pixel_values).flatten(0, 1),)

    def projected(self, model: Any, tiles: Any) -> Any:
        """[T,3,s,s] -> [T,n,D] (torch): no more layers of the tower run than features are taken from."""
        import torch

        tower = model.vision_tower
        states = [tower.embeddings(tiles)]
        if self.kind == CLIP:
            states[0] = tower.pre_layrnorm(states[0])
        for layer in tower.encoder.layers[: max(self.layers)]:
            states.append(layer(states[-1], None))
        found = [states[i][:, self.left_out :] for i in self.layers]
        return model.multi_modal_projector(torch.cat(found, -1))

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""
        return {"pixel_values": np.concatenate([p.pixels for p in pictures])}

    def sample(self, rng: np.random.Generator) -> list[Picture]:
        """Up to three pictures of any sizes, also strips."""
        from PIL import Image

        sizes = [(5, 5), (30, 20), (9, 31), (60, 60), (70, 8), (200, 3), (3, 200)]
        chosen = [sizes[i] for i in rng.integers(0, len(sizes), rng.integers(1, 4))]
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in chosen]
        rule = self.rule_for(self.rule({}), len(images))
        return [self.picture(image, rule) for image in images]

    def memory(self, picture: Picture) -> int:
        """Scores of every head; the residual stream, queries, keys, values and the FFN of every tile."""
        # Of 37 tiles of SigLIP so400m 2.0 GB were measured, where this says 2.6.
        token = 4 * (4 * self.width + self.ffn + len(self.layers) * self.width + 2 * self.hidden)
        return len(picture.pixels) * self.read * (4 * self.heads * self.read + token)

    def engine_memory(self, patches: int, fused: bool) -> int:
        """The same of as many tiles as `axis_ranges` allows; scores in 16 bit, and none where attention is fused."""
        token = 4 * (4 * self.width + 2 * self.ffn + len(self.layers) * self.width + 2 * self.hidden)
        scores = 0 if fused else 2 * 2 * self.heads * self.read
        return self.most_tiles(patches) * self.read * (scores + token)

    def most_tiles(self, patches: int) -> int:
        """How many tiles a picture of up to `patches` patches has."""
        return max(1, patches // self.side**2)

    def smooth(self, tiles: int, rng: np.random.Generator) -> np.ndarray:
        """Made-up tiles [T,3,s,s] that are no noise."""
        waves = np.sin(np.linspace(0, 9, 3 * self.size**2) + rng.uniform(0, 6.28, (tiles, 1)))
        pixels = waves.reshape(tiles, 3, self.size, self.size)
        return np.asarray(pixels + 0.3 * rng.standard_normal(pixels.shape), np.float32)


class SquareTower(SquaresTower):
    """One tile a picture."""

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings from stock transformers."""
        import torch

        found = model.get_image_features(given["pixel_values"], return_dict=True)
        return {"image_embeds": torch.cat(tuple(found.pooler_output))}

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids."""
        return self.feeds(pictures)

    def rule(self, processor: Config) -> SquareRule:
        """The rule in a preprocessor_config.json; sizes that it leaves out are the tower's own. Raises InputError."""
        return _square_rule(processor, self.size)

    def picture(self, image: Image.Image, rule: SquareRule) -> Picture:
        """A PIL RGB picture as the tower reads it."""
        size = image.size
        if rule.pads:
            image = padded(image, rule.background)
        if rule.resized is not None:
            image = rule.colours.resized(image, *rule.target(image.size))
        left, top = ((side - self.size) // 2 for side in image.size)
        cut = image.crop((left, top, left + self.size, top + self.size))  # zeros where the picture is smaller
        pixels = rule.colours.read(cut)[None]
        scale = [max(size) / s if rule.pads else n / s for n, s in zip(size, image.size, strict=True)]
        border = [(max(size) - n) // 2 if rule.pads else 0 for n in size]
        places = [
            (start * times - before, self.patch * times, n)
            for start, times, before, n in zip((left, top), scale, border, size, strict=True)
        ]
        return Picture(pixels, covering(places[1], places[0], self.side, self.cells))

    def resized(self, size: tuple[int, int], rule: SquareRule) -> tuple[int, int]:
        """(width, height) after the resize."""
        return size if rule.resized is None else rule.target((max(size),) * 2 if rule.pads else size)

    def probes(self, rng: np.random.Generator) -> list[Picture]:
        """Two smooth pictures."""
        return [self._whole(tile[None]) for tile in self.smooth(2, rng)]

    def sized(self, tokens: int, rng: np.random.Generator) -> list[Picture]:
        """As many pictures as have so many image tokens. Raises InputError if none do."""
        count, rest = divmod(tokens, len(self.cells))
        if rest:
            fix = f"give a multiple of {len(self.cells)}"
            raise InputError(f"{tokens} image tokens are no whole pictures", where="--image-tokens", fix=fix)
        return [self._whole(tile[None]) for tile in self.smooth(count, rng)]

    def _whole(self, pixels: np.ndarray) -> Picture:
        return Picture(pixels, Layout((1, self.side, self.side), self.cells))

    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """One picture at a time."""
        return {TILES: (1, 1, 1)}

    def most_tiles(self, patches: int) -> int:
        """Whatever its size."""
        return 1


FAMILY = Llava()


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class SquareRule:
    """How a picture becomes a square: padded to one, resized, or cut out of the middle."""

    colours: Colours
    background: tuple[int, ...]  # of what is padded
    pads: bool
    resized: int | tuple[int, int] | None  # pixels of the short side, or height and width

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) after the resize."""
        if isinstance(self.resized, tuple):
            return self.resized[::-1]
        assert self.resized is not None  # else nothing is resized
        short, long = min(size), max(size)
        new = int(self.resized * long / short)
        return (self.resized, new) if size[0] <= size[1] else (new, self.resized)


# Of transformers' image processors: whether they pad a picture to a square and cut one out, mean and std, as they are.
_KINDS: dict[str, tuple[bool, bool, Bands, Bands]] = {
    "LlavaImageProcessor": (True, True, CLIP_MEAN, CLIP_STD),
    "CLIPImageProcessor": (False, True, CLIP_MEAN, CLIP_STD),
    "SiglipImageProcessor": (False, False, (0.5,) * 3, (0.5,) * 3),
}


def _square_rule(processor: Config, size: int) -> SquareRule:
    """Read as transformers' processors read it: null is an absent key. Raises InputError."""
    processor, where = {k: v for k, v in processor.items() if v is not None}, RULE_FILE
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or next(iter(_KINDS)))
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        fix = f"known: {', '.join(_KINDS)}"
        raise InputError(f"image_processor_type {kind!r} cuts pictures in another way", where=where, fix=fix)
    pads, crops, mean, std = _KINDS[kind]
    pads = pads and flag(processor, "do_pad", False, where)
    resized = square_size(processor, "size", size) if flag(processor, "do_resize", True, where) else None
    cut = square_size(processor, "crop_size", (size, size)) if flag(processor, "do_center_crop", crops, where) else None
    if cut not in (None, size, (size, size)):
        raise InputError(f"crop_size is {cut}, the tower of config.json reads {size} pixels", where=where, fix=FIX)
    if cut is None and resized != (size, size) and not (pads and resized == size):
        fix = f"add do_center_crop = true, or a size of height and width {size}"
        raise InputError(f"pictures do not become squares of {size} pixels", where=where, fix=fix)
    if max(resized if isinstance(resized, tuple) else (resized or 0,)) > LARGEST * size:
        what = f"size = {processor['size']!r} is more than {LARGEST} times the {size} pixels that the tower reads"
        raise InputError(what, where=where, fix=FIX)
    background = tuple(int(x * 255) for x in of_bands(processor, "image_mean", mean))
    return SquareRule(Colours.of(processor, mean, std, BICUBIC), background, pads, resized)


def square_size(processor: Config, key: str, default: int | tuple[int, int]) -> int | tuple[int, int]:
    """Pixels of the short side, or height and width: as transformers reads one. Raises InputError."""
    value = processor.get(key, default)
    if isinstance(value, dict):
        sides = {"shortest_edge"}, {"height", "width"}
        names = next((n for n in sides if set(value) == n), None)
        found = [value[name] for name in sorted(names)] if names else []
    else:
        found = list(value) if isinstance(value, list | tuple) else [value]
    if len(found) not in (1, 2) or not all(type(side) is int and side > 0 for side in found):
        raise InputError(f"{key} = {value!r} is no size that is supported", where=RULE_FILE, fix=FIX)
    if len(found) == 1 and key == "crop_size":
        return found[0], found[0]
    return found[0] if len(found) == 1 else (found[0], found[1])


def padded(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square."""
    from PIL import Image as pil

    side = max(image.size)
    out = pil.new("RGB", (side, side), background)
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out


Place = tuple[float, float, int]  # of a row of cells along one side of a picture, in its pixels: start, step, the side


def covering(down: Place, along: Place, side: int, cells: Sequence[int]) -> Layout:
    """How the cells of a tile of side x side patches lie in a picture that it shows a part of, or more than it.

    The cells of the picture that no token sees are counted, too; tokens outside of the picture cover none.
    """
    (rows, row), (columns, column) = (_along(place, side) for place in (down, along))
    inside = [r * columns + c if min(r, c) >= 0 else -1 for r in row for c in column]
    return Layout((1, rows, columns), tuple(inside[cell] if cell >= 0 else -1 for cell in cells))


def _along(place: Place, count: int) -> tuple[int, list[int]]:
    """How many cells the side of the picture has, and of each of the tile's the one that it is, or -1."""
    start, step, length = place
    middles = [start + (i + 0.5) * step for i in range(count)]
    seen = [i for i, at in enumerate(middles) if 0 <= at < length]
    seen = seen or [min(range(count), key=lambda i: abs(middles[i] - length / 2))]
    before, after = (max(0, round(part / step)) for part in (start, length - start - count * step))
    index = [-1] * count
    for i, cell in enumerate(seen):
        index[cell] = before + i
    return before + len(seen) + after, index
