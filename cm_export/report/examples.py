"""A few of the task's own questions, answered dense and sparse, with the image tokens that were kept drawn as PNG data.

More questions are asked than shown, and up to half of those shown are failures: a page of successes decides nothing.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evals.task import Question, Task
from ..host.conversation import Answer
from ..host.loaded import LoadedBundle
from ..host.overlay import compose
from ..host.request import Request
from ..host.runner import Runner

ASKED_PER_SHOWN = 4
_SIDE = 512  # pixels: enough to see the patches, small enough for a page


@dataclass(frozen=True)
class Said:
    """An answer, and whether it is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """pictures: data URIs; kept: image tokens (kept, all)."""

    kind: str
    question: str
    wanted: tuple[str, ...]
    dense: Said
    sparse: Said
    pictures: list[str]
    kept: tuple[int, int]


@dataclass(frozen=True)
class Examples:
    shown: list[Example]
    asked: int
    dense_right: int
    sparse_right: int


def pick(questions: list[Question], count: int) -> list[Question]:
    """`count` of them: every kind in turn, spread over the whole list; always the same ones."""
    by_kind: dict[str, list[Question]] = {}
    for q in questions:
        by_kind.setdefault(q.kind, []).append(q)
    share = -(-count // len(by_kind)) if by_kind else 0
    rows = []
    for pool in by_kind.values():
        at = np.linspace(0, len(pool) - 1, min(share, len(pool))).round().astype(int).tolist()
        rows.append([pool[i] for i in dict.fromkeys(at)])
    turns = [row[i] for i in range(share) for row in rows if i < len(row)]
    return turns[:count]


def ask(
    runner: LoadedBundle, chosen: LoadedBundle, task: Task, count: int, progress: Callable[..., None] = lambda *_: None
) -> Examples:
    """Dense and sparse answers to count * ASKED_PER_SHOWN questions, `count` of them to show; failures first."""
    answered = []
    asked = pick(task.questions, count * ASKED_PER_SHOWN)
    for number, q in enumerate(asked):
        progress("ask the examples", number, len(asked))
        pictures = [task.opened(one, runner) for one in q.shown]
        both = []
        for who, dense in ((runner, True), (chosen, False)):
            answer = who.generate(q.text, images=pictures, max_new_tokens=task.limits[q.kind], dense=dense)
            both.append((answer, Said(answer.text.strip(), any(task.same(answer.text.strip(), w) for w in q.answers))))
        answered.append((q, pictures, both))
    failed = [a for a in answered if not a[2][1][1].right]
    # At most half of them are failures, so that the page also shows what still works.
    some = failed[: max(1, count // 2)]
    shown = some + [a for a in answered if not any(a is b for b in some)][: count - len(some)]
    return Examples(
        [_example(q, pictures, both) for q, pictures, both in shown],
        len(answered),
        sum(both[0][1].right for _, _, both in answered),
        sum(both[1][1].right for _, _, both in answered),
    )


def _example(q: Question, pictures: list[Any], both: list[tuple[Answer, Said]]) -> Example:
    kept, stats = both[1][0].kept, both[1][0].stats
    return Example(
        q.kind,
        q.text,
        q.answers,
        both[0][1],
        both[1][1],
        [_png(picture.image, grid) for picture, grid in zip(pictures, kept, strict=True)],
        (stats["image_tokens_kept"], stats["image_tokens"]),
    )


def _png(picture: Any, kept: np.ndarray) -> str:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    drawn, data = compose(small, kept), io.BytesIO()
    drawn.thumbnail((_SIDE, _SIDE))
    drawn.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def requests_of(runner: Runner, task: Task, count: int) -> list[Request]:
    """Prompts of `count` questions, for the analysis of the layers."""
    out = []
    for q in pick(task.questions, count):
        out.append(runner.ask(q.text, runner.see([task.opened(one, runner) for one in q.shown])))
    return out
