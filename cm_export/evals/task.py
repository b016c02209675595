"""What a task is: questions about pictures, each with the answers that count as right.

task file           KINDS = {"word": 4, ...}           kind of question -> longest answer in tokens
                    questions(kind) -> [Question]      all of that kind, always the same
                    open_picture(name) -> PIL picture
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base import by_name
from ..base.errors import InputError
from ..host.clips import Clip
from ..host.images import Opened
from ..host.picture_notes import Note
from ..host.runner import Runner

# Models that come with the program, and the task that each was trained for.
OWN_TASKS = {"demo": "easy-vqa", "scenes": "scenes", "scenes-llava": "scenes"}


@dataclass(frozen=True, order=True)
class Footage:
    """A clip that a question is about: its file, and how many of its frames are read; neither: as the checkpoint says."""

    path: str
    rate: float | None = None  # a second
    count: int | None = None

    def opened(self, runner: Runner) -> Clip:
        """The clip as this model reads it. Raises InputError, also where it takes none."""
        return runner.clip(self.path, rate=self.rate, count=self.count)


@dataclass(frozen=True)
class Question:
    """One question about pictures (names that the task can open), clips after them, and the answers that count as right."""

    kind: str
    pictures: tuple[str, ...]
    text: str
    answers: tuple[str, ...]
    clips: tuple[Footage, ...] = ()

    @property
    def shown(self) -> tuple[str | Footage, ...]:
        """What it is about, in the order of the prompt."""
        found: list[str | Footage] = [*self.pictures, *self.clips]
        return tuple(found)


@dataclass(frozen=True)
class Task:
    """Questions to ask; `same(said, right)` says whether an answer counts."""

    name: str
    questions: list[Question]
    limits: dict[str, int]
    open_picture: Callable[[str], Any]
    same: Callable[[str, str], bool] = str.__eq__
    rule: str = "exact match"
    control_tokens: bool = False  # whether those in a question are tokens, not text
    notes: Mapping[str, Sequence[Note]] = field(default_factory=dict)  # what to know about pictures, by their names

    def opened(self, shown: str | Footage, runner: Runner) -> Opened:
        """A picture or a clip of a question, for `runner.see`. Raises InputError."""
        if isinstance(shown, Footage):
            return shown.opened(runner)
        return Opened(self.open_picture(shown), shown, tuple(self.notes.get(shown, ())))


def kinds_of(name: str) -> tuple[str, ...]:
    """The kinds of question of the task of that name. Raises InputError."""
    return tuple(by_name.load("cm_export.evals.tasks", name, "task").KINDS)


def check_distinct(questions: Sequence[Question], where: str) -> None:
    """Raises InputError for a question about the same pictures that is there twice: it would count twice.

    Intervals would be too narrow, and `tune` would ask on held-out questions what it has searched on.
    """
    seen: dict[tuple[Any, ...], int] = {}
    for number, question in enumerate(questions, 1):
        first = seen.setdefault((question.shown, question.text), number)
        if first != number:
            what = f"question {number} repeats question {first}: {question.text[:60]!r}"
            fix = 'leave one of them out; several right answers go into one: "answers": [..]'
            raise InputError(what, where=where, fix=fix)


def load(name: str, kinds: tuple[str, ...] = (), limit: int | None = None, seed: int | None = None) -> Task:
    """The task of a file in evals/: `limit` questions of each kind, drawn at random. Raises InputError."""
    module = by_name.load("cm_export.evals.tasks", name, "task")
    for kind in kinds:
        if kind not in module.KINDS:
            fix = by_name.nearest(kind, [*module.KINDS])
            raise InputError(f"unknown kind of question {kind!r}", where=f"task {name.replace('_', '-')}", fix=fix)
    rng = random.Random(seed or 0)
    chosen: list[Question] = []
    for kind in dict.fromkeys(kinds or module.KINDS):
        pool = module.questions(kind)
        chosen += rng.sample(pool, min(limit, len(pool))) if limit else pool
    return Task(name.replace("_", "-"), chosen, module.KINDS, module.open_picture)
