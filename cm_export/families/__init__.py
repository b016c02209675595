"""What a family says about its `model_type`, vision tower included; every other file here is one family, found by its name.

    config.json -> Family.shape -> Shape      sizes that every stage reads
                   Family.tower -> Tower      pictures: graph inputs, host feeds, weights, memory; None of a text model
    PIL pictures -> Tower.picture -> Picture -> vision graph -> Pictures -> prompt rows, Family.positions

A family file holds no torch at import: running a bundle reads it. What it says about torch it says inside functions. A family
that is not in this folder is found by the entry point `cm_export.families` of an installed distribution (docs/families.md).
"""

from __future__ import annotations

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..base import by_name, dims
from ..base.errors import InputError
from ..base.settings import is_number

if TYPE_CHECKING:
    import torch
    from PIL import Image

GROUP = "cm_export.families"  # this package, and the entry points of families outside it
# Rope types whose frequencies do not depend on the length seen so far: those that a static graph can hold.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
MOVING_ROPE = ("dynamic", "longrope")

UNKNOWN_FPS = 24.0
ADDING = "docs/families.md shows how to add it"
IMAGE = "\N{OBJECT REPLACEMENT CHARACTER}"  # an image token in Layout.text; the tokenizer knows what it is called

Config = Mapping[str, Any]  # transformers' normalised configuration as plain values, or a part of it
Arrays = dict[str, np.ndarray]
Range = tuple[int, int, int]  # smallest, likely and largest length of an axis


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that every stage needs; letters as in base/dims.py."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str
    stop_ids: tuple[int, ...]
    max_positions: int | None  # longest prompt; None: not stated
    sees: bool = False  # whether pictures can be given
    position_axes: int = 1  # A of position_ids [A,B,S]: one row for plain rotary positions, three for M-RoPE
    image_token: int = -1  # equals no token id, so that without pictures every token is text
    clip_token: int = -1  # what stands for the tokens of a clip; of a model that takes none equal to no id
    whole_layers: int = 0  # layers that must see every token: image tokens may be cut after them, not before
    # Patches and image tokens of the usual processor's largest picture; 0: any number.
    largest: tuple[int, int] = (0, 0)

    @property
    def seen_tokens(self) -> tuple[int, ...]:
        """Ids in whose place a prompt has what the tower saw."""
        return tuple(i for i in (self.image_token, self.clip_token) if i >= 0)

    @property
    def weights(self) -> int:
        """Weights that the products of one decoded token read: FFNs, attention and head."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (3 * self.ffn * self.hidden + attention) + self.vocab * self.hidden

    @property
    def traced(self) -> tuple[str, ...]:
        """The graphs that are traced."""
        return ("vision", "prefill", "decode") if self.sees else ("prefill", "decode")


@dataclass(frozen=True)
class Port:
    """An input or output of the vision graph. Axes: a length, or the name of an axis whose length may change."""

    name: str
    dtype: type[np.generic]
    axes: tuple[int | str, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """Lengths of the axes after the first, where none of these may change."""
        return tuple(int(length) for length in self.axes[1:])


@dataclass(frozen=True)
class Layout:
    """Where the image tokens of one picture lie in it, and how they are written into the prompt."""

    grid: tuple[int, int, int]  # cells of the picture: frames, rows, columns
    # Of each image token the cell that it covers, counted row by row, or -1 where it covers none (those of a thumbnail,
    # ends of rows); None: one token a cell, in order.
    cells: tuple[int, ...] | None = None
    # What the template's one image token becomes, with IMAGE for each image token; None: the image tokens and nothing else.
    text: str | None = None
    pace: float | None = None  # of a clip: how many positions its frames lie apart; None: a picture

    @property
    def is_clip(self) -> bool:
        """Whether it is a clip: frames of the grid one after the other in time."""
        return self.pace is not None

    @property
    def tokens(self) -> int:
        """How many image tokens."""
        return math.prod(self.grid) if self.cells is None else len(self.cells)

    def written(self, image_token: str) -> str:
        """The text that stands for this picture in a prompt."""
        return image_token * self.tokens if self.text is None else self.text.replace(IMAGE, image_token)

    def kept(self, stays: np.ndarray) -> np.ndarray:
        """[rows, columns] bool: the cells of the (first) frame that a token covers which stays; stays [T] bool."""
        kept = np.zeros(math.prod(self.grid), bool)
        cells = np.arange(self.tokens) if self.cells is None else np.array(self.cells)
        kept[cells[stays & (cells >= 0)]] = True
        return np.array(kept.reshape(self.grid)[0])


@dataclass(frozen=True)
class Picture:
    """One picture as the tower reads it, and the image tokens that it becomes."""

    pixels: np.ndarray  # as the tower's first input, for this picture alone
    layout: Layout

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells: frames, rows, columns."""
        return self.layout.grid

    @property
    def tokens(self) -> int:
        """How many image tokens."""
        return self.layout.tokens


