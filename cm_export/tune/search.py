"""The search: all processes run trials on one half of the questions until there are enough; finalists get the other half.

claim a trial -> a quarter of the search half -> a half -> all of it -> told       stops where the interval is below the floor
no trial left -> finalists -> the held-out half -> a recipe, or a refusal in one line
"""

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..base import environment
from ..base.errors import CmExportError, GateFailed
from ..base.hashes import file_sha256, key_of
from ..bundle.bundle import MANIFEST, Bundle
from ..evals.task import Task
from ..host.backend import DEFAULT
from ..host.runner import Runner
from ..recipe.recipe import from_dict
from . import space as spaces
from . import study as studies
from .held_out import Goal, point, second_look
from .measure import BundleJudge, Judge, examine
from .space import Space
from .verdict import affordable, halves, questions_needed, rungs

Progress = Callable[..., None]
_TIMED = 24  # questions timed beside dense in each trial
_BEAT, _POLL = 20.0, 1.0  # seconds between signs of life; between looks at other processes' trials


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search; says what is kept."""


class _GivenUp(Exception):
    """Another process has given this trial up for dead."""


def tune(
    path: Path, task: Task, goal: Goal, place: str, name: str, threads: int, progress: Progress = lambda *_, **__: None
) -> dict[str, Any]:
    """Search a bundle's recipes and return the report; `recommended` in it is None when `refusal` says why.

    Raises InputError, BundleError; GateFailed when these questions cannot show this floor whatever the recipe.
    """
    search, held = halves(task.questions, goal.seed)
    check_questions(len(task.questions), len(search), len(held), goal.floor)
    bundle = Bundle(path)
    runner = Runner(bundle, threads, backend=DEFAULT)  # every trial runs on graphs made in memory
    space = spaces.of_bundle(bundle, runner.recipe)
    settings = {
        "bundle": json.loads((path / MANIFEST).read_bytes())["seal"],
        "task": task.name,
        "questions": questions_key(task),
        "n": len(task.questions),
        "seed": goal.seed,
        "objective": goal.objective,
        "space": key_of(space=space.to_dict()),
    }
    progress("open the study")
    opened = studies.open_study(place, name, settings, goal.seed, goal.floor)
    bundle.wait_verified()
    judge = BundleJudge(runner, task, goal.seed, progress)
    report = run(opened, space, judge, search, held, goal, progress)
    running = {n: version(n) for n in ("cm-export", "onnxruntime", "numpy", "optuna")}
    return {
        "task": task.name,
        "rule": f"{task.rule}, {runner.rule()}",
        "bundle": str(path),
        "model": bundle.manifest["model"]["source"],
        "revision": bundle.manifest["model"]["revision"],
        "study": studies.shown(place),
        "settings": settings,
        **report,
        "environment": environment.describe(threads, bundle.manifest["versions"]) | {"running": running},
    }


def check_questions(n: int, search: int, held: int, floor: float) -> None:
    """Raises GateFailed when not even a recipe that loses nothing could be shown to hold the floor on so few questions."""
    if held and search and affordable(held, floor, 0):
        return
    needed = questions_needed(floor)
    none = "no number of questions shows that nothing at all is lost"
    fix = f"ask {2 * needed} or more, or lower --floor" if needed else f"{none}: lower --floor"
    raise GateFailed(
        f"{held} held-out questions (half of {n}) cannot show that {floor:g} of the dense accuracy is kept, "
        "even if none is lost",
        where="tune",
        fix=fix,
    )


def questions_key(task: Task) -> str:
    """A key of the questions and the pixels of their pictures, wherever their files lie."""
    seen: dict[str, str] = {}
    for name in {p for q in task.questions for p in q.pictures}:
        picture = task.open_picture(name)
        seen[name] = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    questions = []
    for q in task.questions:
        values = asdict(q) | {"pictures": [seen[p] for p in q.pictures]}
        if not values.pop("clips"):  # so the key of questions without clips is what it was before there were any
            questions.append(values)
            continue
        questions.append(values | {"clips": [(file_sha256(Path(c.path)), c.rate, c.count) for c in q.clips]})
    return key_of(questions=questions, limits=task.limits, rule=task.rule)


def run(
    opened: tuple[Any, bool],
    space: Space,
    judge: Judge,
    search: list[int],
    held: list[int],
    goal: Goal,
    progress: Progress,
) -> dict[str, Any]:
    """Every trial that is left, then the verdict."""
    study, is_new = opened
    if is_new:
        studies.start_with(study, spaces.first(space))
    swept, again = studies.sweep(study), studies.reopen(study, goal.floor)
    if not is_new:
        done = len(studies.finished(study))
        progress(f"go on after {done} trials, {swept} of them half run, {again} dropped by a higher floor")
    try:
        with _stopped_between_steps(progress) as step:
            while True:
                step("next trial", studies.counted(study), goal.trials)
                trial = studies.claim(study, goal.trials)
                if trial is not None:
                    _trial(study, trial, space, judge, search, goal, step)
                elif studies.running(study):
                    step("wait for the trials of other processes", studies.counted(study), goal.trials)
                    time.sleep(_POLL)
                else:
                    break
                studies.sweep(study)
            return second_look(study, judge, search, held, goal, step)
    except KeyboardInterrupt as stop:
        done = len(studies.finished(study))
        raise Interrupted(f"interrupted, {done} of {goal.trials} trials are kept: the same command goes on") from stop


@contextlib.contextmanager
def _stopped_between_steps(progress: Progress) -> Iterator[Progress]:
    """Ctrl-C takes effect when the next step is announced, never during a write to the study, which would stay locked.

    A second Ctrl-C takes effect at once.
    """
    asked = threading.Event()

    def on_interrupt(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    def step(*args: Any, **more: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        progress(*args, **more)

    in_charge = threading.current_thread() is threading.main_thread()  # of signals
    before = signal.signal(signal.SIGINT, on_interrupt) if in_charge else None
    try:
        yield step
    finally:
        if in_charge:
            signal.signal(signal.SIGINT, before)


def _trial(
    study: Any, trial: Any, space: Space, judge: Judge, search: list[int], goal: Goal, progress: Progress
) -> None:
    told = studies.finished(study)
    number = f"trial {min(studies.counted(study), goal.trials)} of {goal.trials}{_best(told, goal.floor)}"
    steps, last = rungs(len(search)), time.monotonic()

    def beat(done: int) -> None:
        nonlocal last
        progress(number, done, steps[-1])
        if time.monotonic() - last > _BEAT:
            last = time.monotonic()
            if not studies.beat(trial):
                raise _GivenUp

    try:
        given = trial.user_attrs.get("recipe")
        chosen = spaces.recipe_of(trial, space)  # also where a recipe is given: TPE's model needs the parameters
        recipe = from_dict(given) if given else chosen
        twin = next((t for t in told if from_dict(studies.facts_of(t)["recipe"]) == recipe), None)
        if twin:
            facts = studies.facts_of(twin) | {"same_as": twin.number}
            kept, cost = twin.values
        elif spaces.is_dense(recipe):
            facts = {"whole": True, "n": 0, "of_dense_ci": [1.0, 1.0], "accuracy": None, "neuron_share": 1.0}
            facts |= {"token_share": 1.0, "memory": {"ratio": 1.0}, "latency": None}
            kept = cost = 1.0
        else:
            timed = _TIMED if goal.objective == "latency" else 0
            kept, facts = examine(judge, recipe, search, steps, goal.floor, timed, beat)
            cost = facts[goal.objective]["ratio"]
        told_of = {k: v for k, v in facts.items() if k not in ("of_dense", "cost", "recipe")}
        studies.finish(study, trial, kept, cost, recipe=recipe.to_dict(), **told_of)
    except CmExportError as e:
        if isinstance(e, GateFailed):
            studies.give_back(study, trial.number)
            raise
        studies.fail(study, trial, str(e))
    except _GivenUp:
        return
    except BaseException:
        studies.give_back(study, trial.number)
        raise


def _best(told: list[Any], floor: float) -> str:
    """The cheapest trial so far that holds the floor on the search half, in words."""
    good = [point(t) for t in told if studies.facts_of(t)["whole"] and t.values[0] >= floor and t.values[1] < 1]
    if not good:
        return ""
    best = min(good, key=lambda p: p.cost)
    return f", best so far: {best.cost:.3f} of the cost at {best.kept:.4f} of the accuracy"
