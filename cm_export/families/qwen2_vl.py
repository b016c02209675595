"""Qwen2-VL: what is particular to `model_type = qwen2_vl`, its vision tower included.

    picture -> patches [N, C*2*p*p] + grid (t, h, w) -> I = N / merge^2 image tokens -> positions (t, h, w) per token

Source: Qwen2-VL (arXiv 2409.12191), section 2.1: dynamic resolution and M-RoPE.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..base import dims, environment
from ..base.colours import CLIP_MEAN, CLIP_STD, RULE_FILE, Bands, Colours
from ..base.errors import InputError
from ..base.settings import FIX, flag, is_number, number
from . import (
    Arrays,
    Config,
    Family,
    Frames,
    Layout,
    Picture,
    Pictures,
    Port,
    Range,
    Shape,
    Tower,
    check_decoder,
    check_image_token,
    decoder_shape,
    embeds,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

# transformers hands `cu_seq_lens_q` to implementations whose name contains "flash" and loops over lengths otherwise.
ATTENTION = "cm_export_vision_flash"
CLIP_RULE_FILE = "video_preprocessor_config.json"
CLIP_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
MAX_RATIO = 200  # of a picture's sides: transformers' smart_resize refuses more


class Qwen2VL(Family):
    """M-RoPE: three rows of positions."""

    model_class = "Qwen2VLForConditionalGeneration"
    layer = "model.language_model.layers.{layer}."
    embedding = "model.language_model.embed_tokens.weight"
    tower_output: ClassVar[str] = "hidden_size"  # of vision_config: the width of what the tower gives
    frames_apart: ClassVar[bool] = False  # whether text stands between the frames of a clip

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        own = {"sees": True, "position_axes": 3, "image_token": config["image_token_id"]}
        own["clip_token"] = config["video_token_id"]
        outer = config.get("eos_token_id")  # before the decoder's, where both are stated
        text = config["text_config"]
        return decoder_shape(text if outer is None else {**text, "eos_token_id": outer}, **own)

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        text, vision = config["text_config"], config["vision_config"]
        check_decoder(text)
        check_image_token(config["image_token_id"], text)
        check_vision(vision, self.tower_output, text["hidden_size"])
        check_heads(text)

    def tower(self, config: Config) -> Tower:
        """The vision tower of a checkpoint."""
        return Qwen2VLTower(config["vision_config"])

    def sample(self, seed: int) -> dict[str, Any]:
        """A tiny model: heads, widths, sections of M-RoPE, activation, tying and sizes of the tower drawn at random."""
        r = random.Random(seed)
        kv, group, head_dim = r.choice([1, 2, 3]), r.choice([1, 2, 3, 7]), r.choice([8, 12, 16])
        hidden, half = kv * group * head_dim, head_dim // 2
        a = r.randint(1, half - 2)
        b = r.randint(1, half - a - 1)
        rope = {"rope_type": "default", "rope_theta": r.choice([50.0, 1e4, 1e6]), "mrope_section": [a, b, half - a - b]}
        if r.random() < 0.3:
            rope |= {"rope_type": "linear", "factor": 2.0}
        tied = r.random() < 0.5
        heads = r.choice([1, 2, 4])
        text = {
            "vocab_size": r.choice([61, 96, 131]), "hidden_size": hidden, "intermediate_size": r.choice([33, 64, 97, 160]),
            "num_hidden_layers": r.randint(2, 3), "num_attention_heads": kv * group, "num_key_value_heads": kv,
            "hidden_act": r.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"]),
            "rms_norm_eps": r.choice([1e-5, 1e-6]), "max_position_embeddings": 2048, "tie_word_embeddings": tied,
            "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        vision = {
            "depth": r.randint(1, 2), "embed_dim": heads * r.choice([8, 16]), "hidden_size": hidden, "num_heads": heads,
            "mlp_ratio": r.choice([2, 4]), "patch_size": r.choice([2, 4, 6]), "spatial_merge_size": r.choice([1, 2, 3]),
            "temporal_patch_size": r.choice([1, 2]), "in_channels": 3,
        }  # fmt: skip
        tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
        found = {"model_type": "qwen2_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
        return found | tokens

    def positions(self, picture: np.ndarray, pictures: Pictures) -> tuple[np.ndarray, int]:
        """M-RoPE positions [3,S] int64 of one prompt without padding, and the position of the first answer token.

        Text counts on in all three axes; a picture starts at the next position p and gets (p + t, p + row, p + column),
        where frame i of a clip has t = i * pace; the text after it goes on at p + max(rows, columns).
        """
        out, nxt, at = np.zeros((3, len(picture)), np.int64), 0, 0
        while at < len(picture):
            if picture[at] < 0:
                out[:, at] = nxt
                at, nxt = at + 1, nxt + 1
                continue
            layout = pictures.layouts[picture[at]]
            t, h, w = (1, *layout.grid[1:]) if self.frames_apart else layout.grid
            times = (np.arange(t, dtype=np.float32) * np.float32(layout.pace or 1)).astype(np.int64)
            place = np.meshgrid(times, range(h), range(w), indexing="ij")
            out[:, at : at + t * h * w] = nxt + np.stack(place).reshape(3, -1)
            at, nxt = at + t * h * w, nxt + max(h, w)
        # An answer goes on after the last token, as in transformers' generate, even where a frame before lies further on.
        return out, nxt


def check_vision(vision: Config, output: str, hidden: int) -> None:
    """Raises InputError for a tower of other widths than its decoder; `output` names the width of what it gives."""
    where = "config.json"
    if vision[output] != hidden:
        raise InputError(f"vision_config.{output} differs from text_config.hidden_size", where=where)
    for key in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if type(vision[key]) is not int or vision[key] < 1:
            raise InputError(f"vision_config.{key} = {vision[key]!r} is not one whole number", where=where)
    if vision["in_channels"] != 3:
        raise InputError(f"vision_config.in_channels = {vision['in_channels']!r}, pictures have 3", where=where)


def check_heads(text: Config) -> None:
    """Raises InputError unless the three sections of M-RoPE fill half a head, whose size nothing but hidden_size sets."""
    size = text["hidden_size"] // text["num_attention_heads"]
    if text.get("head_dim") not in (None, size):
        what = f"head_dim {text['head_dim']!r} is not hidden_size / num_attention_heads, {size}"
        raise InputError(what, where="config.json")
    check_sections(text, size, [16, 24, 24])


def check_sections(text: Config, size: int, default: list[int]) -> None:
    """Raises InputError unless the three sections of M-RoPE fill half a head of this size; default: transformers'."""
    sections = (text.get("rope_parameters") or {}).get("mrope_section", default)
    whole = isinstance(sections, list) and all(type(n) is int and n >= 0 for n in sections)
    if not whole or sum(sections) != size // 2:
        what = f"mrope_section {sections!r} does not add up to half of a head, {size // 2}"
        raise InputError(what, where="config.json: rope_parameters")


