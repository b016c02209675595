"""Several questions about the same pictures: each later one is read over the cache that is there, in one pass.

    turn 1    vision -> prefill   [ system <i><i><i> q1 ]                      -> tokens and neurons for q1 -> answer a1
    turn 2              turn      [ the same rows       ][ a1 q2 ]             -> tokens and neurons for q2 -> answer a2
    turn 3              turn      [ the same rows        a1 q2  ][ a2 q3 ]     -> ...

The cache of a conversation holds the dense model's rows only: an answer, which was decoded sparsely, is read again with
the question after it. So what is kept for a question is what a prefill of the whole conversation would keep, if the
new text judges; rows of text are always kept. Positions go on where the answer ended (METHOD: keep the full KV).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base import environment
from ..base.errors import BundleError
from ..families import Pictures
from . import picture_notes
from .decode import decode
from .guard import Report, check_bundle, guarded
from .images import given
from .runner import Budget, Prefilled, Runner
from .sampling import Rule, Sampling, check_minimum


@dataclass(frozen=True)
class Answer:
    """Text and ids of an answer, its figures, kept patch groups per picture [gh,gw] bool, and remarks for the user."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    kept: list[np.ndarray]
    notes: list[str]


@dataclass
class _Times:
    """When each part of an answer was done, in seconds of time.perf_counter."""

    started: float
    seen: float = 0.0
    prefilled: float = 0.0
    first: float = 0.0  # token
    ended: float = 0.0


