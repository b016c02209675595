"""The one host loop: vision -> prefill -> core indices -> decode, over the sessions of a bundle.

prefill -> core_scores [L,1,F] -> pick K -> gather rows once -> decode step by step, cache never copied
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..base.errors import InputError
from ..bundle.bundle import Bundle
from ..recipe.recipe import Recipe
from . import backend as backends
from . import turns
from .chat import Chat
from .core_set import CoreSet, choose, together
from .request import Request, kept_slots, prefill_feeds, sparse_feeds

MEASURED = ("core_scores", "core_mean_z", "core_mean_y")  # what a prefill says about neurons


@dataclass(frozen=True)
class Budget:
    """What one request may use; None takes the recipe's value."""

    dense: bool = False
    neuron_share: float | None = None
    token_share: float | None = None
    seed: int | None = None


class Prefilled:
    """A prompt after prefill: first logits, which tokens were kept, and how to make its decoder."""

    def __init__(
        self, engine: "Engine", request: Request, budget: Budget, found: dict[str, np.ndarray], cache: dict[str, Any]
    ):
        """`found`: logits [1,V] and what the graph says about neurons and tokens; `cache`: its present.i.key/value."""
        self.request, self.budget, self._engine, self._cache = request, budget, engine, cache
        tokens, kept = engine.recipe.tokens, found.get("kept_tokens")
        self.logits = found["logits"]
        self.measured = {n: found[n] for n in MEASURED if n in found}
        self.scores = self.measured.get("core_scores")
        mask = found.get("kept_mask")
        if kept is not None and mask is not None and not mask.all():  # a graph whose T is given pads up to it
            kept = kept[:, mask[0] > 0]
        self.kept_tokens = np.arange(request.tokens, dtype=np.int32)[None] if kept is None else kept
        self._kept_mask = mask if tokens.cache == "cut" else None
        self._core_tokens = kept if tokens.cache == "index" else None
        shape = engine.bundle.shape
        self.neurons = shape.ffn if budget.dense else round(float(self.core_set.counts.mean()))  # per layer

    @cached_property
    def core_set(self) -> CoreSet:
        """The neurons that decode computes, under the recipe and the budget; all of them where nothing was scored."""
        engine = self._engine
        calibration = engine.bundle.calibration
        return choose(self.measured, engine.recipe.neurons, engine.bundle.shape, calibration, self.budget.neuron_share)

    @property
    def core_neurons(self) -> np.ndarray:
        """[L,1,K] int32, ascending; where layers differ in number, -1 behind the shorter ones."""
        return self.core_set.neurons

    def decoder(self) -> backends.Decoder:
        """A decoder over this prompt's cache, with its core rows gathered."""
        engine = self._engine
        if self.budget.dense:
            return engine.backend.decoder("decode_dense", self._cache, {})
        return self.decoder_of(self.core_set.constants(engine.backend.rows))

    def decoder_of(self, constants: dict[str, np.ndarray]) -> backends.Decoder:
        """A decoder over this prompt's cache with rows (and a bias) of the caller's choice."""
        return self._engine.backend.decoder("decode", self._cache, constants)

    def checker(self) -> backends.Decoder:
        """A dense decoder over this prompt's whole cache, made to read some tokens at once."""
        return self._engine.backend.decoder("decode_dense", self._cache, {}, few_rows=True)

    def then(self, ids: list[int], question: int | None = None) -> "Prefilled":
        """This context with these text tokens read after it, densely and in one pass: a later question.

        The answer that was given is among them, so the cache is the dense model's however sparsely it was decoded; the
        last `question` of them (None: all) judge the image tokens. Raises InputError for a bundle without such a graph.
        """
        engine, recipe, request = self._engine, self._engine.recipe, self.request.extended(ids)
        turns.check_bundle(recipe, self.budget.dense)
        feeds = self.request.step_feeds(ids, 0)
        if self.budget.dense:
            decoder = self.decoder()
            found, cache = {"logits": decoder.step(feeds)}, decoder.cache
            cache = {n.replace("past", "present", 1): v for n, v in cache.items()}
            return Prefilled(engine, request, self.budget, found, cache)
        feeds |= sparse_feeds(request, recipe, self.budget.token_share, self.budget.seed)
        feeds |= {"image_mask": request.is_image, "question": np.array([question or len(ids)], np.int64)}
        found, cache = engine.split(engine.backend.turn(feeds, self._cache))
        if recipe.tokens.policy != "dense" and recipe.tokens.later == "same":  # the first choice, and all text since
            new = np.arange(self.request.tokens, request.tokens, dtype=np.int32)[None]
            found["kept_tokens"] = np.concatenate([self.kept_tokens, new], 1)
        found |= together(self.measured, found, self.request, self.kept_tokens, len(ids), recipe.neurons)
        return Prefilled(engine, request, self.budget, found, cache)

    def step_feeds(self, token: int, step: int) -> dict[str, np.ndarray]:
        return self.request.step_feeds(token, step, self._kept_mask, self._core_tokens)


