"""A bundle with its sessions: pictures and text in, a prompt prefilled, rows for the decode loop, answers out.

images -> see -> Pictures -> request -> prefill -> Prefilled -> row -> decode loop (decode.py)
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil

from ..base.core_index import check_core_tokens
from ..base.errors import InputError
from ..base.metrics import check_numbers
from ..base.units import size
from ..bundle.bundle import Bundle
from ..families import Arrays, Picture, Pictures, Tower
from ..recipe.recipe import Recipe
from . import backend as backends
from . import clips, picture_notes
from .backend import Backend, Cache, Graphs
from .chat import Chat
from .clips import Clip
from .core_set import CoreSet, choose, combined
from .decode import Reader, Row, decode, greedy
from .drafting import Habits
from .images import Opened, check_size, given
from .phrases import Table
from .picture_notes import Note
from .request import Request, kept_slots, prefill_feeds, sparse_feeds
from .sampling import Chooser, Rule, Sampling, settle

MEASURED = ("core_scores", "core_mean_z", "core_mean_y")  # what a prefill says about neurons


@dataclass(frozen=True)
class Budget:
    """What one request may use; None takes the recipe's value."""

    dense: bool = False
    neuron_share: float | None = None
    token_share: float | None = None
    seed: int | None = None


class Prefilled:
    """A prompt after prefill: first logits, which tokens and neurons were kept, and its cache."""

    def __init__(self, runner: Runner, request: Request, budget: Budget, found: Arrays, cache: Cache):
        """`found`: logits [1,V] and what the graph says about neurons and tokens.

        Raises InputError for tokens that are not ascending and of this prompt, CmExportError for logits that are no numbers.
        """
        self.request, self.budget, self.cache, self._runner = request, budget, cache, runner
        tokens, kept, mask = runner.recipe.tokens, found.get("kept_tokens"), found.get("kept_mask")
        self.logits = found["logits"]
        check_numbers(self.logits, "prefill graph")
        self.measured = {n: found[n] for n in MEASURED if n in found}
        if kept is not None and mask is not None and not mask.all():  # a graph whose T is given pads up to it
            kept = kept[:, mask[0] > 0]
        self.kept_tokens = np.arange(request.tokens, dtype=np.int32)[None] if kept is None else kept
        check_core_tokens(self.kept_tokens, 1, request.tokens)  # a token listed twice would be attended twice
        self._kept_mask = mask[0] if mask is not None and tokens.cache == "cut" else None
        self._listed = kept[0] if kept is not None and tokens.cache == "index" else None
        # Chosen here, so that whoever times a prefill times the choice with it.
        self.core_set = CoreSet.whole(runner.bundle.shape) if budget.dense else self.core_of(budget.neuron_share)

    def core_of(self, share: float | None) -> CoreSet:
        """The neurons that decode computes under the recipe, or at another share; all of them where nothing was scored."""
        bundle, neurons = self._runner.bundle, self._runner.recipe.neurons
        thresholds = bundle.thresholds if neurons.by_threshold else None
        return choose(self.measured, neurons, bundle.shape, bundle.calibration, share, thresholds)

    @property
    def neurons(self) -> int:
        """Neurons that decode computes per layer, on average."""
        return round(float(self.core_set.counts.mean()))

    @property
    def core_neurons(self) -> np.ndarray | None:
        """[L,1,K] int32, ascending; where layers differ in number, -1 behind the shorter ones."""
        return self.core_set.neurons

    @property
    def room(self) -> int:
        """Tokens of an answer for which the model has positions left."""
        most = self._runner.bundle.shape.max_positions
        return sys.maxsize if most is None else most - self.request.tokens

    def row(self, core: CoreSet | None = None, **how: Any) -> Row:
        """The request at the beginning of its answer. `core`: another core set; `how`: further fields of Row.

        No answer is longer than `room`.
        """
        graph = "decode_dense" if self.budget.dense else "decode"
        listed = None if self.budget.dense else self._listed
        fields: dict[str, Any] = {"graph": graph, "kept": self._kept_mask, "listed": listed} | how
        row = Row(self.request, core or self.core_set, self.cache, self.logits[0], **fields)
        row.limit = min(row.limit, self.room)
        return row

    def then(self, ids: list[int], question: int | None = None) -> Prefilled:
        """This context with these text tokens read after it, densely and in one pass: a later question.

        The answer that was given is among them, so the cache is the dense model's however sparsely it was decoded; the
        last `question` of them (None: all) judge the image tokens. Raises InputError for a bundle without such a graph.
        """
        runner, recipe, request = self._runner, self._runner.recipe, self.request.extended(ids)
        check_converses(recipe, self.budget.dense)
        if self.budget.dense:
            row = self.row()
            runner.read([row], [ids])
            return Prefilled(runner, request, self.budget, {"logits": row.last[None]}, row.cache)
        new = np.arange(self.request.tokens, request.tokens, dtype=np.int32)[None]
        feeds = {
            "inputs_embeds": request.inputs_embeds[:, new[0]],
            "position_ids": request.position_ids[:, :, new[0]],
            "attention_mask": np.ones((1, request.tokens), np.int64),
            "image_mask": request.is_image,
            "picture": request.picture,
            "question": np.array([question or len(ids)], np.int64),
        }
        feeds |= sparse_feeds(request, recipe, self.budget.token_share, self.budget.seed)
        feeds |= kept_slots(request, feeds)
        found, cache = runner.backend.turn(feeds, self.cache)
        if recipe.tokens.policy != "dense" and recipe.tokens.later == "same":  # the first choice, and all text since
            found["kept_tokens"] = np.concatenate([self.kept_tokens, new], 1)
        found |= combined(self.measured, found, self.request, self.kept_tokens, len(ids), recipe.neurons)
        return Prefilled(runner, request, self.budget, found, cache)