class Conversation:
    """Questions about the same pictures, one after the other; `LoadedBundle.conversation` makes one."""

    def __init__(
        self,
        runner: Runner,
        images: Sequence[Any],
        system: str | None,
        budget: Budget,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ):
        """`control_tokens`: those typed in a text are tokens, not text. `sampling`: as of `LoadedBundle.generate`."""
        self.runner, self._system, self._budget = runner, system, budget
        self._images = [given(image, f"picture {number}") for number, image in enumerate(images, 1)]
        self._control_tokens, self._sampling = control_tokens, sampling
        self._prompts: list[str] = []
        self._answers: list[str] = []
        self._pictures = Pictures()
        self._ids = np.zeros(0, np.int64)  # of everything up to the last question
        self._context: Prefilled | None = None

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        guard: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer the next question; arguments and errors as of `LoadedBundle.generate`."""
        runner = self.runner
        if guard:
            check_bundle(runner.recipe)
            runner.check_reads_several("the guard")
        rule, asked = runner.rule(self._sampling), self._sampling or Sampling()
        limit = max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        check_minimum(asked.min_new_tokens or 0, limit)  # the checkpoint's own minimum may be cut
        times, before = _Times(time.perf_counter()), self._context
        context = self._first(prompt, times) if before is None else self._later(prompt, before, times)
        times.prefilled = time.perf_counter()
        runner.bundle.wait_verified()
        report = Report(guard) if guard else None
        ids, text, ended = self._write(context, rule, limit, report, times, on_text)
        kept = kept_cells(context, self._pictures)
        stats = _stats(context, ids, kept, times, runner.bundle.shape.ffn)
        stats |= {"stopped": ended, "sampling": rule.to_dict(), "max_new_tokens": limit}
        if report:  # tokens come a draft at a time, the first ones after the first check
            spent = report.draft_s + report.check_s
            stats |= {"guard": report.to_dict(), "decode_s": spent, "tokens_per_s": len(ids) / spent if ids else None}
        if before is not None:
            stats |= {"read_tokens": context.request.tokens - before.request.tokens}
        unknown = runner.chat.unknown_words(prompt)
        notes = (
            [] if before else [picture_notes.line(p.name, note) for p in self._images for note in runner.notes_on(p)]
        )
        notes += [f"unknown to this model's vocabulary: {', '.join(unknown)}"] if unknown else []
        self._context = context
        self._prompts.append(prompt)
        self._answers.append(text)
        return Answer(text, ids, stats, kept, notes + runner.backend.notes)

    def _write(
        self,
        context: Prefilled,
        rule: Rule,
        limit: int,
        report: Report | None,
        times: _Times,
        on_text: Callable[[str], None] | None,
    ) -> tuple[list[int], str, str]:
        """Ids and text of the answer, and why it ended."""
        runner, ids, shown = self.runner, list[int](), 0
        row = runner.answering(context, rule, limit)
        writing = row.writing
        assert writing is not None  # `answering` gives every row one
        source: Iterator[int] = (
            guarded(runner, context, row.limit, runner.chooser(context.request, rule), report, writing)
            if report
            else (token for _, token in decode(runner.backend, [row]))
        )
        for token in source:
            times.first = times.first or time.perf_counter()
            ids.append(token)
            shown = _show(writing.text, shown, on_text)
        writing.end()
        _show(writing.text, shown, on_text)
        times.ended = time.perf_counter()
        times.first = times.first or times.ended
        if writing.stopped is not None:
            ended = "stop string"
        elif len(ids) < row.limit:
            ended = "stop token"
        else:
            ended = "max-new-tokens" if row.limit == limit else "context length"
        return ids, writing.text, ended

    def _first(self, prompt: str, times: _Times) -> Prefilled:
        """The pictures and the first question."""
        self._pictures = self.runner.see(self._images)
        times.seen = time.perf_counter()
        self._ids = self._encode([prompt], [])
        return self.runner.prefill(self.runner.request(self._ids, self._pictures), self._budget)

    def _later(self, prompt: str, before: Prefilled, times: _Times) -> Prefilled:
        """What was said since the last question, and the next one, read over the cache; no picture is seen again."""
        times.seen = times.started
        ids = self._encode([*self._prompts, prompt], self._answers)
        new = added(self._ids, ids, self.runner.bundle.path)
        self.runner.check_length(len(ids))
        # The question begins where what was said before it, rendered alone, ends.
        said = self._encode(self._prompts, self._answers)
        context = before.then(new.tolist(), len(ids) - _alike(said, ids))
        self._ids = ids
        return context

    def _encode(self, prompts: list[str], answers: list[str]) -> np.ndarray:
        counts = self._pictures.counts
        return self.runner.chat.encode_turns(prompts, answers, self._system, counts, self._control_tokens)


def _show(text: str, shown: int, on_text: Callable[[str], None] | None) -> int:
    """Hand out what is new in the text after `shown` characters; returns how many there are now."""
    if on_text and len(text) > shown:
        on_text(text[shown:])
    return len(text)


def _stats(context: Prefilled, ids: list[int], kept: list[np.ndarray], times: _Times, ffn: int) -> dict[str, Any]:
    """The figures of an answer."""
    decode = times.ended - times.first
    return {
        "dense": context.budget.dense,
        "prompt_tokens": context.request.tokens,
        "image_tokens": context.request.image_tokens,
        "kept_tokens": context.kept_tokens.shape[1],
        "image_tokens_kept": int(sum(k.sum() for k in kept)),
        "neurons": ffn,
        "neurons_kept": context.neurons,
        "new_tokens": len(ids),
        "ttft_s": times.first - times.started,
        "vision_s": times.seen - times.started,
        "prefill_s": times.prefilled - times.seen,
        "decode_s": decode,
        "tokens_per_s": (len(ids) - 1) / decode if len(ids) > 1 else None,
        "peak_memory_bytes": environment.peak_memory_bytes(),
    }


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


def kept_cells(context: Prefilled, pictures: Pictures) -> list[np.ndarray]:
    """Per picture, [rows, columns] bool: which image tokens of its (first) frame stayed."""
    stays = np.zeros(context.request.tokens, bool)
    stays[context.kept_tokens[0]] = True
    numbers = context.request.picture[0]
    return [stays[numbers == i].reshape(grid)[0] for i, grid in enumerate(pictures.grids)]
