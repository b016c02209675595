"""Collects everything that a page is made of from a bundle and its reports; runs an evaluation where none is given."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..bundle.bundle import Bundle
from ..evals import compare as _compare
from ..evals import task as _task
from ..evals.journal import forget
from ..evals.other_policies import with_policies
from ..evals.task import Task
from ..host.backend import DEFAULT
from ..host.loaded import LoadedBundle
from ..recipe import recipe as recipes
from . import analysis, examples
from .as_recipe import recipe_toml
from .enough import too_few, why
from .page import Inputs
from .pareto import Choice, choose
from .points import Point, distinct, known_task, points_of, read_bench, read_eval

LAYER_QUESTIONS = 6
_DRAWN = 50  # questions of each kind from which examples are picked


def make(
    path: Path,
    evals: Sequence[Path] = (),
    bench: Path | None = None,
    task: Task | None = None,
    floor: float = 0.985,
    shown: int = 4,
    seed: int | None = None,
    threads: int = 0,
    command: str = "",
    measured: Path | None = None,
    keep: Callable[[Any, Path], None] | None = None,
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
) -> Inputs:
    """Raises InputError, BundleError. Without `evals`, `task` is asked here and its report handed to keep(report, measured)."""
    bundle = Bundle(path)
    reports = [read_eval(p, bundle.seal) for p in evals]
    speed = read_bench(bench, bundle.seal) if bench else None
    for p, report in zip(evals, reports, strict=True):
        points_of(report, bundle.shape, str(p))  # a bad report is refused before the long work
    if not reports:
        if task is None:
            raise InputError("no figures to report", where=path, fix="give --eval FILE, or questions: --task or --data")
        report = _compare.compare(
            path, task, seed=seed, threads=threads, report=measured, progress=progress, backend=DEFAULT
        )
        report["command"] = command
        if measured and keep:
            keep(report, measured)
            forget(measured)
        reports = [report]
    points = distinct(p for r in reports for p in points_of(r, bundle.shape))
    notes = _notes(reports, speed, floor)
    asked, layers, found = task or _same_task(reports, seed), None, None
    if asked is None:
        notes.append("No examples and no layers: the questions are not at hand. Give --task or --data.")
    else:
        runner = LoadedBundle(bundle, threads, backend=DEFAULT)  # layers are watched in graphs made in memory
        best = choose(points, floor).point
        recipe = best.recipe if best else runner.recipe
        chosen = runner if recipe == runner.recipe else with_policies(runner, recipe)
        bundle.wait_verified()
        if shown:
            found = examples.ask(runner, chosen, asked, shown, progress)
        layers = analysis.measure(runner, chosen, examples.requests_of(runner, asked, LAYER_QUESTIONS), progress)
    bundle.wait_verified()
    told = [(f"accuracy and latency, {r['task']}", r.get("command")) for r in reports]
    if speed:
        told.append(("speed on made-up inputs", speed.get("command")))
    told.append(("this page, its examples and layers", command))
    built = recipes.from_dict(bundle.manifest["recipe"], "manifest.json: recipe")
    return Inputs(
        path, bundle.manifest, bundle.seal, built, reports, points, floor, speed, layers, found, _once(told), notes
    )  # fmt: skip


def _same_task(reports: list[dict[str, Any]], seed: int | None) -> Task | None:
    """The questions of the first report whose task comes with the program."""
    for report in reports:
        if known_task(str(report["task"])):
            kinds = tuple(report["rows"][0]["kinds"])
            return _task.load(str(report["task"]).replace("-", "_"), kinds, _DRAWN, seed)
    return None


def _once(told: list[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """(what it made, command), each command once with everything that it made."""
    made: dict[str, list[str]] = {}
    for what, command in told:
        made.setdefault(command or "not recorded", []).append(what)
    return [("; ".join(dict.fromkeys(all_of_it)), command) for command, all_of_it in made.items()]


def _notes(reports: list[dict[str, Any]], speed: dict[str, Any] | None, floor: float) -> list[str]:
    """What a reader must know before comparing figures of one page with each other."""
    machines = {(r["environment"].get("processor"), r["environment"].get("threads")) for r in reports}
    out = []
    if len(machines) > 1:
        out.append(
            "The reports were measured on different machines or threads: compare latencies within one report only."
        )
    if few := too_few(min(r["n"] for r in reports), floor):
        out.append(few)
    out += dict.fromkeys(line for r in reports for line in r.get("picture_notes", ()))
    if speed is None:
        out.append("Latencies are those of the questions asked, not of long prompts: add --bench for those.")
    return out


def summary(inputs: Inputs) -> dict[str, Any]:
    """What --json prints: the recommendation and the rows it was chosen from."""
    best = choose(inputs.points, inputs.floor)
    return {
        "floor": inputs.floor,
        "holds": best.holds,
        "recommended": _flat(best.point) if best.holds and best.point else None,
        "nearest": None if best.holds or best.point is None else _flat(best.point),
        "decided_by": best.decided_by,
        "points_that_hold": best.holding,
        "points_considered": best.considered,
        "why_not": why(best.point, inputs.floor) if best.point and not best.holds else None,
        "recipe_toml": recipe_toml(best.point.recipe, inputs.bundle, inputs.manifest) if best.point else None,
        "bundle": str(inputs.bundle),
        "seal": inputs.seal,
        "rows": [_flat(p) for p in inputs.points],
        "notes": inputs.notes,
    }


def _flat(p: Point) -> dict[str, Any]:
    figures = {k: v for k, v in asdict(p).items() if k not in ("figures", "kinds", "recipe")}
    kinds = {k: asdict(f) for k, f in p.kinds.items()}
    return figures | asdict(p.figures) | {"kinds": kinds, "recipe": p.recipe.to_dict()}


def sentence(best: Choice, floor: float) -> str:
    """The headline in one line, for a terminal."""
    p = best.point
    if p is None:
        return "no point to recommend: nothing was pruned, or the dense model got nothing right"
    low, share, high = p.figures.kept
    what = f"{p.policies}, {100 * p.neuron_share:.3g} % neurons, {100 * p.token_share:.3g} % image tokens"
    kept = f"{share:.4f} [{low:.4f}, {high:.4f}] of dense"
    if best.holds:
        return f"{what}: {kept}"
    return f"no measured point holds the floor {floor:g}; the nearest, {what}: {kept}. {why(p, floor)}"
