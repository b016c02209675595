"""The one host loop: vision -> prefill -> core indices -> decode, over the sessions of a bundle; streams text.

prefill -> core_scores [L,1,F] -> pick K -> gather rows once -> decode step by step, cache never copied
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from . import guard as guards
from .backends.onnxruntime import Backend, CoreRows, Decoder
from .bundle import Bundle
from .chat import Chat
from .core_set import CoreSet, choose
from .errors import InputError
from .recipe import Recipe, from_dict
from .request import Request, core_row_names, prefill_feeds, sparse_feeds

MEASURED = ("core_scores", "core_mean_z", "core_mean_y")  # what a prefill says about neurons


@dataclass(frozen=True)
class Budget:
    """What one request may use; None takes the recipe's value."""

    dense: bool = False
    neuron_share: float | None = None
    token_share: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """Text and ids of an answer, its figures, kept patch groups per picture [gh,gw] bool, and remarks for the user."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    kept: list[np.ndarray]
    notes: list[str]


class Prefilled:
    """A prompt after prefill: first logits, which tokens were kept, and how to make its decoder."""

    def __init__(self, engine: "Engine", request: Request, budget: Budget):
        self.request, self.budget, self._engine = request, budget, engine
        feeds = prefill_feeds(request)
        recipe = engine.recipe
        for what, share in (("neurons", budget.neuron_share), ("tokens", budget.token_share)):
            if share is not None and getattr(recipe, what).policy == "dense":
                raise InputError(
                    f"a share of {what} was asked of a bundle that prunes none",
                    where=f"recipe: {what}.policy = 'dense'",
                    fix="leave the share out, or build with another policy",
                )
        if not budget.dense:
            feeds |= sparse_feeds(request, recipe, budget.token_share, seed=budget.seed)
        outputs = engine.backend.prefill(feeds, "prefill_dense" if budget.dense else "prefill")
        self.logits = outputs.pop("logits").numpy()
        self.measured = {n: outputs.pop(n).numpy() for n in MEASURED if n in outputs}
        self.scores = self.measured.get("core_scores")
        kept = outputs.pop("kept_tokens", None)
        mask = outputs.pop("kept_mask", None)
        self.kept_tokens = kept.numpy() if kept is not None else np.arange(request.tokens, dtype=np.int32)[None]
        self._kept_mask = mask.numpy() if mask is not None and recipe.tokens.cache == "cut" else None
        self._core_tokens = self.kept_tokens if kept is not None and recipe.tokens.cache == "index" else None
        self._cache = outputs
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

    def decoder(self) -> Decoder:
        """A decoder over this prompt's cache, with its core rows gathered."""
        engine = self._engine
        if self.budget.dense:
            return Decoder(engine.backend, "decode_dense", self._cache, {})
        return self.decoder_of(self.core_set.constants(engine.rows))

    def decoder_of(self, constants: dict[str, np.ndarray]) -> Decoder:
        """A decoder over this prompt's cache with rows (and a bias) of the caller's choice."""
        return Decoder(self._engine.backend, "decode", self._cache, constants)

    def step_feeds(self, token: int, step: int) -> dict[str, np.ndarray]:
        return self.request.step_feeds(token, step, self._kept_mask, self._core_tokens)