class Engine:
    """A bundle with its sessions, ready for requests one at a time."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        recipe: Recipe | None = None,
        graph: Callable | None = None,
        backend: str | None = None,
    ):
        """`recipe` and `graph` replace the bundle's own: how `eval` runs control policies on the same weights.

        `backend`: what it runs on (default: as its recipe says); graphs that replace its own run on ONNX Runtime.
        """
        self.bundle, self.recipe = bundle, recipe or bundle.recipe
        runtime = backends.DEFAULT if graph else backend or bundle.recipe.backend
        self.backend: backends.Backend = backends.find(runtime).open(bundle, threads, self.recipe, graph)

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.bundle)

    def check_sees(self) -> None:
        """Raises InputError when the model takes no pictures."""
        if not self.bundle.shape.sees:
            fix = "leave pictures (and questions about them) out, or build a vision-language checkpoint"
            raise InputError("its model reads text only and takes no pictures", where=self.bundle.path, fix=fix)

    @cached_property
    def image_rule(self) -> Any:
        """How pictures become patches. Raises InputError when the model takes none."""
        self.check_sees()
        vision, file = self.bundle.config["vision_config"], self.bundle.processor("preprocessor_config.json")
        values = json.loads(file.read_bytes()) if file else {}
        # The tower's own sizes: a checkpoint may come without a preprocessor_config.json.
        values |= {"patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"]}
        values |= {"temporal_patch_size": vision["temporal_patch_size"]}
        return self.bundle.family.image_rule(values)

    def embed(self, images: list[Any]) -> tuple[np.ndarray | None, np.ndarray]:
        """Image embeddings [I,D] (None without pictures) and grids [pictures,3] of PIL pictures."""
        if not images:
            return None, np.zeros((0, 3), np.int64)
        family, merge, embeds, grids = self.bundle.family, self.bundle.shape.merge, [], []
        rule = self.image_rule
        for image in images:  # patches attend within their own picture, so one at a time needs the least memory
            pixels, grid = family.patchify([image], rule)
            self._check_memory(len(pixels))
            embeds.append(self.backend.vision(family.vision_inputs(pixels, grid, merge)))
            grids.append(grid)
        return np.concatenate(embeds), np.concatenate(grids)

    def _check_memory(self, patches: int) -> None:
        """Raises InputError for a picture whose attention among patches cannot fit in memory."""
        per_pair = (
            4 * self.bundle.config["vision_config"]["num_heads"] + 24
        )  # bytes: scores of every head, and the mask
        need, free = per_pair * patches**2, psutil.virtual_memory().available
        if need > 0.9 * free:
            raise InputError(
                f"{patches} patches need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free",
                where="picture",
                fix=f"shrink it to {(0.9 * free / need) ** 0.25:.0%} of its width and height or less",
            )

    def request(self, ids: np.ndarray, grid: np.ndarray, embeds: np.ndarray | None) -> Request:
        """A prompt ready to run. Raises InputError, also when it is longer than the model can hold."""
        self.check_length(len(ids))
        return Request.of(ids, grid, self.bundle.family, self.bundle.shape, self.bundle.weights, embeds)

    def check_reads_several(self, what: str) -> None:
        """Raises InputError where the backend cannot do `what`, for which several tokens are read at once."""
        if not self.backend.reads_several:
            text = f"{what} needs several tokens read at once, its engines read one"
            raise InputError(text, where=f"backend {self.backend.name}", fix="add --backend onnxruntime")

    def check_length(self, tokens: int) -> None:
        """Raises InputError when a prompt is longer than the model can hold."""
        limit = self.bundle.shape.max_positions or tokens
        if tokens > limit:
            fix = "use smaller or fewer pictures, or a shorter text"
            raise InputError(f"{tokens} tokens, the model holds {limit}", where="prompt", fix=fix)

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
        outputs = self.backend.prefill(feeds, "prefill_dense" if budget.dense else "prefill")
        return Prefilled(self, request, budget, *self.split(outputs))

    def split(self, outputs: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A graph's outputs: what the host reads, as arrays; and the cache, which stays where it is."""
        cache = {n: v for n, v in outputs.items() if n.startswith("present.")}
        return self.backend.host({n: v for n, v in outputs.items() if n not in cache}), cache

    def tokens(self, prefilled: Prefilled, limit: int, stop: frozenset[int]) -> Iterator[int]:
        """Greedy token ids until a stop id (not yielded) or `limit` tokens."""
        logits, decoder = prefilled.logits, None
        for step in range(limit):
            token = int(logits[0].argmax())
            if token in stop:
                return
            yield token
            if step + 1 < limit:
                decoder = decoder or prefilled.decoder()
                logits = decoder.step(prefilled.step_feeds(token, step))

    def conversation(
        self,
        images: list[Any] | None = None,
        system: str | None = None,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
    ) -> turns.Conversation:
        """Questions about the same PIL pictures, one after the other (see turns.py). Raises InputError."""
        turns.check_bundle(self.recipe, dense)
        self.check_reads_several("a second question")
        return turns.Conversation(self, images or [], system, Budget(dense, neuron_share, token_share, seed))

    def generate(
        self,
        prompt: str,
        images: list[Any] | None = None,
        system: str | None = None,
        max_new_tokens: int = 128,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        guard: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> turns.Answer:
        """Answer one question about PIL pictures, greedily; `on_text` gets the text as it comes.

        `guard`: check drafts of that many tokens against the dense model (see guard.py). Nothing is shown before the
        weights match their hash. Raises InputError, BundleError.
        """
        budget = Budget(dense, neuron_share, token_share, seed)
        return turns.Conversation(self, images or [], system, budget).ask(prompt, max_new_tokens, guard, on_text)


def load(
    path: str | Path,
    threads: int = 0,
    progress: Callable[..., None] = lambda what, *_: None,
    backend: str | None = None,
) -> Engine:
    """Open a bundle for running; `backend` None: the one that it was built for. Raises InputError, BundleError."""
    progress("open the bundle")
    return Engine(Bundle(path), threads, backend=backend)
