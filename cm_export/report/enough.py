"""How many questions it takes to show a floor, and why a page recommends nothing: too few were asked, or too much was lost.

lower end of the 95 % interval     n = 40     100     144     286     406
no answer lost                       .948    .979    .985    .992    .995
one answer lost                      .898    .958    .971    .985    .989
"""

import math

import numpy as np

from ..base.metrics import more_needed, questions_needed
from .points import Point

LEAST = 20  # questions of each kind, however low the floor


def to_ask(floor: float, kinds: int) -> int:
    """Questions of each of `kinds` kinds, where nobody says how many: a point that loses one answer may still hold the floor."""
    needed = questions_needed(floor, lost=1)
    return max(LEAST, math.ceil(needed / kinds)) if needed else LEAST


def too_few(n: int, floor: float) -> str | None:
    """What to know before `n` questions are asked, or None where they are enough."""
    needed, with_room = questions_needed(floor), questions_needed(floor, lost=1)
    if needed is None:
        return f"Not even a million questions can show a floor of {floor:g}: every interval reaches below it."
    if n < needed:
        return (
            f"{n} questions cannot show a floor of {floor:g}, even if no answer is lost: {needed} or more are needed."
        )
    if with_room is None or n < with_room:
        room = f": {with_room} allow for one" if with_room else ""
        return f"With {n} questions a point holds the floor of {floor:g} only if it loses no answer{room}."
    return None


def why(point: Point, floor: float) -> str:
    """Why a point whose lower end lies below the floor does not hold it, and whether more questions could change that."""
    low, kept, _ = point.figures.kept
    n, counts = point.figures.n, point.beside_dense
    said = f"The lower end of its 95 % interval is {low:.4f}."
    if counts:
        both, lost, won, _ = counts
        said += f" It lost {lost} of the {both + lost} answers that dense got right"
        said += f", and got {won} right that dense got wrong." if won else "."
    needed = questions_needed(floor)
    if needed is None:
        return f"{said} {too_few(n, floor)}"
    said += f" What it keeps, {kept:.4f}, "
    if kept <= floor:
        return f"{said}is not above the floor, so more questions would not help: measure a larger budget."
    if n < needed:
        return f"{said}is above the floor, but {too_few(n, floor)}"
    more = more_needed(np.array(counts), floor) if counts else None
    if more is None:
        return f"{said}is above the floor, so more questions may settle it."
    return (
        f"{said}is above the floor: if it goes on like this, about {_round(n + more)} questions in all would show it."
    )


def _round(n: int) -> int:
    """Upwards, to two digits: it is an estimate."""
    step = 10 ** max(0, len(str(n)) - 2)
    return -(-n // step) * step
