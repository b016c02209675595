"""The questions of a task put to a bundle: pictures seen once, answers with the logits and the times behind them.

Exam(runner, task).answer(runner, question, budget) -> Written(ids, logits [T,V], milliseconds)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..families import Pictures
from ..host.clips import Clip
from ..host.decode import Spent, decode, forced, recorded
from ..host.picture_notes import counted
from ..host.runner import Budget, Prefilled, Runner
from .task import Footage, Question, Task
from .weights_read import Steps, WeightsRead


@dataclass
class Written:
    """An answer: its ids, the logits [T,V] before each of them and before the stop, what a step read, and milliseconds."""

    prefilled: Prefilled
    ids: list[int]
    logits: np.ndarray
    read: WeightsRead
    prefill_ms: float = 0.0
    gather_ms: float | None = None  # None where the answer ended with its first token
    step_ms: list[float] = field(default_factory=list)

    @property
    def median_step_ms(self) -> float | None:
        """Of all steps."""
        return float(np.median(self.step_ms)) if self.step_ms else None


def write(runner: Runner, prefilled: Prefilled, limit: int, ids: Sequence[int] | None = None) -> Written:
    """The greedy answer to a prompt, under the bundle's own rule, or `ids` in its place.

    The logits are the model's own, as they are before the rule's penalty.
    """
    logits: list[np.ndarray] = []
    spent: list[Spent] = []
    row = runner.answering(prefilled, runner.rule(), limit)
    row.choose = recorded(row.choose if ids is None else forced(ids), logits)
    steps = Steps(runner)
    with steps.counted():
        for _ in decode(runner.backend, [row], spent.append):
            pass
    gather = 1000 * sum(s.gather for s in spent) if spent else None
    read = steps.per_step(prefilled, len(spent))
    return Written(prefilled, row.ids, np.stack(logits), read, 0.0, gather, [1000 * s.step for s in spent])


class Exam:
    """A task's questions, their pictures already seen by one bundle's tower, which other policies share."""

    def __init__(self, runner: Runner, task: Task, progress: Callable[..., None]):
        self.runner, self.task, self.progress = runner, task, progress
        digest, notes = hashlib.sha256(), {}
        # By picture or clip, and by how many of them the question has.
        self._seen: dict[tuple[str | Footage, int], Pictures] = {}
        counts: dict[str | Footage, set[int]] = {}
        for q in task.questions:
            for one in q.shown:
                counts.setdefault(one, set()).add(len(q.shown))
        found = sorted(counts, key=lambda one: (isinstance(one, Footage), str(one)))
        for i, one in enumerate(found):
            if i % 50 == 0:
                progress("look at the pictures", i, len(found))
            shown = task.opened(one, runner)
            for image in shown.frames.images if isinstance(shown, Clip) else (shown.image,):
                digest.update(repr(image.size).encode() + image.tobytes())
            for of in sorted(counts[one]):
                self._seen[one, of] = runner.see([shown], of)
            notes[shown.name] = runner.notes_on(shown)
        self.notes = counted(notes, len(found))
        self.fingerprint = digest.hexdigest()

    def prefill(self, runner: Runner, question: Question, budget: Budget) -> Prefilled:
        """A question's prompt after prefill."""
        pictures = Pictures.joined([self._seen[one, len(question.shown)] for one in question.shown])
        request = runner.ask(question.text, pictures, control_tokens=self.task.control_tokens)
        return runner.prefill(request, budget)

    def answer(self, runner: Runner, question: Question, budget: Budget) -> Written:
        """Prefill and greedy answer under the bundle's rule, timed."""
        started = time.perf_counter()
        prefilled = self.prefill(runner, question, budget)
        prefill_ms = 1000 * (time.perf_counter() - started)
        written = write(runner, prefilled, self.task.limits[question.kind])
        written.prefill_ms = prefill_ms
        return written

    def right(self, runner: Runner, question: Question, ids: list[int]) -> tuple[bool, str]:
        """Whether an answer counts as right, and what it says."""
        said = runner.chat.decode(ids).strip()
        return any(self.task.same(said, right) for right in question.answers), said