@dataclass(frozen=True)
class Frames:
    """Frames of a clip that were chosen, RGB and all of one size, and where they were."""

    images: Sequence[Image.Image]
    places: Sequence[int]  # among the frames of the clip
    total: int  # frames of the clip
    fps: float | None  # of the clip; None: not known

    @property
    def chosen_fps(self) -> float:
        """Of those that were chosen; a clip of unknown speed has 24, as in transformers."""
        return len(self.places) / self.total * self.fps if self.fps else UNKNOWN_FPS


@dataclass(frozen=True)
class Pictures:
    """All pictures of a prompt, in order, as the vision graph answered: every output [I,..] by its name."""

    outputs: Arrays = field(default_factory=dict)  # rows of all image tokens, one picture after the other
    layouts: tuple[Layout, ...] = ()  # of each picture

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Cells of each picture: frames, rows, columns."""
        return [layout.grid for layout in self.layouts]

    @property
    def counts(self) -> list[int]:
        """Image tokens of each picture."""
        return [layout.tokens for layout in self.layouts]

    @classmethod
    def joined(cls, parts: Sequence[Pictures]) -> Pictures:
        """The pictures of several, one after the other."""
        names = parts[0].outputs if parts else ()
        outputs = {n: np.concatenate([p.outputs[n] for p in parts]) for n in names}
        return cls(outputs, tuple(layout for p in parts for layout in p.layouts))


class Tower(ABC):
    """The vision tower of one checkpoint; a family's file derives from it. Arrays are numpy, one picture has N patches.

    `inputs` are those of the vision graph. Of `outputs` the first, [I,D], takes the place of the image tokens' embeddings;
    each further one is an input of prefill as well, [B,S,..], zero at text tokens (see Family.mix_in).
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    prefixes: tuple[str, ...]  # how the checkpoint names begin of the weights that the vision graph reads
    min_side: int  # pixels: the smallest width or height of a picture
    max_ratio: float = math.inf  # of a picture's long side to its short one
    may_touch: bool = True  # whether transformers tells two pictures apart without a word between them

    @abstractmethod
    def module(self, model: Any) -> torch.nn.Module:
        """What the vision graph computes: forward(**inputs) -> tuple of outputs; `model` is transformers'."""

    @abstractmethod
    def features(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The same outputs by name from stock transformers, for the gate; `given` as tensors, from `stock`."""

    @abstractmethod
    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """What stock transformers is given besides input_ids [1,S]; is_image [S] bool marks their image tokens."""

    @abstractmethod
    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""

    @abstractmethod
    def rule(self, processor: Config) -> Any:
        """How pictures become patches, from the checkpoint's preprocessor_config.json. Raises InputError."""

    @abstractmethod
    def picture(self, image: Image.Image, rule: Any) -> Picture:
        """A PIL RGB picture as the tower reads it. Raises InputError for a size that cannot be cut into patches."""

    def rule_for(self, rule: Any, pictures: int) -> Any:
        """The rule for each of so many pictures of one prompt: where several are read in less detail than one alone."""
        return rule

    def resized(self, size: tuple[int, int], rule: Any) -> tuple[int, int]:
        """(width, height) in pixels at which a picture of this size is read: what a remark on small pictures is made of."""
        return size

    def clip_rule(self, processor: Config) -> Any:
        """How clips become patches, from video_preprocessor_config.json, or where there is none the rule of pictures.

        Raises InputError, also where the model takes no clips.
        """
        raise InputError("this model takes no clips", fix="give pictures")

    def frames_of(self, total: int, fps: float | None, rule: Any, rate: float | None, count: int | None) -> list[int]:
        """Which of `total` frames are read; rate: so many a second, count: so many. Raises InputError."""
        raise InputError("this model takes no clips", fix="give pictures")

    def clip_tokens(self, frames: int, size: tuple[int, int], rule: Any) -> int:
        """Image tokens of a clip of so many chosen frames (width, height). Raises InputError."""
        raise InputError("this model takes no clips", fix="give pictures")

    def clip(self, frames: Frames, rule: Any) -> Picture:
        """Frames as the tower reads them. Raises InputError."""
        raise InputError("this model takes no clips", fix="give pictures")

    def parts(self, picture: Picture) -> list[Picture]:
        """What the vision graph may read one after the other: frames that do not attend to one another."""
        return [picture]

    @abstractmethod
    def probes(self, rng: np.random.Generator) -> list[Picture]:
        """Two smooth made-up pictures, of unequal size where sizes may differ: what every build is proved on."""

    def sample(self, rng: np.random.Generator) -> list[Picture]:
        """One made-up picture or several of few image tokens, of any layout: what `cm-export check-family` asks about."""
        return self.probes(rng)

    @abstractmethod
    def sized(self, tokens: int, rng: np.random.Generator) -> list[Picture]:
        """Random pictures that become `tokens` image tokens together, for timing. Raises InputError if none do."""

    @abstractmethod
    def memory(self, picture: Picture) -> int:
        """Bytes that the vision graph needs for this picture besides the weights, on ONNX Runtime."""

    @abstractmethod
    def engine_memory(self, patches: int, fused: bool) -> int:
        """Bytes of activations on a device for a picture of so many patches; `fused`: attention keeps no scores."""

    def no_pictures(self) -> Pictures:
        """The outputs for a prompt without pictures: no row of any, yet prefill is given each further one, all zero."""
        return Pictures({port.name: np.zeros((0, *port.row), port.dtype) for port in self.outputs})

    @abstractmethod
    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """Lengths of the changing axes of inputs and outputs, for pictures of up to `patches` patches, one at a time."""

    def beyond(self, feeds: Mapping[str, np.ndarray], patches: int) -> tuple[str, int, int] | None:
        """(axis, its length, the longest of `axis_ranges`) of the first axis that is longer; None if all feeds fit."""
        ranges = self.axis_ranges(patches)
        for port in self.inputs:
            for axis, length in zip(port.axes, feeds[port.name].shape, strict=True):
                if isinstance(axis, str) and length > ranges[axis][2]:
                    return axis, length, ranges[axis][2]
        return None


class Family:
    """One `model_type`. The class attributes name the weights of a decoder layer, by which the surgery finds its sites."""

    model_class: ClassVar[str]  # of transformers
    layer: ClassVar[str] = "model.layers.{layer}."
    gate: ClassVar[str] = "mlp.gate_proj.weight"
    up: ClassVar[str] = "mlp.up_proj.weight"
    down: ClassVar[str] = "mlp.down_proj.weight"
    attention_out: ClassVar[str] = "self_attn.o_proj.weight"
    value: ClassVar[str] = "self_attn.v_proj.weight"  # of families that hold it apart
    embedding: ClassVar[str] = "model.embed_tokens.weight"

    def shape(self, config: Config) -> Shape:
        """Sizes of a checkpoint. Raises InputError."""
        return decoder_shape(config, config.get("head_dim"))

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        check_decoder(config, config.get("head_dim"))

    def tower(self, config: Config) -> Tower | None:
        """The vision tower; None of a model that takes no pictures."""
        return None

    def sample(self, seed: int) -> dict[str, Any]:
        """A valid configuration of a tiny model as config.json has it, whatever may differ drawn at random from `seed`.

        What `cm-export check-family` proves the family on. Raises InputError where a family says none.
        """
        raise InputError("its file has no sample(seed), a tiny configuration drawn at random", fix=ADDING)

    def positions(self, picture: np.ndarray, pictures: Pictures) -> tuple[np.ndarray, int]:
        """Positions [A,S] int64 of one prompt without padding, and the position of the first answer token.

        picture [S] int64: the number of the picture that a token belongs to, -1 for text.
        """
        return np.arange(len(picture), dtype=np.int64)[None], len(picture)

    def mix_in(self, layer: int, hidden: Any, rows: Mapping[str, Any]) -> Any:
        """The hidden state [B,S,D] (torch) after `layer`, with what the tower's further outputs `rows` add there."""
        return hidden


def names() -> list[str]:
    """Every model_type that can be asked for, sorted."""
    return sorted({*by_name.names_in(GROUP), *(e.name for e in importlib.metadata.entry_points(group=GROUP))})


def find(model_type: str) -> Family:
    """The family of a model_type: a file of this folder, or an entry point. Raises InputError that names the nearest."""
    if model_type in by_name.names_in(GROUP):
        found = by_name.load(GROUP, model_type, "model type").FAMILY
    else:
        outside = {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}
        if model_type not in outside:
            raise InputError(f"unknown model type {model_type!r}", fix=by_name.nearest(model_type, names()))
        found = outside[model_type].load()
        found = getattr(found, "FAMILY", found)
    if not isinstance(found, Family):
        what = f"{type(found).__name__} is not a Family"
        raise InputError(what, where=f"family {model_type}", fix="let FAMILY be an instance of a subclass of it")
    return found


def decoder_shape(text: Config, head_dim: int | None = None, **own: Any) -> Shape:
    """Shape from the decoder's part of the configuration; `own`: the fields that a family adds.

    head_dim: of families whose heads may have another size than hidden_size / heads.
    """
    heads, stop = text["num_attention_heads"], text.get("eos_token_id")
    return Shape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"] or heads,
        head_dim=head_dim or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        activation=text["hidden_act"],
        stop_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
        max_positions=text.get("max_position_embeddings"),
        **own,
    )


