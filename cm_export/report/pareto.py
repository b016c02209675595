"""Which point to deploy: the cheapest whose lower bound is at or above the floor. And the Pareto front.

share of dense |    ,-o      front: no other point is both cheaper and better
               |  o'  |
         floor |--|---x----  a point counts by the lower end of its interval, not by its middle
               +---------- cost
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base.metrics import check_floor
from .points import Point

# In this order: what a user waits for most, then the first token, then bytes of weights and image cache.
COSTS: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("decode time per token", lambda p: p.decode.median if p.decode else math.inf),
    ("prefill time", lambda p: p.prefill.median if p.prefill else math.inf),
    ("bytes read per token", lambda p: float(p.memory)),
)


@dataclass(frozen=True)
class Choice:
    """The point to deploy (holds), or the one nearest to the floor (not holds), or none, and why."""

    point: Point | None
    holds: bool
    decided_by: str | None  # the cost that set it apart
    holding: int  # points that hold the floor
    considered: int


def choose(points: Sequence[Point], floor: float) -> Choice:
    """Dense and random points are never chosen. A point that several reports measured counts with its worst figures.

    Raises InputError for a floor that cannot hold, or that everything would hold.
    """
    check_floor(floor, "floor")
    worst: dict[str, Point] = {}
    for p in points:
        if p.deployable and p.figures.of_dense_ci is not None and (p.key not in worst or _low(p) < _low(worst[p.key])):
            worst[p.key] = p
    candidates = list(worst.values())
    holding = [p for p in candidates if _low(p) >= floor]
    if not holding:
        nearest = max(candidates, key=lambda p: (_low(p), [-c for c in _costs(p)]), default=None)
        return Choice(nearest, False, None, 0, len(candidates))
    first, *rest = sorted(holding, key=_costs)
    # A single candidate was chosen by the floor; otherwise the first cost in which the runner-up differs decided.
    differs = (n for (n, _), a, b in zip(COSTS, _costs(first), _costs(rest[0]), strict=True) if a != b) if rest else ()
    return Choice(first, True, next(iter(differs), None), len(holding), len(candidates))


def _low(p: Point) -> float:
    return p.figures.kept[0]


def _costs(p: Point) -> list[float]:
    return [cost(p) for _, cost in COSTS]


def front(points: Sequence[Point], cost: Callable[[Point], float | None]) -> list[Point]:
    """Points that nothing beats in cost and share of dense, cheapest first; random controls beat nobody."""
    known: list[tuple[float, float, Point]] = []  # cost, share of dense
    for p in points:
        spent, kept = cost(p), p.figures.of_dense
        if p.role != "random" and spent is not None and kept is not None:
            known.append((spent, kept, p))
    out: list[Point] = []
    best = -math.inf
    for _, kept, p in sorted(known, key=lambda k: (k[0], -k[1])):
        if kept > best:
            out.append(p)
            best = kept
    return out
