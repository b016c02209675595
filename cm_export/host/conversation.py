"""Several questions about the same pictures: each later one is read over the cache that is there, in one pass.

    turn 1    vision -> prefill   [ system <i><i><i> q1 ]                      -> tokens and neurons for q1 -> answer a1
    turn 2              turn      [ the same rows       ][ a1 q2 ]             -> tokens and neurons for q2 -> answer a2
    turn 3              turn      [ the same rows        a1 q2  ][ a2 q3 ]     -> ...

The cache of a conversation holds the dense model's rows only: an answer, which was decoded sparsely, is read again with
the question after it. So what is kept for a question is what a prefill of the whole conversation would keep, if the
new text judges; rows of text are always kept. Positions go on where the answer ended (METHOD: keep the full KV).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..base import environment
from ..base.errors import BundleError, InputError
from ..families import Pictures
from . import asking, picture_notes
from .asking import Asked, Limits
from .decode import Row, decode
from .guard import Report, check_bundle, guarded
from .runner import Prefilled, Runner
from .sampling import Rule, check_minimum
from .writing import Writing


@dataclass(frozen=True)
class Answer:
    """Text and ids of an answer, its figures, kept cells per picture [rows, columns] bool, and remarks for the user."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    kept: list[np.ndarray]
    notes: list[str]


class Stream(Iterator[str]):
    """The text of an answer, piece by piece as it is decoded; `answer` holds all of it once it has ended.

    Nothing is computed before the first piece is asked for. `close` (or leaving its `with` block) ends it early and frees
    what it holds; its conversation goes on as if the question had not been asked.
    """

    def __init__(self, pieces: Generator[str, None, Answer]):
        self._pieces, self._reading = pieces, threading.RLock()  # a generator runs for one thread at a time
        self.answer: Answer | None = None

    def __next__(self) -> str:
        with self._reading:
            try:
                return next(self._pieces)
            except StopIteration as end:
                self.answer = end.value or self.answer
                raise

    def close(self) -> None:
        """End it, wherever it is."""
        with self._reading:
            self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Answering:
    """A question that is being answered: its context, what was written so far, and when each part was done.

    Times are seconds of time.perf_counter.
    """

    prompt: str
    limits: Limits
    started: float
    before: Prefilled | None = None  # of the question before
    prompt_ids: np.ndarray | None = None  # of everything up to this question
    context: Prefilled | None = None
    row: Row | None = None  # what the decode loop takes for it
    rule: Rule = field(default_factory=Rule)
    limit: int = 0  # tokens that were asked for; the row's own is smaller where the context ends before
    report: Report | None = None
    seen: float = 0.0
    prefilled: float = 0.0
    first: float = 0.0  # token
    ended: float = 0.0
    paused: float = 0.0  # seconds for which whoever reads the stream let it wait

    @property
    def ready(self) -> Prefilled:
        """The context after prefill."""
        assert self.context is not None  # `begin` has set it
        return self.context

    @property
    def decoding(self) -> Row:
        """Its row."""
        assert self.row is not None  # `begin` has set it
        return self.row

    @property
    def writing(self) -> Writing:
        """Its text, as far as it has come."""
        assert self.decoding.writing is not None  # `Runner.answering` gives every row one
        return self.decoding.writing

    def stopped(self, tokens: int) -> str:
        """Why it ended after so many tokens."""
        if self.writing.stopped is not None:
            return "stop string"
        if tokens < self.decoding.limit:
            return "stop token"
        return "max-new-tokens" if self.decoding.limit == self.limit else "context length"

    def now(self) -> float:
        """The time, without the pauses."""
        return time.perf_counter() - self.paused