class Qwen2VLTower(Tower):
    """Any number of patches, attention among those of one picture, merge x merge neighbours become one image token."""

    prefixes = ("model.visual.",)
    attention = ATTENTION  # what its blocks call
    min_side = 1  # a small picture is enlarged
    max_ratio = MAX_RATIO
    may_touch = False  # positions go by runs of image tokens

    def __init__(self, vision: Config):
        self.patch, self.merge, self.temporal = (
            vision["patch_size"],
            vision["spatial_merge_size"],
            vision["temporal_patch_size"],
        )
        self.heads, self.hidden = int(vision["num_heads"]), int(vision["hidden_size"])
        self.width = int(vision.get("embed_dim") or self.hidden)
        self.ffn = int(vision.get("intermediate_size") or vision.get("mlp_ratio", 4) * self.width)
        self.patch_dim: int = vision["in_channels"] * self.temporal * self.patch**2
        self.inputs = (
            Port("pixel_values", np.float32, (dims.PATCHES, self.patch_dim)),
            Port("position_ids", np.int64, (dims.PATCHES, 2)),
            Port("cu_seqlens", np.int64, (f"{dims.SEGMENTS}+1",)),
        )
        self.outputs = (embeds(self.hidden),)

    def module(self, model: Any) -> torch.nn.Module:
        """The tower, with what the host computes as its keywords."""
        from torch import nn

        self.register()
        attention, compute = self.attention, self.compute

        class Vision(nn.Module):
            """pixel_values [N,C*T*p*p] and the host's arrays -> image embeddings [I,D], and further outputs."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model
                for module in model.get_encoder("image").modules():
                    if hasattr(module, "config"):
                        module.config._attn_implementation = attention

            def forward(self, **given: Any) -> Any:
                return compute(self.model.get_encoder("image"), **given)

        return Vision()

    def register(self) -> None:
        """Tell transformers about what its blocks call."""
        register_attention()

    def compute(self, tower: Any, pixel_values: Any, **given: Any) -> tuple[Any, ...]:
        """What the vision graph gives (torch); `tower`: transformers', `given`: the other inputs of the graph by name."""
        return (tower(pixel_values, grid_thw=None, max_seqlen=1, **given).pooler_output,)

    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Image embeddings from stock transformers."""
        import torch

        found = model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
        return {"image_embeds": torch.cat(tuple(found.pooler_output))}

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids: pictures and clips apart, and which tokens are whose."""
        kinds = is_image.astype(np.int32)
        if any(p.layout.is_clip for p in pictures):
            kinds[is_image] = np.repeat([2 if p.layout.is_clip else 1 for p in pictures], [p.tokens for p in pictures])
        out: Arrays = {"mm_token_type_ids": kinds[None]}
        names = (False, "pixel_values", "image_grid_thw"), (True, "pixel_values_videos", "video_grid_thw")
        for is_clip, pixels, grid in names:
            if some := [p for p in pictures if p.layout.is_clip == is_clip]:
                out[pixels] = np.concatenate([p.pixels for p in some])
                out[grid] = np.array([self._patches(p) for p in some], np.int64)
        return out

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""
        pixels = np.concatenate([p.pixels for p in pictures])
        return vision_inputs(pixels, np.array([self._patches(p) for p in pictures], np.int64), self.merge)

    def _patches(self, picture: Picture) -> tuple[int, int, int]:
        frames, rows, columns = picture.grid
        return frames, rows * self.merge, columns * self.merge

    def rule(self, processor: Config) -> ImageRule:
        """The rule in a preprocessor_config.json; sizes that it leaves out are the tower's own. Raises InputError."""
        return image_rule(self._checked(processor))

    def _checked(self, processor: Config) -> dict[str, Any]:
        sizes = {"patch_size": self.patch, "merge_size": self.merge, "temporal_patch_size": self.temporal}
        for key, own in sizes.items():
            if processor.get(key, own) != own:
                what = f"{key} = {processor[key]!r}, the vision_config of config.json says {own}"
                raise InputError(what, where=RULE_FILE, fix="the two files belong to different models")
        return {**processor, **sizes}

    def picture(self, image: Image.Image, rule: ImageRule) -> Picture:
        """A PIL RGB picture as patches. Raises InputError for one that is too long and thin."""
        pixels, grid = patchify([image], rule)
        return self._picture(pixels, tuple(grid[0].tolist()))

    def resized(self, size: tuple[int, int], rule: ImageRule) -> tuple[int, int]:
        """(width, height) after the resize. Raises InputError for a picture that is too long and thin."""
        height, width = target_size(size[1], size[0], rule)
        return width, height

    def _picture(self, pixels: np.ndarray, patches: tuple[int, ...]) -> Picture:
        t, h, w = patches
        return Picture(pixels, Layout((t, h // self.merge, w // self.merge)))

    def clip_rule(self, processor: Config) -> ClipRule:
        """The rule in a video_preprocessor_config.json, or of pictures where there is none. Raises InputError."""
        return clip_rule(processor, self._checked(processor))

    def frames_of(
        self, total: int, fps: float | None, rule: ClipRule, rate: float | None, count: int | None
    ) -> list[int]:
        """As transformers samples them: all, unless a rate or a number is asked for. Raises InputError."""
        count, rate = (
            (rule.count if rate is None else None) if count is None else count,
            rule.rate if rate is None else rate,
        )
        step = self.temporal
        if count is not None:
            count = round(count / step) * step
        elif rate is not None:
            most = min(rule.max_frames, total) // step * step
            count = math.floor(min(max(total / known(fps) * rate, rule.min_frames), most, total) / step) * step
        else:
            count = total
        if not 0 < count <= total:
            raise InputError(f"{count} frames are asked of a clip that has {total}", fix="ask for others with --frames")
        every = total / count
        return [int(np.float32(i * every)) for i in range(math.ceil(total / every))]

    def clip(self, frames: Frames, rule: ClipRule) -> Picture:
        """Frames as patches, the last one again where their number is no multiple. Raises InputError."""
        width, height = frames.images[0].size
        h, w = self.clip_size(len(frames.images), height, width, rule)
        rows = [patches(image.resize((w, h), rule.frames.resample), rule.frames) for image in frames.images]
        rows += [rows[-1]] * (-len(rows) % self.temporal)
        x = np.stack(rows).reshape(-1, self.temporal, *rows[0].shape)  # t, T, patches, C, p*p
        grid = (len(x), h // self.patch, w // self.patch)
        pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1, 4)).reshape(-1, self.patch_dim)
        return Picture(pixels, self.clip_layout(frames, (grid[0], grid[1] // self.merge, grid[2] // self.merge)))

    def clip_size(self, frames: int, height: int, width: int, rule: ClipRule) -> tuple[int, int]:
        """Height and width of each frame in pixels. Raises InputError for a clip that is too long and thin."""
        return target_size(height, width, rule.frames)

    def clip_tokens(self, frames: int, size: tuple[int, int], rule: ClipRule) -> int:
        """Image tokens of a clip of so many chosen frames (width, height). Raises InputError."""
        h, w = self.clip_size(frames, size[1], size[0], rule)
        cell: int = self.patch * self.merge
        pairs: int = -(-frames // self.temporal)
        return pairs * (h // cell) * (w // cell)

    def clip_layout(self, frames: Frames, grid: tuple[int, int, int]) -> Layout:
        """How a clip lies in the prompt: a frame of the grid, made of `temporal` frames, a position after the other."""
        return Layout(grid, pace=1)

    def parts(self, picture: Picture) -> list[Picture]:
        """Frame by frame: none attends to another one."""
        frames, rows, columns = picture.grid
        if frames == 1:
            return [picture]
        return [Picture(part, Layout((1, rows, columns))) for part in np.split(picture.pixels, frames)]

    def probes(self, rng: np.random.Generator) -> list[Picture]:
        """Two smooth pictures of unequal size."""
        m = self.merge
        grid = [(1, 4 * m, 3 * m), (1, 2 * m, 5 * m)]
        sizes = [math.prod(g) for g in grid]
        phase = rng.uniform(0, 6.28, (1, self.patch_dim))
        smooth = np.sin(np.linspace(0, 9, sum(sizes))[:, None] + phase)
        pixels = (smooth + 0.3 * rng.standard_normal((sum(sizes), self.patch_dim))).astype(np.float32)
        parts = np.split(pixels, np.cumsum(sizes)[:-1])
        return [self._picture(part, g) for part, g in zip(parts, grid, strict=True)]

    def sample(self, rng: np.random.Generator) -> list[Picture]:
        """Up to three pictures of any sizes, or a clip for the last one."""
        grids = [(int(rng.integers(1, 5)), int(rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        found = [self._random((1, *grid), rng) for grid in grids]
        if rng.random() < 0.4:
            t = int(rng.integers(1, 4))
            frames = Frames([], range(t * self.temporal), 4 * self.temporal, float(rng.choice([0.5, 2, 24])))
            clip = self._random((t, *grids[-1]), rng)
            found[-1] = Picture(clip.pixels, self.clip_layout(frames, clip.grid))
        return found

    def sized(self, tokens: int, rng: np.random.Generator) -> list[Picture]:
        """One picture, as square as the number allows."""
        rows = max(d for d in range(1, int(tokens**0.5) + 1) if tokens % d == 0)
        return [self._random((1, rows, tokens // rows), rng)]

    def _random(self, grid: tuple[int, int, int], rng: np.random.Generator) -> Picture:
        pixels = rng.standard_normal((math.prod(grid) * self.merge**2, self.patch_dim)).astype(np.float32)
        return Picture(pixels, Layout(grid))

    def memory(self, picture: Picture) -> int:
        """The residual stream, queries, keys, values and what rotates them, the FFN and the outputs of every patch.

        Attention keeps no scores of a part that is one segment, as every part is, where it runs in blocks.
        """
        # Measured with two blocks of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: 84 to 97 % of this, from 1024 to 8192 patches.
        count, outputs = len(picture.pixels), int(len(self.outputs) * self.hidden // self.merge**2)
        scores = 0 if environment.attends_in_blocks() else 4 * self.heads * count**2
        return 4 * (9 * self.width + 2 * self.ffn + outputs) * count + scores

    def engine_memory(self, patches: int, fused: bool) -> int:
        """The mask, scores unless attention is fused, the residual stream with its branches, patches and embeddings."""
        attention = 4 * patches**2 + (0 if fused else 2 * 2 * self.heads * patches**2)
        return attention + (4 * 4 + 2 * 4) * patches * self.width + 4 * patches * (self.patch_dim + self.hidden)

    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """One picture at a time."""
        least = self.merge**2
        return {
            dims.PATCHES: (least, max(least, patches // 4), max(least, patches)),
            f"{dims.SEGMENTS}+1": (2, 2, 2),
        }


FAMILY = Qwen2VL()


# ---------------------------------------------------------------- what is traced


def register_attention() -> None:
    """Tell transformers about ATTENTION: among the patches of one picture, [1,H,N,d] with borders [segments+1]."""
    from transformers import AttentionInterface

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, scaling: Any = None,
        cu_seq_lens_q: Any = None, **_: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        return attend_within_pictures(query, key, value, cu_seq_lens_q, scaling), None

    AttentionInterface.register(ATTENTION, attend)


def attend_within_pictures(query: Any, key: Any, value: Any, borders: Any, scaling: Any) -> Any:
    """[1,H,N,d] -> [1,N,H,d] (torch): no patch reads one beyond the borders [segments+1] around it."""
    import torch

    patch = torch.arange(query.shape[2])
    segment = (patch[:, None] >= borders[None, 1:]).sum(-1)
    mask = torch.where(segment[:, None] == segment[None, :], 0.0, torch.finfo(query.dtype).min)
    out = torch.onnx.ops.attention(query, key, value, mask.to(query.dtype)[None, None], scale=scaling)
    return out[0].transpose(1, 2)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class ImageRule:
    """How a picture becomes patches: the fields of preprocessor_config.json that Qwen2-VL's processor reads."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: float = 56 * 56
    max_pixels: float = 28 * 28 * 1280
    mean: Bands = CLIP_MEAN
    std: Bands = CLIP_STD
    resample: int = 3
    rescale: float = 1 / 255

    @property
    def colours(self) -> Colours:
        """What becomes of colours."""
        return Colours(self.mean, self.std, self.rescale, self.resample)


def image_rule(processor: Config) -> ImageRule:
    """The rule in a preprocessor_config.json, read as transformers' Qwen2VLImageProcessor reads it. Raises InputError.

    There null is no absent key, except among the limits: do_rescale = null rescales nothing, resample = null fails.
    """
    where, d = RULE_FILE, ImageRule()
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or "Qwen2VL"
    if not str(kind).startswith("Qwen2VL"):
        fix = "give the file of the Qwen2-VL checkpoint that this one was made from"
        raise InputError(f"image_processor_type {kind!r} cuts pictures in another way", where=where, fix=fix)
    if not flag(processor, "do_resize", True, where):
        # Then pictures of most sizes could not be cut into merged patches at all.
        raise InputError("do_resize = false is not supported", where=where, fix="remove the key")
    if processor.get("do_center_crop"):
        raise InputError("do_center_crop = true, yet pictures are not cropped", where=where, fix="remove the key")
    (least, most), colours = _limits(processor), Colours.of(processor, d.mean, d.std, d.resample)
    return ImageRule(
        patch=_size(processor, "patch_size", d.patch),
        merge=_size(processor, "merge_size", d.merge),
        temporal=_size(processor, "temporal_patch_size", d.temporal),
        min_pixels=least,
        max_pixels=most,
        mean=colours.mean,
        std=colours.std,
        resample=colours.resample,
        rescale=colours.rescale,
    )


@dataclass(frozen=True)
class ClipRule:
    """How a clip becomes patches: that of its frames, and how many of them are read."""

    frames: ImageRule
    rate: float | None = None  # so many a second
    count: int | None = None
    min_frames: int = 4
    max_frames: int = 768


def clip_rule(processor: Config, checked: Config, rate: float | None = None) -> ClipRule:
    """The rule in a video_preprocessor_config.json, or in a preprocessor_config.json. Raises InputError.

    checked: the same with the tower's sizes; rate: frames a second where the file says nothing.
    """
    kind = str(processor.get("video_processor_type") or "Qwen2VLVideoProcessor")
    if not kind.startswith(("Qwen2VL", "Qwen3VL")):
        fix = "give the file of the checkpoint that this one was made from"
        raise InputError(f"video_processor_type {kind!r} cuts clips in another way", where=CLIP_RULE_FILE, fix=fix)
    frames = image_rule({"size": CLIP_SIZE, **checked, "image_processor_type": "Qwen2VL"})
    least, most = (_size(processor, k, n) for k, n in (("min_frames", 4), ("max_frames", 768)))
    chosen = flag(processor, "do_sample_frames", rate is not None, CLIP_RULE_FILE)
    rate, count = (processor.get(key, own) if chosen else None for key, own in (("fps", rate), ("num_frames", None)))
    for key, value in (("fps", rate), ("num_frames", count)):
        if value is not None and (not is_number(value) or value <= 0):
            raise InputError(f"{key} = {value!r} is not a number above 0", where=CLIP_RULE_FILE, fix=FIX)
    return ClipRule(frames, rate, None if count is None else int(count), least, most)


def known(fps: float | None) -> float:
    """The speed of a clip. Raises InputError where it is not known, and frames are to be chosen by it."""
    if not fps:
        raise InputError("frames are chosen by their time, and the clip does not say it", fix="give --frames")
    return fps


def _limits(processor: Config) -> tuple[float, float]:
    """Least and most pixels. A key beside `size` goes before the one in it, which transformers does not read alone."""
    given, d = processor.get("size"), ImageRule()
    size = {"shortest_edge": d.min_pixels, "longest_edge": d.max_pixels} if given is None else given
    size = dict(size) if isinstance(size, dict) else {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if processor.get(key) is not None:
            size[edge] = processor[key]
            size.pop(key, None)
    if not isinstance(given, dict | None) or set(size) != {"shortest_edge", "longest_edge"}:
        fix = "write min_pixels and max_pixels beside size, or shortest_edge and longest_edge in it (numbers of pixels)"
        raise InputError(f"size = {given!r} is not how transformers reads limits", where=RULE_FILE, fix=fix)
    if not all(is_number(pixels) and pixels > 0 for pixels in size.values()):
        raise InputError(f"size = {size} is not two numbers above 0", where=RULE_FILE, fix=FIX)
    return size["shortest_edge"], size["longest_edge"]


def _size(processor: Config, key: str, default: int) -> int:
    value = number(processor, key, default, RULE_FILE, above=0)
    if value != int(value):
        raise InputError(f"{key} = {value!r} is not a whole number", where=RULE_FILE, fix=FIX)
    return int(value)


def target_size(height: int, width: int, rule: ImageRule) -> tuple[int, int]:
    """Height and width in pixels after the resize: multiples of patch*merge, area within the rule. Raises InputError."""
    factor = rule.patch * rule.merge
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(f"aspect ratio of {width}x{height} is above {MAX_RATIO}", fix="crop the picture")
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
        x = patches(rule.colours.resized(image, w, h), rule)
        x = np.broadcast_to(x[:, :, None], (*x.shape[:2], rule.temporal, x.shape[2]))
        rows.append(x.reshape(len(x), -1))
        grids.append((1, h // rule.patch, w // rule.patch))
    return np.ascontiguousarray(np.concatenate(rows)), np.asarray(grids, np.int64)


def patches(image: Image.Image, rule: ImageRule) -> np.ndarray:
    """A PIL RGB picture of whole merged patches as [N,C,p*p] float32: merge x merge neighbours follow one another."""
    x = rule.colours.read(image)
    gh, gw, m, p = image.height // rule.patch, image.width // rule.patch, rule.merge, rule.patch
    x = x.reshape(3, gh // m, m, p, gw // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)  # gh gw m m C p p
    return np.asarray(x.reshape(gh * gw, 3, p * p))


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
