"""One question under one recipe: whether the answer is right, what was kept, and the time beside dense.

latency  (prefill + gather + ms per token * tokens) / the same of dense      medians over the timed questions, dense and
                                                                             sparse in turn; the vision tower is left out
memory   (bytes of weights + bytes of KV rows that a step reads) / the same of dense      counted, so there is no noise
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..base.errors import GateFailed
from ..base.metrics import kept_of_dense, spread
from ..evals.exam import Exam, Written
from ..evals.other_policies import with_policies
from ..evals.task import Task
from ..evals.weights_read import WeightsRead, of_dense
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe
from .space import shares

_RUNNERS = 3  # pairs of policies whose sessions are kept ready; trials that differ only in shares use the same ones


@dataclass(frozen=True)
class Times:
    """Milliseconds of one answer; None where it ended with its first token."""

    prefill: float
    gather: float | None
    step: float | None
    tokens: int


@dataclass(frozen=True)
class Answered:
    """The outcome of one question. Bytes: of weights and KV rows that a step of decode reads; bits: for each weight."""

    right: bool
    bytes: int
    dense_bytes: int
    neuron_share: float
    image_tokens: int
    image_tokens_kept: int
    times: tuple[Times, Times] | None = None  # dense, sparse
    bits: float = 32.0
    dense_bits: float = 32.0


class Judge(Protocol):
    """Answers questions under a recipe: a bundle does (`BundleJudge`), or in tests a formula."""

    def dense(self, number: int) -> bool: ...

    def ask(self, recipe: Recipe, number: int, timed: bool) -> Answered: ...


class BundleJudge:
    """Asks a bundle, under any policies that its dense graphs can be rewritten to."""

    def __init__(self, runner: Runner, task: Task, seed: int, progress: Callable[..., None]):
        self.runner, self.task, self.seed = runner, task, seed
        self.exam = Exam(runner, task, progress)
        for line in self.exam.notes:  # on pictures
            progress(line)
        self._right: dict[int, bool] = {}
        self._runners: dict[Recipe, Runner] = {}

    def dense(self, number: int) -> bool:
        """Whether the dense model is right; asked once."""
        if number not in self._right:
            self._right[number], _, _ = self._answer(self.runner, number, Budget(dense=True))
        return self._right[number]

    def ask(self, recipe: Recipe, number: int, timed: bool) -> Answered:
        """One question; `timed`: dense is timed just before, in the same process."""
        runner, beside = self._runner(recipe), None
        neurons, tokens = shares(recipe)
        if timed:
            self._right[number], beside, _ = self._answer(self.runner, number, Budget(dense=True))
        # A random control that drops the same positions in every question would measure those positions.
        budget = Budget(False, neurons, tokens, self.seed + number)
        right, times, written = self._answer(runner, number, budget)
        prefilled = written.prefilled
        request, shape = prefilled.request, runner.bundle.shape
        counts, dense = int(prefilled.core_set.counts.sum()), self._dense_read
        return Answered(
            right=right,
            bytes=round(written.read.bytes) + prefilled.kept_tokens.shape[1] * self._row_bytes,
            dense_bytes=round(dense.bytes) + request.tokens * self._row_bytes,
            neuron_share=counts / (shape.layers * shape.ffn),
            image_tokens=request.image_tokens,
            image_tokens_kept=int(request.is_image[0, prefilled.kept_tokens[0]].sum()),
            times=(beside, times) if beside else None,
            bits=written.read.bits,
            dense_bits=dense.bits,
        )

    @cached_property
    def _dense_read(self) -> WeightsRead:
        return of_dense(self.runner)

    @cached_property
    def _row_bytes(self) -> int:
        shape = self.runner.bundle.shape
        return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim  # key and value of a token in every layer

    def _answer(self, runner: Runner, number: int, budget: Budget) -> tuple[bool, Times, Written]:
        question = self.task.questions[number]
        written = self.exam.answer(runner, question, budget)
        right, _ = self.exam.right(runner, question, written.ids)
        return right, Times(written.prefill_ms, written.gather_ms, written.median_step_ms, len(written.ids)), written

    def _runner(self, recipe: Recipe) -> Runner:
        """The bundle under these policies. Shares are given with each question, so they are not part of the key."""
        neurons, tokens = shares(recipe)
        # A first cut has a share of its own, which is asked for as the graph's recipe says.
        first = recipe.tokens.first_share if recipe.tokens.first != "none" else 1.0
        key = recipe.replace(neurons__share=neurons and 1.0, tokens__share=tokens and first)
        if key not in self._runners:
            while len(self._runners) >= _RUNNERS:
                del self._runners[next(iter(self._runners))]
            made = with_policies(self.runner, recipe)
            # The first run also loads sessions and pages, which must not count as time of a trial.
            self._answer(made, 0, Budget(False, neurons, tokens))
            self._answer(self.runner, 0, Budget(dense=True))
            self._runners[key] = made
        self._runners[key] = self._runners.pop(key)  # the one used last goes last
        return self._runners[key]


def memory(answers: list[Answered]) -> dict[str, Any]:
    """Bytes that a step reads, and dense ones, medians over questions; `ratio` of the two; bits for each weight."""
    names = ("bytes", "dense_bytes", "bits", "dense_bits")
    kept, whole, bits, dense_bits = (float(np.median([getattr(a, k) for a in answers])) for k in names)
    read = {"bits_read_per_weight": bits, "dense_bits_read_per_weight": dense_bits}
    return {"ratio": kept / whole, "bytes": kept, "dense_bytes": whole, "n": len(answers)} | read


def latency(answers: list[Answered]) -> dict[str, Any] | None:
    """Milliseconds of dense and sparse with quartiles, and `ratio`, for answers as long as dense's; None if none was timed."""
    timed = [a.times for a in answers if a.times]
    if not timed:
        return None
    out: dict[str, Any] = {"n": len(timed), "tokens": float(np.mean([dense.tokens for dense, _ in timed]))}
    totals = []
    for who, times in zip(("dense", "sparse"), zip(*timed, strict=True), strict=True):
        parts = {k: [v for t in times if (v := getattr(t, k)) is not None] for k in ("prefill", "gather", "step")}
        out[who] = {f"{k}_ms": spread(v) for k, v in parts.items() if v}
        middle = {k: float(np.median(v)) if v else 0.0 for k, v in parts.items()}
        # Dense gathers nothing: its decoder reads the rows in the file.
        gather = middle["gather"] if who == "sparse" else 0.0
        totals.append(middle["prefill"] + gather + middle["step"] * max(0.0, out["tokens"] - 1))
    return out | {"ratio": totals[1] / totals[0]}


