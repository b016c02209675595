"""Several questions about the same pictures: each later one is read over the cache that is there, in one pass.

    turn 1    vision -> prefill   [ system <i><i><i> q1 ]                      -> tokens and neurons for q1 -> answer a1
    turn 2              turn      [ the same rows       ][ a1 q2 ]             -> tokens and neurons for q2 -> answer a2
    turn 3              turn      [ the same rows        a1 q2  ][ a2 q3 ]     -> ...

The cache of a conversation holds the dense model's rows only: an answer, which was decoded sparsely, is read again with
the question after it. So what is kept for a question is what a prefill of the whole conversation would keep, if the
new text judges; rows of text are always kept. Positions go on where the answer ended (METHOD: keep the full KV).
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import BundleError, InputError
from ..recipe.recipe import Recipe
from . import guard as guards

if TYPE_CHECKING:
    from .runner import Budget, Engine, Prefilled


@dataclass(frozen=True)
class Answer:
    """Text and ids of an answer, its figures, kept patch groups per picture [gh,gw] bool, and remarks for the user."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    kept: list[np.ndarray]
    notes: list[str]


def check_bundle(recipe: Recipe, dense: bool) -> None:
    """Raises InputError for a bundle that cannot answer a second question. `dense`: its dense graphs always can."""
    if dense or recipe.has_turn:
        return
    what, fix = "this bundle drops the cache of cut tokens", "build it with --token-cache index (or --tokens dense)"
    if recipe.tokens.whole_cache:
        what = f"tokens.policy = {recipe.tokens.policy!r} judges by what is not kept after the first question"
        fix = "build it with --tokens attention (or value, diverse, spread, random, dense) and no first cut"
    raise InputError(
        f"{what}, so a second question cannot be asked", where="conversation", fix=f"{fix}, or use --dense"
    )


class Conversation:
    """Questions about the same pictures, one after the other; `Engine.conversation` makes one."""

    def __init__(self, engine: "Engine", images: list[Any], system: str | None, budget: "Budget"):
        self.engine, self._images, self._system, self._budget = engine, images, system, budget
        self._prompts: list[str] = []
        self._answers: list[str] = []
        self._counts: list[int] = []  # image tokens of each picture
        self._grid = np.zeros((0, 3), np.int64)
        self._ids = np.zeros(0, np.int64)  # of everything up to the last question
        self._context: Prefilled | None = None

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        guard: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer the next question, greedily; arguments and errors as of `Engine.generate`."""
        engine = self.engine
        if guard:
            guards.check_bundle(engine.recipe)
            engine.check_reads_several("the guard")
        started = time.perf_counter()
        before = self._context
        context, seen_at = self._first(prompt) if before is None else self._later(prompt, started)
        prefilled_at = time.perf_counter()
        engine.bundle.wait_verified()
        ids, pieces, first_at = [], [], None
        report, stop = guards.Report(guard) if guard else None, engine.chat.stop_ids
        source = (
            guards.guarded(engine, context, max_new_tokens, stop, report)
            if report
            else engine.tokens(context, max_new_tokens, stop)
        )
        for token, text in engine.chat.stream(source):
            first_at = first_at or time.perf_counter()
            if token >= 0:
                ids.append(token)
            pieces.append(text)
            if on_text and text:
                on_text(text)
        ended = time.perf_counter()
        first_at = first_at or ended
        kept = _kept_groups(context.kept_tokens[0], context.request.is_image[0], self._grid, engine.bundle.shape.merge)
        stats = {
            "dense": context.budget.dense,
            "prompt_tokens": context.request.tokens,
            "image_tokens": context.request.image_tokens,
            "kept_tokens": context.kept_tokens.shape[1],
            "image_tokens_kept": int(sum(k.sum() for k in kept)),
            "neurons": engine.bundle.shape.ffn,
            "neurons_kept": context.neurons,
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
        if before is not None:
            stats |= {"read_tokens": context.request.tokens - before.request.tokens}
        unknown = engine.chat.unknown_words(prompt)
        notes = [f"unknown to this model's vocabulary: {', '.join(unknown)}"] if unknown else []
        notes += engine.backend.notes
        self._context = context
        self._prompts.append(prompt)
        self._answers.append("".join(pieces))
        return Answer(self._answers[-1], ids, stats, kept, notes)

    def _first(self, prompt: str) -> tuple["Prefilled", float]:
        """The pictures and the first question, and when the pictures were seen."""
        engine = self.engine
        embeds, self._grid = engine.embed(self._images)
        seen_at = time.perf_counter()
        self._counts = engine.bundle.family.image_tokens(self._grid, engine.bundle.shape.merge)
        self._ids = engine.chat.encode(prompt, self._system, self._counts)
        request = engine.request(self._ids, self._grid, embeds)
        return engine.prefill(request, self._budget), seen_at

    def _later(self, prompt: str, started: float) -> tuple["Prefilled", float]:
        """What was said since the last question, and the next one, read over the cache; no picture is seen."""
        prompts = [*self._prompts, prompt]
        ids = self.engine.chat.encode_turns(prompts, self._answers, self._system, self._counts)
        new = added(self._ids, ids, self.engine.bundle.path)
        self.engine.check_length(len(ids))
        # The question begins where what was said before it, rendered alone, ends.
        said = self.engine.chat.encode_turns(self._prompts, self._answers, self._system, self._counts)
        context = self._context.then(new.tolist(), len(ids) - _alike(said, ids))
        self._ids = ids
        return context, started


def added(before: np.ndarray, ids: np.ndarray, bundle: Any) -> np.ndarray:
    """The tokens of `ids` after `before`. Raises BundleError unless `before` is how `ids` begins."""
    at = _alike(before, ids)
    if at == len(before) < len(ids):
        return ids[at:]
    raise BundleError(
        f"the chat template says token {at} of the first question otherwise once it is answered",
        where=bundle,
        fix="ask each question in a run of its own",
    )


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids are the same from the start."""
    same = a[: len(b)] == b[: len(a)]
    return len(same) if same.all() else int(np.argmin(same))


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
