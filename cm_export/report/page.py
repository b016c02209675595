"""One HTML file out of checked values: no network, no dates of its own, the same input gives the same bytes.

Style and script are inlined. The page's content security policy names them by their hash, so a browser runs nothing else, even
if an answer or a path contained a script; and the template escapes every value.
"""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..base import atomic
from ..base.metrics import questions_needed
from ..bundle.bundle import Bundle
from ..recipe.recipe import Recipe
from . import charts
from .analysis import NEURONS, TOKENS, Layers
from .as_recipe import build_command, recipe_toml, run_command
from .enough import why
from .examples import Examples
from .pareto import Choice, choose
from .points import Point

_PACKAGE = "cm_export.report"


@dataclass(frozen=True)
class Inputs:
    """Everything that a page is made of."""

    bundle: Path
    manifest: dict[str, Any]
    seal: str
    built: Recipe
    evals: list[dict[str, Any]]  # reports of `eval`, for what they say about themselves
    points: list[Point]
    floor: float
    bench: dict[str, Any] | None
    layers: Layers | None
    examples: Examples | None
    commands: list[tuple[str, str]]  # (what it made, command)
    notes: list[str]  # what the page lacks and how to get it
    others: tuple[Bundle, ...] = ()  # of the same checkpoint, whose points are on the page as well

    def of(self, point: Point | None) -> tuple[Path, Recipe, dict[str, Any]]:
        """The bundle that a point was measured on, the recipe it was built with, and its manifest."""
        other = next((b for b in self.others if point and str(b.path) == point.bundle), None)
        return (other.path, other.recipe, other.manifest) if other else (self.bundle, self.built, self.manifest)


def write(inputs: Inputs, out: Path) -> None:
    """The page, under a temporary name and then renamed. Raises InputError."""
    atomic.write(out, render(inputs))


