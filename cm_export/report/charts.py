"""Rows become geometry: where marks, lines and ticks lie in a viewBox. The template draws them, the style sheet colours.

values -> Scale -> user units of a 560 x 340 box; text sizes are CSS, so that a phone can enlarge them
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .pareto import front
from .points import Point

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 66, 544, 14, 280
COLOURS = 8  # classes s1..s8 of the style sheet


@dataclass(frozen=True)
class Scale:
    """Values low..high on user units start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within low..high, `most` intervals or fewer."""
        raw = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point with its interval; `tip` is what hovering shows, one fact a line."""

    x: float
    y: float
    low: float
    high: float
    role: str
    colour: str
    tip: str
    label: str = ""  # drawn beside it
    left: bool = False  # on which side
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A series over layers with its range over questions: `line` and `band` are SVG point lists."""

    name: str
    colour: str
    line: str
    band: str
    dots: list[Mark]
    thin: bool = False  # a reference, not a measurement


@dataclass(frozen=True)
class Chart:
    """One drawing: ticks are (user units, text)."""

    title: str
    x_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark] = field(default_factory=list)
    stairs: str = ""  # the Pareto front
    floor: tuple[float, str] | None = None
    joined: list[tuple[str, str]] = field(
        default_factory=list
    )  # (colour, points): one pair of policies over its shares
    lines: list[Line] = field(default_factory=list)
    cut: float | None = None  # where tokens leave


def colours(points: Sequence[Point]) -> dict[str, str]:
    """Colour class of each pair of policies, in the order of the rows; dense and random have colours of their own."""
    names = dict.fromkeys(p.policies for p in points if p.deployable)
    return {name: f"s{i % COLOURS + 1}" for i, name in enumerate(names)}


def against_cost(
    title: str,
    x_title: str,
    points: Sequence[Point],
    cost: Callable[[Point], float | None],
    floor: float,
    best: Point | None,
    tip: Callable[[Point], str],
    spread: Sequence[Point] | None = None,
) -> Chart | None:
    """Share of dense over a cost, or None where fewer than two points know it. `spread`: points that span the y axis."""
    known = [(p, c) for p in points if (c := cost(p)) is not None and p.figures.of_dense is not None]
    shown = [p for p, _ in known]
    if len({c for _, c in known}) < 2:
        return None
    x = Scale(0, max(c for _, c in known) * 1.06, LEFT, RIGHT)
    ends = [floor, *(e for p in spread or shown if p.figures.of_dense_ci for e in p.figures.of_dense_ci)]
    margin = 0.04 * (max(ends) - min(ends)) or 0.01
    y = Scale(max(0.0, min(ends) - margin), max(ends) + margin, BOTTOM, TOP)
    edge = front(shown, cost)
    palette = colours(points)
    marks = []
    for p, c in known:
        low, kept, high = p.figures.kept
        if p.role == "dense":
            low = high = kept
        labelled = p.deployable and (p in edge or p is best)
        marks.append(
            Mark(
                x(c),
                y(kept),
                y(low),
                y(high),
                p.role,
                palette.get(p.policies, ""),
                tip(p),
                f"{round(100 * p.neuron_share)} / {round(100 * p.token_share)}" if labelled else "",
                x(c) > RIGHT - 70,
                p is best,
            )
        )
    marks = _without_collisions(marks)
    # Controls first, so that what is to be chosen lies on top.
    marks.sort(key=lambda m: (m.best, {"random": 0, "dense": 1, "attention": 2, "policy": 3}[m.role]))
    stairs: list[tuple[float, float]] = []
    for p in edge:
        spent = cost(p)
        assert spent is not None  # the front is made of points that know it
        at = x(spent), y(p.figures.kept[1])
        stairs += [(at[0], stairs[-1][1]), at] if stairs else [at]
    if stairs:  # there is none where only random points know the cost
        stairs.append((RIGHT, stairs[-1][1]))
    return Chart(
        title,
        x_title,
        [(x(t), _text(t)) for t in x.ticks()],
        [(y(t), f"{t:.4g}") for t in y.ticks()],
        marks,
        _path(stairs),
        (y(floor), f"floor {floor:g}"),
        _joined(known, palette, x, y),
    )


def _joined(known: Sequence[tuple[Point, float]], palette: dict[str, str], x: Scale, y: Scale) -> list[tuple[str, str]]:
    """A line through the points of the same policies, weights and image tokens, from the cheapest to the dearest."""
    series: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for p, c in known:
        if p.deployable:
            series.setdefault((p.task, p.policies, round(p.token_share, 2)), []).append((x(c), y(p.figures.kept[1])))
    return [(palette[name], _path(sorted(at))) for (_, name, _), at in series.items() if len(at) > 1]


def _without_collisions(marks: list[Mark]) -> list[Mark]:
    """Drops labels that would overlap another one, the chosen point's last; hovering and the table show all of them."""
    placed: list[Mark] = []
    out = []
    for m in sorted(marks, key=lambda m: (not m.best, m.y)):
        if m.label and any(abs(m.x - o.x) < 64 and abs(m.y - o.y) < 20 for o in placed):
            m = replace(m, label="")
        if m.label:
            placed.append(m)
        out.append(m)
    return out


@dataclass(frozen=True)
class Series:
    """values [L, questions or pairs] in 0..1; of a reference [L,1]."""

    name: str
    values: np.ndarray
    what: str = ""  # "of 6 questions"
    reference: bool = False


def over_layers(title: str, series: Sequence[Series], cut: int | None = None) -> Chart:
    """Shares over layers: the mean, and the range as a band."""
    layers = len(series[0].values)
    x = Scale(-0.3, layers - 0.7, LEFT, RIGHT)
    y = Scale(0, 1, BOTTOM, TOP)
    lines, number = [], 0
    for s in series:
        number += not s.reference
        colour = "ref" if s.reference else f"s{number}"
        mean, low, high = s.values.mean(1), s.values.min(1), s.values.max(1)
        dots = [
            Mark(
                x(i),
                y(mean[i]),
                y(low[i]),
                y(high[i]),
                "layer",
                colour,
                f"layer {i}: {s.name}\nmean {mean[i]:.3f}, from {low[i]:.3f} to {high[i]:.3f} {s.what}",
            )
            for i in range(0 if s.reference else layers)
        ]
        upper, lower = ([(x(i), y(v)) for i, v in enumerate(edge)] for edge in (high, low))
        band = "" if s.reference else _path([*upper, *reversed(lower)])
        lines.append(Line(s.name, colour, _path([(x(i), y(v)) for i, v in enumerate(mean)]), band, dots, s.reference))
    step = max(1, math.ceil(layers / 14))
    return Chart(
        title,
        "layer",
        [(x(i), str(i)) for i in range(0, layers, step)],
        [(y(t), f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)],
        lines=lines,
        # Layers before the cut run with every token, so the line lies between two of them.
        cut=None if cut is None or not 0 < cut < layers else x(cut - 0.5),
    )


def interval(low: float, value: float, high: float, floor: float) -> dict[str, float | str]:
    """The headline's number line, in a box 560 wide: how the interval lies beside the floor."""
    ends = (low, high, floor, 1.0)
    margin = 0.18 * (max(ends) - min(ends)) or 0.01
    x = Scale(min(ends) - margin, max(ends) + margin, 8, WIDTH - 8)
    return {"low": x(low), "value": x(value), "high": x(high), "floor": x(floor), "dense": x(1.0)}


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _text(value: float) -> str:
    return f"{value:,.4g}".replace(",", " ") if abs(value) < 1e4 else f"{value:,.0f}".replace(",", " ")