class Conversation:
    """Questions about the same pictures, one after the other; `LoadedBundle.conversation` makes one.

    One question at a time: a second one that comes before the first is answered, or its stream closed, is refused.
    """

    def __init__(self, runner: Runner, asked: Asked):
        """`asked`: pictures, system message, budget, how tokens are chosen, and what was said before the first question."""
        self.runner, self._system, self._budget = runner, asked.system, asked.budget
        self._images, self._control_tokens, self._sampling = asked.images, asked.control_tokens, asked.sampling
        self._prompts = asked.prompts[:-1]
        self._answers = list(asked.answers)
        self._pictures = Pictures()
        self._ids = np.zeros(0, np.int64)  # of everything up to the last question
        self._context: Prefilled | None = None
        self._busy = threading.Lock()

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        guard: int | bool | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer the next question; arguments and errors as of `LoadedBundle.generate`."""
        return whole(self.stream(prompt, max_new_tokens, guard), on_text)

    def stream(self, prompt: str, max_new_tokens: int = 128, guard: int | bool | None = None) -> Stream:
        """The same, piece by piece."""
        return self.written(asking.question(prompt), asking.limits(max_new_tokens, guard))

    def written(self, prompt: str, limits: Limits) -> Stream:
        """The answer to a question that was checked. Raises InputError where the bundle cannot do what is asked."""
        self.runner.check_open()
        if limits.guard:
            check_bundle(self.runner.recipe)
            self.runner.check_has("decode_dense", "the guard")
        self._limit(limits)
        return Stream(self._pieces(prompt, limits))

    def _pieces(self, prompt: str, limits: Limits) -> Generator[str, None, Answer]:
        if not self._busy.acquire(blocking=False):
            fix = "read or close its stream first; in several threads, let each have a conversation of its own"
            raise InputError("is still answering the question before", where="conversation", fix=fix)
        try:
            one, ids, shown = self.begin(prompt, limits), list[int](), 0
            for token in self._tokens(one):
                self.runner.check_open()
                one.first = one.first or one.now()
                ids.append(token)
                if text := one.writing.text[shown:]:
                    shown += len(text)
                    paused = time.perf_counter()
                    yield text
                    one.paused += time.perf_counter() - paused
            answer = self.end(one, ids)
            if text := answer.text[shown:]:
                yield text
            return answer
        finally:
            self._busy.release()

    def begin(self, prompt: str, limits: Limits) -> Answering:
        """Pictures seen and the prompt read. Nothing of the conversation changes before `end`."""
        self.runner.check_open()
        one = Answering(prompt, limits, time.perf_counter(), self._context)
        one.rule, one.limit = self.runner.rule(self._sampling), self._limit(limits)
        one.context = self._first(one) if one.before is None else self._later(one, one.before)
        one.row = self.runner.answering(one.context, one.rule, one.limit)
        one.prefilled = time.perf_counter()
        one.report = Report(limits.guard) if limits.guard else None
        self.runner.bundle.wait_read_verified()
        return one

    def _limit(self, limits: Limits) -> int:
        """Tokens of an answer at most. Raises InputError where it would have to be longer."""
        asked = self._sampling
        limit = limits.max_new_tokens if asked is None or asked.max_new_tokens is None else asked.max_new_tokens
        check_minimum((asked and asked.min_new_tokens) or 0, limit)  # the checkpoint's own minimum may be cut
        return limit

    def _tokens(self, one: Answering) -> Iterator[int]:
        runner = self.runner
        if one.report:
            choose = runner.chooser(one.ready.request, one.rule)
            return guarded(runner, one.ready, one.decoding.limit, choose, one.report, one.writing)
        return (token for _, token in decode(runner.backend, [one.decoding]))

    def end(self, one: Answering, ids: list[int]) -> Answer:
        """The answer, now a part of the conversation."""
        runner, context = self.runner, one.ready
        one.writing.end()
        text = one.writing.text
        one.ended = one.now()
        one.first = one.first or one.ended
        kept = kept_cells(context, self._pictures)
        stats = _stats(one, ids, runner.bundle.shape.ffn)
        if one.before is not None:
            stats |= {"read_tokens": context.request.tokens - one.before.request.tokens}
        unknown = runner.chat.unknown_words(one.prompt)
        notes, of = [], len(self._images)
        if not one.before:
            notes = [picture_notes.line(p.name, n) for p in self._images for n in runner.notes_on(p, of)]
        notes += [f"unknown to this model's vocabulary: {', '.join(unknown)}"] if unknown else []
        assert one.prompt_ids is not None  # set with the context
        self._context, self._ids = context, one.prompt_ids
        self._prompts.append(one.prompt)
        self._answers.append(text)
        return Answer(text, ids, stats, kept, notes + runner.backend.notes)

    def _first(self, one: Answering) -> Prefilled:
        """The pictures, what was said before, and the first question."""
        self._pictures = self.runner.see(self._images)
        one.seen = time.perf_counter()
        one.prompt_ids = self._encode([*self._prompts, one.prompt], self._answers)
        return self.runner.prefill(self.runner.request(one.prompt_ids, self._pictures), self._budget)

    def _later(self, one: Answering, before: Prefilled) -> Prefilled:
        """What was said since the last question, and the next one, read over the cache; no picture is seen again."""
        one.seen = one.started
        ids = self._encode([*self._prompts, one.prompt], self._answers)
        new = added(self._ids, ids, self.runner.bundle.path)
        self.runner.check_length(len(ids))
        # The question begins where what was said before it, rendered alone, ends.
        said = self._encode(self._prompts, self._answers)
        one.prompt_ids = ids
        return before.then(new.tolist(), len(ids) - _alike(said, ids))

    def _encode(self, prompts: list[str], answers: list[str]) -> np.ndarray:
        pictures = self._pictures.layouts
        return self.runner.chat.encode_turns(prompts, answers, self._system, pictures, self._control_tokens)


def whole(stream: Stream, on_text: Callable[[str], None] | None = None) -> Answer:
    """The answer at the end of a stream; `on_text` gets each piece."""
    with stream:  # whatever `on_text` raises, the conversation is free again
        for text in stream:
            if on_text:
                on_text(text)
    assert stream.answer is not None  # it has ended
    return stream.answer


def _stats(one: Answering, ids: list[int], ffn: int) -> dict[str, Any]:
    """The figures of an answer."""
    context, report, decode_s = one.ready, one.report, one.ended - one.first
    stats = {
        "dense": context.budget.dense,
        "prompt_tokens": context.request.tokens,
        "image_tokens": context.request.image_tokens,
        "kept_tokens": context.kept_tokens.shape[1],
        "image_tokens_kept": int(context.request.is_image[0, context.kept_tokens[0]].sum()),
        "neurons": ffn,
        "neurons_kept": context.neurons,
        "new_tokens": len(ids),
        "ttft_s": one.first - one.started,
        "vision_s": one.seen - one.started,
        "prefill_s": one.prefilled - one.seen,
        "decode_s": decode_s,
        "tokens_per_s": (len(ids) - 1) / decode_s if len(ids) > 1 else None,
        "stopped": one.stopped(len(ids)),
        "sampling": one.rule.to_dict(),
        "max_new_tokens": one.limit,
        "peak_memory_bytes": environment.peak_memory_bytes(),
    }
    if report:  # tokens come a draft at a time, the first ones after the first check
        spent = report.draft_s + report.check_s
        stats |= {"guard": report.to_dict(), "decode_s": spent, "tokens_per_s": len(ids) / spent if ids else None}
    return stats


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
    """Per picture, [rows, columns] bool: which cells of its (first) frame stayed."""
    stays = np.zeros(context.request.tokens, bool)
    stays[context.kept_tokens[0]] = True
    numbers = context.request.picture[0]
    return [layout.kept(stays[numbers == i]) for i, layout in enumerate(pictures.layouts)]