def render(inputs: Inputs) -> str:
    """The page as text."""
    folder = resources.files(_PACKAGE)
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(_PACKAGE, "."),
        autoescape=True,  # questions, answers, paths and recipes are anybody's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": _share,
        "ms": _ms,
        "size": _size,
        "figure": _figure,
        "budget": _budget,
        "options": _options,
    }
    best = choose(inputs.points, inputs.floor)
    dense = next(
        (p for p in inputs.points if p.role == "dense" and (not best.point or p.task == best.point.task)), None
    )
    path, built, manifest = inputs.of(best.point)
    kinds = list(dict.fromkeys(k for p in inputs.points for k in p.kinds))
    return environment.get_template("template.html.j2").render(
        i=inputs,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        best=best,
        dense=dense,
        faster=_faster(best.point, dense),
        line=_line(best, inputs.floor),
        why=why(best.point, inputs.floor) if best.point and not best.holds else "",
        by_chance=_by_chance(best.point, inputs.points),
        above_one=any(
            p.figures.of_dense_ci and p.figures.of_dense_ci[1] > 1 for p in inputs.points if p.role != "dense"
        ),
        low_kinds=_low_kinds(best.point if best.holds else None, inputs.floor),
        kinds=kinds if len(kinds) > 1 else [],
        tasks=list(dict.fromkeys(p.task for p in inputs.points)),
        colours=charts.colours(inputs.points),
        rows=_by_budget(inputs.points),
        costs=_costs(inputs.points, inputs.floor, best.point),
        layers=_layers(inputs.layers, best.point.recipe if best.point else inputs.built),
        toml=recipe_toml(best.point.recipe, path, manifest) if best.point else "",
        build=build_command(best.point.recipe, manifest) if best.point else "",
        built_toml=recipe_toml(inputs.built, inputs.bundle, inputs.manifest),
        run=run_command(best.point.recipe, path, built) if best.point else None,
        machines=_machines(inputs),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---------------------------------------------------------------- what the page says


def _faster(point: Point | None, dense: Point | None) -> dict[str, float]:
    """Dense over sparse, medians of the same run."""
    out = {}
    for name in ("decode", "prefill"):
        a, b = getattr(dense, name, None), getattr(point, name, None)
        if a and b and b.median:
            out[name] = a.median / b.median
    return out


def _line(best: Choice, floor: float) -> dict[str, Any] | None:
    if best.point is None:
        return None
    low, kept, high = best.point.figures.kept
    return charts.interval(low, kept, high, floor)


def _low_kinds(point: Point | None, floor: float) -> tuple[list[str], list[str]]:
    """Kinds of question whose own lower bound lies below the floor; those of them of which too few were asked to tell."""
    low: list[str] = []
    untold: list[str] = []
    needed = questions_needed(floor)
    for kind, f in point.kinds.items() if point and len(point.kinds) > 1 else ():
        if f.of_dense is None or f.kept[0] < floor:
            few = needed is not None and f.n < needed and (f.of_dense is None or f.of_dense >= floor)
            (untold if few else low).append(kind)
    return low, untold


def _by_chance(point: Point | None, points: Sequence[Point]) -> Point | None:
    """The random control of the point's own size, if it kept as much."""
    for p in points if point else ():
        assert point is not None
        if p.bundle != point.bundle:
            continue
        same_size = abs(p.neuron_share - point.neuron_share) < 0.02 and abs(p.token_share - point.token_share) < 0.02
        if p.role == "random" and p.task == point.task and same_size and p.figures.of_dense is not None:
            return p if p.figures.of_dense >= point.figures.kept[1] else None
    return None


def _by_budget(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Rows of one budget together, with the controls of that budget; dense first, then from large to small."""
    groups: dict[tuple[float, float], list[Point]] = {}
    for p in points:
        # A policy that is dense in one part keeps all of it, so shares are compared as measured.
        groups.setdefault((round(p.neuron_share, 2), round(p.token_share, 2)), []).append(p)
    order = {"dense": 0, "policy": 1, "attention": 2, "random": 3}
    out = []
    for (neurons, tokens), group in sorted(groups.items(), key=lambda item: [-s for s in item[0]]):
        name = "everything" if neurons == tokens == 1 else _budget(group[0])
        out.append((name, sorted(group, key=lambda p: order[p.role])))
    return out


def _costs(points: Sequence[Point], floor: float, best: Point | None) -> list[charts.Chart]:
    def tip(p: Point) -> str:
        low, high = p.figures.of_dense_ci or (math.nan, math.nan)
        lines = [
            f"{p.policies}" + (" (random control)" if p.role == "random" else ""),
            _budget(p),
            f"of dense {_figure(p.figures.of_dense)} [{_figure(low)}, {_figure(high)}], n = {p.figures.n}",
        ]
        if p.decode:
            lines.append(f"decode {_ms(p.decode.median)} per token ({_ms(p.decode.q1)} to {_ms(p.decode.q3)})")
        if p.prefill:
            lines.append(f"prefill {_ms(p.prefill.median)} ({_ms(p.prefill.q1)} to {_ms(p.prefill.q3)})")
        needed = "" if p.exact else " needed"
        lines.append(f"{p.bits:.2f} bits{needed} for each weight; {_size(p.memory)} with the image cache")
        return "\n".join([*lines, p.task])

    wanted = (
        ("Bits read", "bits that a decoded token reads for each weight", lambda p: p.bits),
        ("Decode latency", "ms per token, median", lambda p: p.decode and p.decode.median),
        ("Prefill latency", "ms to the first token's logits, median", lambda p: p.prefill and p.prefill.median),
        ("Image cache", "kB of image keys and values read per token", lambda p: p.image_kv_bytes / 1e3),
    )
    found = [charts.against_cost(title, x, points, cost, floor, best, tip) for title, x, cost in wanted]
    return [c for c in found if c]


def _layers(found: Layers | None, recipe: Recipe) -> list[tuple[charts.Chart, str]]:
    if found is None:
        return []
    count = f"over {found.questions} question{'s' if found.questions > 1 else ''}"

    def flat(value: float | np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, float).reshape(-1, 1), (len(found.own), 1))

    out = []
    cut = recipe.tokens.prune_layer if recipe.tokens.policy != "dense" else None
    if found.image is not None and found.top_tokens is not None:
        series = [
            charts.Series("attention that goes to the picture", found.image, count),
            charts.Series(f"of that, to its top {TOKENS:.0%} tokens".replace("%", " %"), found.top_tokens, count),
            charts.Series("evenly spread", flat(TOKENS), reference=True),
        ]
        text = (
            "What the tokens after the picture attend to, mean over heads. Where the second line is high, few image tokens "
            "carry what the model reads from the picture: they are the ones worth keeping. Right of the dashed line, dropped "
            "tokens no longer run."
        )
        out.append((charts.over_layers("Token importance", series, cut), text))
    top = f"{NEURONS:.0%}".replace("%", " %")
    series = [
        charts.Series(f"in each token's own top {top}", found.own, count),
        charts.Series(f"in the best fixed {top} of a question", found.fixed, count),
        charts.Series("evenly spread", flat(NEURONS), reference=True),
    ]
    text = (
        "Share of the squared activation Z that few neurons hold. The gap between the lines is what one fixed set per "
        "request gives away against a new set for every token."
    )
    out.append((charts.over_layers("Activation concentration", series), text))
    if found.overlap is not None and found.by_chance is not None:
        pairs = found.overlap.shape[1]
        series = [
            charts.Series("core sets of two questions", found.overlap, f"over {pairs} pairs"),
            charts.Series("random sets of that size", flat(found.by_chance), reference=True),
        ]
        text = (
            f"Jaccard overlap of the neurons that {recipe.neurons.policy} keeps for different questions. Near 1 a set that "
            "is fixed once would do; near chance the choice must follow the question."
        )
        out.append((charts.over_layers("Overlap of core sets", series), text))
    return out


def _machines(inputs: Inputs) -> list[tuple[str, dict[str, Any]]]:
    sources = [(f"eval {r['task']}", r) for r in inputs.evals]
    if inputs.bench:
        sources.append(("bench", inputs.bench))
    return [(name, r["environment"]) for name, r in sources]


# ---------------------------------------------------------------- numbers


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _budget(p: Point) -> str:
    """A budget in words; of a model without pictures only the neurons."""
    tokens = f" and {_share(p.token_share)} of the image tokens" if p.image_tokens else ""
    return f"{_share(p.neuron_share)} of the neurons{tokens}"


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _options(command: str) -> list[str]:
    """A command in parts that a line may end after: an option and its value stay together."""
    return re.split(r" (?=-)", command)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