def check_converses(recipe: Recipe, dense: bool) -> None:
    """Raises InputError for a bundle that cannot answer a second question; its dense graphs always can."""
    if dense or recipe.has_turn:
        return
    what, fix = "this bundle drops the cache of cut tokens", "build it with --token-cache index (or --tokens dense)"
    if recipe.tokens.whole_cache:
        what = f"tokens.policy = {recipe.tokens.policy!r} judges by what is not kept after the first question"
        fix = "build it with --tokens attention (or value, diverse, spread, random, dense) and no first cut"
    raise InputError(
        f"{what}, so a second question cannot be asked", where="conversation", fix=f"{fix}, or use --dense"
    )


class Runner:
    """A bundle with its sessions, ready for requests."""

    is_closed = False

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        recipe: Recipe | None = None,
        graph: Graphs | None = None,
        backend: str | None = None,
        device: str | None = None,
    ):
        """`recipe` and `graph` replace the bundle's own: how `eval` runs control policies on the same weights.

        `backend`: what it runs on (default: as its recipe says); graphs that replace its own run on ONNX Runtime.
        `device`: cpu, cuda, cuda:1 or auto (default: what the backend is for).
        """
        self.bundle, self.recipe, self.habits = bundle, recipe or bundle.recipe, Habits()
        self.device = device
        runtime = backends.DEFAULT if graph else backend or bundle.recipe.backend
        self.backend: Backend = backends.find(runtime).open(bundle, threads, self.recipe, graph, device)

    @cached_property
    def phrases(self) -> Table | None:
        """Drafts of what the model usually writes; None where nobody kept its answers."""
        return Table(self.bundle.phrases) if self.bundle.phrases else None

    @cached_property
    def chat(self) -> Chat:
        """Text in and out."""
        return Chat(self.bundle)

    @property
    def tower(self) -> Tower:
        """How the model sees. Raises InputError when it takes no pictures."""
        if self.bundle.tower is None:
            fix = "leave pictures (and questions about them) out, or build a vision-language checkpoint"
            raise InputError("its model reads text only and takes no pictures", where=self.bundle.path, fix=fix)
        return self.bundle.tower

    @cached_property
    def picture_rule(self) -> Any:
        """How pictures become patches. Raises InputError when the model takes none."""
        file = self.bundle.processor("preprocessor_config.json")
        return self.tower.rule(json.loads(file.read_bytes()) if file else {})

    @cached_property
    def clip_rule(self) -> Any:
        """How clips become patches. Raises InputError when the model takes none."""
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        file = next((f for f in map(self.bundle.processor, names) if f is not None), None)
        return self.tower.clip_rule(json.loads(file.read_bytes()) if file else {})

    def clip(self, source: Any, fps: float | None = None, rate: float | None = None, count: int | None = None) -> Clip:
        """A clip for the place of a picture: the path of a file, or a sequence of frames with their `fps`.

        rate: frames a second that are read, count: frames. With neither, of a file those that the checkpoint's own rule
        asks for, of a sequence all. Raises InputError.
        """
        rule = self.clip_rule

        def choose(total: int, known: float | None, size: tuple[int, int]) -> list[int]:
            places = self.tower.frames_of(total, known, rule, rate, None if count is None else int(count))
            self._check_clip(len(places), size)  # before so many frames are decoded
            return places

        return clips.taken(source, fps, rate, count, choose)

    def _check_clip(self, frames: int, size: tuple[int, int], where: str | None = None) -> None:
        """Raises InputError where so many frames of this size (width, height) are more than the model can hold."""
        limit, tokens = self.bundle.shape.max_positions, self.tower.clip_tokens(frames, size, self.clip_rule)
        if limit is not None and tokens >= limit:
            fix = "read fewer frames with --fps or --frames, or give a smaller clip"
            raise InputError(f"{frames} frames become {tokens} tokens, the model holds {limit}", where=where, fix=fix)

    def see(self, images: Sequence[Any], of: int | None = None) -> Pictures:
        """Pictures (as `images.given` takes them) through the vision graph; `of`: of how many in the prompt (None: these).

        Raises InputError for one that cannot be read, cannot be cut into patches or does not fit in memory.
        """
        seen, of = [], of or len(images)
        # Patches attend within their own picture, so one at a time needs the least memory.
        for number, image in enumerate(images, 1):
            shown = given(image, f"picture {number}")
            check_size(shown.image, self.tower.min_side, self.tower.max_ratio, shown.name)
            if isinstance(shown, Clip):
                self._check_clip(len(shown.frames.images), shown.image.size, shown.name)
                picture = self.tower.clip(shown.frames, self.clip_rule)
            else:
                picture = self.tower.picture(shown.image, self.tower.rule_for(self.picture_rule, of))
            found = []
            for part in self.tower.parts(picture):
                feeds = self.tower.feeds([part])
                self._check_room(part, feeds, shown)
                found.append(self.backend.vision(feeds))
            outputs = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            seen.append(Pictures(outputs, (picture.layout,)))
        return Pictures.joined(seen)

    def notes_on(self, picture: Opened, of: int = 1) -> list[Note]:
        """What the user should know about one of so many pictures of a prompt. Raises InputError as `see` does."""
        if isinstance(picture, Clip):
            return [*picture.notes]
        rule = self.tower.rule_for(self.picture_rule, of)
        return [*picture.notes, *picture_notes.on_size(picture.image, self.tower, rule)]

    def _check_room(self, picture: Picture, feeds: Arrays, shown: Opened) -> None:
        """Raises InputError for a picture larger than the vision engine was built for, or than fits in memory without one."""
        engines = self.bundle.manifest.get("engines")
        if not engines or engines["backend"] != self.backend.name:
            return self._check_memory(self.tower.memory(picture), shown)
        # An engine takes the memory of its largest picture, whatever it reads.
        if found := self.tower.beyond(feeds, self.bundle.recipe.engine.max_patches):
            axis, length, most = found
            share = int(100 * (most / length) ** 0.5)
            fix = f"shrink it to {share}% of its width and height or less, or {self.bundle.elsewhere}"
            what = f"{length} {axis}, the vision engine reads up to {most}"
            raise InputError(what, where=shown.name, fix=fix)

    def _check_memory(self, need: int, shown: Opened) -> None:
        free = psutil.virtual_memory().available
        if need > 0.9 * free:
            (width, height), share = shown.image.size, (0.9 * free / need) ** 0.5  # it grows with the area
            less = max(1, int(share * width)), max(1, int(share * height))
            # Some towers read every picture at the same size.
            helps = math.prod(self.tower.resized(less, self.picture_rule)) < math.prod(
                self.tower.resized(shown.image.size, self.picture_rule)
            )
            fix = f"shrink it to {share:.0%} of its width and height or less" if helps else "free memory first"
            what = f"the vision graph needs about {size(need)} for it, {size(free)} are free"
            raise InputError(what, where=shown.name, fix=fix)

    def request(self, ids: np.ndarray, pictures: Pictures) -> Request:
        """A prompt ready to run. Raises InputError, also when it is longer than the model can hold."""
        self.check_length(len(ids))
        if self.bundle.tower and not pictures.layouts:
            pictures = self.bundle.tower.no_pictures()
        return Request.of(ids, pictures, self.bundle.family, self.bundle.shape, self.bundle.embedding)

    def ask(self, text: str, pictures: Pictures, system: str | None = None, control_tokens: bool = False) -> Request:
        """The prompt of one question about pictures that were seen. Raises InputError."""
        return self.request(self.chat.encode(text, system, pictures.layouts, control_tokens), pictures)

    def check_open(self) -> None:
        """Raises InputError once it was closed."""
        if self.is_closed:
            raise InputError("was closed", where=self.bundle.path, fix="load it again")

    def check_has(self, graph: str, what: str) -> None:
        """Raises InputError where the backend cannot do `what`, for which it would have to run `graph`."""
        if not self.backend.has(graph):
            text, fix = f"{what} needs an engine of {graph}, which was not built", self.bundle.elsewhere
            raise InputError(text, where=f"backend {self.backend.name}", fix=fix)

    def check_length(self, tokens: int) -> None:
        """Raises InputError when a prompt leaves no room for an answer in what the model can hold."""
        limit = self.bundle.shape.max_positions
        if limit is not None and tokens >= limit:
            fix = "use smaller or fewer pictures, or a shorter text"
            what = f"{tokens} tokens, the model holds {limit}, of which the answer needs at least one"
            raise InputError(what, where="prompt", fix=fix)

    def prefill(self, request: Request, budget: Budget) -> Prefilled:
        """Raises InputError for a budget that the bundle's policies do not know."""
        recipe, feeds = self.recipe, prefill_feeds(request)
        for what, share in (("neurons", budget.neuron_share), ("tokens", budget.token_share)):
            if share is not None and getattr(recipe, what).policy == "dense":
                raise InputError(
                    f"a share of {what} was asked of a bundle that prunes none",
                    where=f"recipe: {what}.policy = 'dense'",
                    fix="leave the share out, or build with another policy",
                )
        if not budget.dense:
            feeds |= sparse_feeds(request, recipe, budget.token_share, seed=budget.seed)
            feeds |= kept_slots(request, feeds)
        found, cache = self.backend.prefill(feeds, "prefill_dense" if budget.dense else "prefill")
        return Prefilled(self, request, budget, found, cache)

    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> None:
        """Read tokens for rows, outside of any answer."""
        Reader(self.backend).read(rows, tokens)

    def rule(self, asked: Sampling | None = None) -> Rule:
        """How the tokens of an answer are chosen: as asked, else as the checkpoint says. Raises InputError."""
        return settle(asked, self.bundle.manifest.get("generation") or {})

    def chooser(self, request: Request, rule: Rule) -> Chooser:
        """What chooses the tokens of one answer to a request."""
        return Chooser(rule, request.ids, self.chat.stops(rule.stop))

    def answering(self, prefilled: Prefilled, rule: Rule, limit: int) -> Row:
        """A row that writes its answer under a rule: up to a stop id, a stop string or `limit` tokens."""
        chooser, writing = self.chooser(prefilled.request, rule), self.chat.writing(rule.stop)
        return prefilled.row(choose=chooser, writing=writing, limit=limit)

    def tokens(self, prefilled: Prefilled, limit: int, stop: frozenset[int]) -> Iterator[int]:
        """The most likely token ids until a stop id (not yielded) or `limit` tokens, under no other rule."""
        row = prefilled.row(choose=greedy(stop), limit=limit)
        return (token for _, token in decode(self.backend, [row]))