def check_decoder(text: Config, head_dim: int | None = None) -> None:
    """Refuse a decoder that a static graph cannot hold rightly. Raises InputError naming the setting."""
    where = "config.json"
    kinds = {*(text.get("layer_types") or [])} - {"full_attention"}
    if "sliding_attention" in kinds:
        what, place = "sliding-window attention is not supported", f"{where}: use_sliding_window"
        raise InputError(what, where=place, fix="docs/families.md says why")
    if kinds:
        what, place = f"{', '.join(sorted(map(str, kinds)))} is not supported", f"{where}: layer_types"
        raise InputError(what, where=place, fix="docs/families.md says why")
    rope = text.get("rope_parameters") or {}
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1)
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError("differs from layer to layer, which is not supported", where=f"{where}: rope_parameters")
    if kind not in STATIC_ROPE:
        why = "changes with the length and cannot be traced" if kind in MOVING_ROPE else "is unknown here"
        raise InputError(
            f"rope_type {kind!r} {why}",
            where=f"{where}: rope_parameters",
            fix=f"supported: {', '.join(STATIC_ROPE)}",
        )
    if not is_number(theta) or theta <= 0:
        raise InputError(f"rope_theta {theta!r} is not a number above 0", where=f"{where}: rope_parameters")
    if any(part.get("partial_rotary_factor") not in (None, 1) for part in (rope, text)):
        raise InputError("only whole heads are rotated here", where=f"{where}: partial_rotary_factor")
    longest = text.get("max_position_embeddings")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise InputError(f"max_position_embeddings {longest!r} is not a length", where=where)
    if text.get("mlp_bias"):
        fix = "only FFNs without bias are supported"
        raise InputError(
            "the FFN's projections have a bias, which CoreFFN lacks", where="config.json: mlp_bias", fix=fix
        )
    if text["num_attention_heads"] < 1:
        raise InputError(f"num_attention_heads {text['num_attention_heads']!r} is less than 1", where="config.json")
    if head_dim is None and text["hidden_size"] % text["num_attention_heads"]:
        raise InputError("hidden_size is not a multiple of num_attention_heads", where="config.json")
    if text["num_attention_heads"] % (text["num_key_value_heads"] or 1):
        raise InputError("num_attention_heads is not a multiple of num_key_value_heads", where="config.json")


def check_image_token(token: int, text: Config) -> None:
    """Raises InputError unless image tokens have an id of the vocabulary."""
    if type(token) is not int or token not in range(text["vocab_size"]):
        what = f"image_token_id {token!r} is not below vocab_size {text['vocab_size']}, 0 or more"
        raise InputError(what, where="config.json")


def embeds(hidden: int) -> Port:
    """The first output of every tower: embeddings that take the place of the image tokens'."""
    return Port("image_embeds", np.float32, (dims.IMAGE_TOKENS, hidden))