def examine(
    judge: Judge,
    recipe: Recipe,
    numbers: list[int],
    steps: list[int],
    floor: float,
    timed: int,
    beat: Callable[[int], None],
) -> tuple[float, dict[str, Any]]:
    """(share of dense accuracy kept, figures), after the last step or the first one at which the floor is out of reach."""
    answers: list[Answered] = []
    for step in steps:
        for number in numbers[len(answers) : step]:
            answers.append(judge.ask(recipe, number, len(answers) < timed))
            beat(len(answers))
        dense = np.array([judge.dense(n) for n in numbers[:step]])
        right = np.array([a.right for a in answers])
        kept, interval = kept_of_dense(dense, right)
        if interval and interval[1] < floor:
            break
    if kept is None:
        raise GateFailed("the dense model answers nothing right", where="tune", fix="check the questions and answers")
    pictures = sum(a.image_tokens for a in answers)
    return kept, {
        "whole": len(answers) == steps[-1],
        "n": len(answers),
        "of_dense_ci": interval,
        "accuracy": float(right.mean()),
        "neuron_share": float(np.mean([a.neuron_share for a in answers])),
        "token_share": sum(a.image_tokens_kept for a in answers) / pictures if pictures else 1.0,
        "memory": memory(answers),
        "latency": latency(answers),
        "right": "".join("01"[int(r)] for r in right),
        "dense": "".join("01"[int(d)] for d in dense),
    }
