"""Collects everything that a page is made of from a bundle and its reports; runs an evaluation where none is given."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..bundle.beside import open_beside
from ..bundle.bundle import Bundle
from ..evals import compare as _compare
from ..evals import task as _task
from ..evals.journal import forget
from ..evals.other_policies import with_policies
from ..evals.task import Task
from ..host.backend import DEFAULT
from ..host.loaded import LoadedBundle
from . import analysis, examples
from .as_recipe import recipe_toml
from .enough import too_few, why
from .page import Inputs
from .pareto import Choice, choose
from .points import Point, Reference, distinct, known_task, points_of, read_bench, read_eval

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
    beside: Sequence[Path] = (),
) -> Inputs:
    """Raises InputError, BundleError. Without `evals`, `task` is asked here and its report handed to keep(report, measured).

    `beside`: further bundles of the same checkpoint, whose points are shares of what the dense model at `path` gets right.
    """
    bundle = Bundle(path)
    bundles = [bundle, *open_beside(bundle, beside)]
    reports = [read_eval(p, bundles) for p in evals]
    speed = read_bench(bench, bundle) if bench else None
    if reports:
        _points(reports, bundles, [str(p) for p in evals])  # a bad report is refused before the long work
    else:
        if task is None:
            raise InputError("no figures to report", where=path, fix="give --eval FILE, or questions: --task or --data")
        for number, one in enumerate(bundles):
            file = measured and (measured.with_suffix(f".{number}.json") if number else measured)
            report = _compare.compare(
                one.path, task, seed=seed, threads=threads, report=file, progress=progress, backend=DEFAULT
            )
            report["command"] = command
            if file and keep:
                keep(report, file)
                forget(file)
            reports.append(report)
    points = _points(reports, bundles, [str(p) for p in evals] or [str(b.path) for b in bundles])
    notes = _notes(reports, points, speed, floor)
    asked, layers, found = task or _same_task(reports, seed), None, None
    if asked is None:
        notes.append("No examples and no layers: the questions are not at hand. Give --task or --data.")
    else:
        runner = LoadedBundle(bundle, threads, backend=DEFAULT)  # layers are watched in graphs made in memory
        best = choose(points, floor).point
        its = next((b for b in bundles if best and str(b.path) == best.bundle), bundle)
        own = runner if its is bundle else LoadedBundle(its, threads, backend=DEFAULT)
        recipe = best.recipe if best else runner.recipe
        chosen = own if recipe == own.recipe else with_policies(own, recipe)
        its.wait_verified()
        if shown:
            found = examples.ask(runner, chosen, asked, shown, progress)
        layers = analysis.measure(runner, chosen, examples.requests_of(runner, asked, LAYER_QUESTIONS), progress)
    for one in bundles:
        one.wait_verified()
    told = [(f"accuracy and latency, {r['task']}", r.get("command")) for r in reports]
    if speed:
        told.append(("speed on made-up inputs", speed.get("command")))
    told.append(("this page, its examples and layers", command))
    return Inputs(
        path, bundle.manifest, bundle.seal, bundle.recipe, reports, points, floor, speed, layers, found, _once(told),
        notes, tuple(bundles[1:]),
    )  # fmt: skip


def _points(reports: Sequence[dict[str, Any]], bundles: Sequence[Bundle], names: Sequence[str]) -> list[Point]:
    """The points of all reports. Raises InputError where the first bundle was not asked what another one was."""
    of = {b.seal: b for b in bundles}
    first = {r["task"]: Reference(r) for r in reversed(reports) if r["seal"] == bundles[0].seal}
    found = []
    for report, name in zip(reports, names, strict=True):
        bundle, beside = of[report["seal"]], None
        if bundle is not bundles[0]:
            beside = first.get(report["task"])
            if beside is None:
                fix = "give a report of it as well: its dense model is what the others are measured by"
                raise InputError(f"nobody asked {bundles[0].path} the questions of this report", where=name, fix=fix)
        points = points_of(report, bundle.shape, name, beside, named=len(bundles) > 1)
        found += [replace(p, bundle=str(bundle.path)) for p in points]
    return list(distinct(found))


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


def _notes(
    reports: list[dict[str, Any]], points: Sequence[Point], speed: dict[str, Any] | None, floor: float
) -> list[str]:
    """What a reader must know before comparing figures of one page with each other."""
    machines = {(r["environment"].get("processor"), r["environment"].get("threads")) for r in reports}
    out = []
    if len(machines) > 1:
        out.append(
            "The reports were measured on different machines or threads: compare latencies within one report only."
        )
    if len({p.bundle for p in points}) > 1:
        out.append(
            "Bundles were measured one after the other: where their latencies lie close, `cm-export bench` decides."
        )
    if any(not p.exact for p in points):
        out.append(
            "Bits of some points are what the policy needs: with float32 weights, or without the native library, masked "
            "weights are read all the same, and no time is saved."
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
        "recipe_toml": recipe_toml(best.point.recipe, *inputs.of(best.point)[::2]) if best.point else None,
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