class Engine:
    """A bundle with its sessions, ready for requests one at a time."""

    def __init__(self, bundle: Bundle, threads: int = 0, recipe: Recipe | None = None, graph: Callable | None = None):
        """`recipe` and `graph` replace the bundle's own: how `eval` runs control policies on the same weights."""
        self.bundle, self.recipe = bundle, recipe or from_dict(bundle.manifest["recipe"], "manifest.json: recipe")
        copies = bundle.predictor if self.recipe.neurons.in_decode else None
        self.backend = Backend(graph or bundle.graph, bundle.weights, threads, copies)
        self.rows = CoreRows(bundle.weights, core_row_names(bundle.family, bundle.shape.layers), threads)

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

    def check_length(self, tokens: int) -> None:
        """Raises InputError when a prompt is longer than the model can hold."""
        limit = self.bundle.shape.max_positions or tokens
        if tokens > limit:
            fix = "use smaller or fewer pictures, or a shorter text"
            raise InputError(f"{tokens} tokens, the model holds {limit}", where="prompt", fix=fix)

    def prefill(self, request: Request, budget: Budget) -> Prefilled:
        return Prefilled(self, request, budget)

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
    ) -> Answer:
        """Answer one question about PIL pictures, greedily; `on_text` gets the text as it comes.

        `guard`: check drafts of that many tokens against the dense model (see guard.py). Nothing is shown before the
        weights match their hash. Raises InputError, BundleError.
        """
        if guard:
            guards.check_bundle(self.recipe)
        started = time.perf_counter()
        chat, merge = self.chat, self.bundle.shape.merge
        embeds, grid = self.embed(images or [])
        seen_at = time.perf_counter()
        counts = self.bundle.family.image_tokens(grid, merge)
        request = self.request(chat.encode(prompt, system, counts), grid, embeds)
        prefilled = self.prefill(request, Budget(dense, neuron_share, token_share, seed))
        prefilled_at = time.perf_counter()
        self.bundle.wait_verified()
        ids, pieces, first_at = [], [], None
        report = guards.Report(guard) if guard else None
        source = (
            guards.guarded(self, prefilled, max_new_tokens, chat.stop_ids, report)
            if report
            else self.tokens(prefilled, max_new_tokens, chat.stop_ids)
        )
        for token, text in chat.stream(source):
            first_at = first_at or time.perf_counter()
            if token >= 0:
                ids.append(token)
            pieces.append(text)
            if on_text and text:
                on_text(text)
        ended = time.perf_counter()
        kept = _kept_groups(prefilled.kept_tokens[0], request.is_image[0], grid, merge)
        first_at = first_at or ended
        stats = {
            "dense": dense,
            "prompt_tokens": request.tokens,
            "image_tokens": request.image_tokens,
            "kept_tokens": prefilled.kept_tokens.shape[1],
            "image_tokens_kept": int(sum(k.sum() for k in kept)),
            "neurons": self.bundle.shape.ffn,
            "neurons_kept": prefilled.neurons,
            "new_tokens": len(ids),
            "ttft_s": first_at - started,
            "vision_s": seen_at - started,
            "prefill_s": prefilled_at - seen_at,
            "decode_s": ended - first_at,
            "tokens_per_s": (len(ids) - 1) / (ended - first_at) if len(ids) > 1 else None,
            "stopped": "stop token" if len(ids) < max_new_tokens else "max-new-tokens",
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if report:  # tokens come a draft at a time, the first ones after the first check
            spent = report.draft_s + report.check_s
            stats |= {"guard": report.to_dict(), "decode_s": spent, "tokens_per_s": len(ids) / spent if ids else None}
        unknown = chat.unknown_words(prompt)
        notes = [f"unknown to this model's vocabulary: {', '.join(unknown)}"] if unknown else []
        return Answer("".join(pieces), ids, stats, kept, notes)


def load(path: str | Path, threads: int = 0, progress: Callable[..., None] = lambda what, *_: None) -> Engine:
    """Open a bundle for running. Raises InputError, BundleError."""
    progress("open the bundle")
    return Engine(Bundle(path), threads)


def _kept_groups(kept: np.ndarray, is_image: np.ndarray, grid: np.ndarray, merge: int) -> list[np.ndarray]:
    """Per picture, [rows, columns] bool: which image tokens (patch groups) stayed."""
    flags = np.zeros(len(is_image), bool)
    flags[kept] = True
    flags, out, at = flags[is_image], [], 0
    for t, h, w in grid.tolist():
        n = t * h * w // merge**2
        out.append(flags[at : at + n].reshape(t, h // merge, w // merge)[0])
        at += n
    return out
