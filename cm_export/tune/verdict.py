"""Which points are worth a second look, and whether one may be recommended.

questions   | search half: what the search saw        | held-out half: asked once, of the finalists only
            | its best points look better than they   | decides: the lower bound of what is kept of dense must
            | are, because they are the best of many  | reach the floor

Of m points ever looked at on the held-out half, each gets an interval of 1 - 0.05 / m (Bonferroni): all of them hold
together with 95 %, so the interval of the chosen point is valid, whichever it is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base import metrics
from ..base.metrics import kept_interval, kept_of_dense
from ..evals.task import Question

FINALISTS = 3
ERROR = 0.05


@dataclass(frozen=True)
class Point:
    """A finished trial: what it kept of dense on the search half (with its 95 % interval), and its cost beside dense."""

    number: int
    kept: float
    interval: tuple[float, float]
    cost: float


@dataclass(frozen=True)
class HeldOut:
    """A finalist on the held-out half: which answers were right, dense's and its own, and its cost measured there."""

    number: int
    dense: tuple[bool, ...]
    right: tuple[bool, ...]
    cost: float

    def kept(self, looks: int) -> tuple[float | None, list[float] | None]:
        """Share of dense kept and its interval, when `looks` points were looked at on this half."""
        return kept_of_dense(np.array(self.dense), np.array(self.right), 1 - ERROR / looks)


def halves(questions: Sequence[Question], seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the search half and of the held-out half, every kind in both.

    Each is in an order whose every beginning has the kinds in proportion, so that a part of it stands for the whole.
    """
    rng = random.Random(seed)
    placed: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])  # (place within its kind, number)
    kinds: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        kinds.setdefault(question.kind, []).append(number)
    turn = 0
    for numbers in kinds.values():
        rng.shuffle(numbers)
        for i, number in enumerate(numbers):
            placed[(i + turn) % 2].append(((i // 2 + 0.5) / len(numbers), number))
        turn += len(numbers)  # kinds of odd size take turns in having their extra question
    search, held = ([number for _, number in sorted(half)] for half in placed)
    return search, held


def rungs(n: int) -> list[int]:
    """Questions after which a trial is judged: a quarter, a half, all."""
    return sorted({max(1, n // 4), max(1, n // 2), n})


def finalists(points: Sequence[Point], floor: float, most: int) -> list[Point]:
    """Up to `most` points to look at again: the cheapest that the search half vouches for, and its neighbours on the front.

    The neighbours are hedges: the next cheaper in case the search half was unlucky, the next safer in case it was lucky.
    """
    able = [p for p in front(points) if p.kept >= floor and p.cost < 1]
    if not able:
        return []
    sure = [i for i, p in enumerate(able) if p.interval[0] >= floor]
    best = sure[0] if sure else max(range(len(able)), key=lambda i: able[i].interval[0])
    order = sorted(range(len(able)), key=lambda i: (abs(i - best), -i))  # at equal distance the safer one first
    return [able[i] for i in sorted(order[:most])]


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both, cheapest first."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.cost, -p.kept, p.number)):
        if not out or p.kept > out[-1].kept:
            out.append(p)
    return out


def affordable(n: int, floor: float, looked: int) -> int:
    """How many more points may be looked at, so that one that never fails in n questions would still reach the floor."""
    return max((k for k in range(FINALISTS + 1) if k == 0 or _without_a_loss(n, looked + k) >= floor), default=0)


def questions_needed(floor: float, looks: int = 1) -> int | None:
    """The least number of held-out questions, none of them lost, that shows this floor; None if no number can (1)."""
    return metrics.questions_needed(floor, 1 - ERROR / looks)


def more_needed(held: HeldOut, floor: float, looks: int) -> int | None:
    """Rough number of further held-out questions after which this point, going on as it did, would reach the floor.

    None: its share is not above the floor, so no number of questions would help.
    """
    return metrics.more_needed(metrics.paired(np.array(held.dense), np.array(held.right)), floor, 1 - ERROR / looks)


def decide(held: Sequence[HeldOut], floor: float, looks: int) -> HeldOut | None:
    """The cheapest finalist whose whole interval is at or above the floor and that costs less than dense."""
    passed = [h for h in held if (h.kept(looks)[1] or [0.0])[0] >= floor and h.cost < 1]
    return min(passed, key=lambda h: (h.cost, h.number), default=None)


def _without_a_loss(n: int, looks: int) -> float:
    return kept_interval(np.array([n, 0, 0, 0]), 1 - ERROR / looks)[0]
