"""The second look: finalists on the held-out half, a random control beside the winner, and the report of it all.

finished trials -> finalists -> held-out half, asked once and kept in the study -> recommended, or why nothing is
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..base.metrics import check_floor, wilson
from ..recipe.recipe import Recipe, from_dict
from ..recipe.vary import at_random
from . import study as studies
from .measure import Judge, examine
from .verdict import FINALISTS, HeldOut, Point, affordable, decide, finalists, front
from .verdict import more_needed as more_questions

Progress = Callable[..., None]
_TIMED = 48  # questions timed beside dense


@dataclass(frozen=True)
class Goal:
    """What a search is for: the least share of dense accuracy to keep, what to save, and how many trials may be spent."""

    floor: float
    objective: str
    trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a floor that cannot hold, or that everything would hold."""
        check_floor(self.floor, "floor")


def second_look(
    study: Any, judge: Judge, search: list[int], held: list[int], goal: Goal, progress: Progress
) -> dict[str, Any]:
    """Asks the finalists the held-out half, which decides, and returns the report with the verdict."""
    told = studies.finished(study)
    points = [point(t) for t in told if studies.facts_of(t)["whole"]]
    stored = {int(k.partition(".")[2]): v for k, v in study.user_attrs.items() if k.startswith("held_out.")}
    fresh = affordable(len(held), goal.floor, len(stored))
    chosen = finalists(points, goal.floor, fresh) if fresh else []
    chosen += [p for p in finalists(points, goal.floor, FINALISTS) if p.number in stored and p not in chosen]
    recipes = {t.number: from_dict(studies.facts_of(t)["recipe"]) for t in told}
    for i, p in enumerate(chosen):
        if (
            p.number not in stored
        ):  # asked only once, also when another process asked it, or this one before it was killed
            what = f"finalist {i + 1} of {len(chosen)}, held-out questions"
            stored[p.number] = _ask_held_out(judge, recipes[p.number], held, goal, what, progress)
            study.set_user_attr(f"held_out.{p.number}", stored[p.number])
    looks = max(1, len(stored))
    asked = [_held_out(p.number, stored[p.number], goal.objective) for p in chosen]
    best = decide(asked, goal.floor, looks)
    control = None
    if best:
        facts = stored[best.number]
        progress("random control of the same size")
        random_recipe = at_random(recipes[best.number], facts["neuron_share"], facts["token_share"])
        control = _row(_ask_held_out(judge, random_recipe, held, goal, "random control", progress), 1)
    dense = {}
    for half, numbers in (("search", search), ("held_out", held)):
        right = sum(judge.dense(n) for n in numbers)
        dense[half] = {"accuracy": right / len(numbers), "ci": list(wilson(right, len(numbers))), "n": len(numbers)}
    on_front = {p.number for p in front(points)}
    rows = []
    for t in told:
        facts = {k: v for k, v in studies.facts_of(t).items() if k not in ("right", "dense")}
        rows.append({"trial": t.number, **facts, "on_front": t.number in on_front, "held_out": None})
        if t.number in stored:
            rows[-1]["held_out"] = _row(stored[t.number], looks)
    winner = next((r for r in rows if best and r["trial"] == best.number), None)
    return {
        "floor": goal.floor,
        "objective": goal.objective,
        "trials_wanted": goal.trials,
        "n_search": len(search),
        "n_held_out": len(held),
        "looks": looks,
        "level": 1 - 0.05 / looks,
        "dense": dense,
        "trials": rows,
        "failed": [
            {"trial": t.number, "error": t.user_attrs["error"]}
            for t in study.get_trials(deepcopy=False)
            if "error" in t.user_attrs
        ],
        "finalists": [h.number for h in asked],
        "recommended": winner,
        "random": control,
        "refusal": None if best else refusal(points, asked, fresh, looks, goal.floor, len(held)),
        "recipe": recipes[best.number].to_dict() if best else None,
    }


def refusal(
    points: list[Point], asked: list[HeldOut], fresh: int, looks: int, floor: float, held: int
) -> tuple[str, str]:
    """Why nothing is recommended, and what to do, each in a few words."""
    cheaper = [p.kept for p in points if p.cost < 1]
    if not cheaper or max(cheaper) < floor:
        best = f"; the best kept {max(cheaper):.4f}" if cheaper else ""
        what = f"no point cheaper than dense kept {floor:g} of its accuracy on the search half{best}"
        return what, "more --trials, or lower --floor"
    if not asked:
        what = f"{looks} points were already looked at on the {held} held-out questions; no interval could hold for one more"
        return what, "ask new questions: another --seed or --limit and a new --study"
    nearest = max(asked, key=lambda h: (h.kept(looks)[1] or [0.0])[0])
    kept, interval = nearest.kept(looks)
    if interval and interval[0] >= floor:
        return (
            f"the points that keep {floor:g} of the dense accuracy do not cost less than dense",
            "try another --objective",
        )
    level = f"{100 * (1 - 0.05 / looks):.1f} % interval, {looks} point(s) looked at"
    span = f"{kept:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "nothing"
    what = f"no interval stays above the floor {floor:g}: the best keeps {span} of dense on {held} held-out questions ({level})"
    more = more_questions(nearest, floor, looks)
    if more is None:
        return what, "more questions would not help: lower --floor, or search with more --trials"
    return what, f"about {2 * more} more questions (half of them held out) could decide it, with a new --study"


def point(trial: Any) -> Point:
    """A finished trial as the verdict sees it."""
    return Point(trial.number, trial.values[0], tuple(studies.facts_of(trial)["of_dense_ci"]), trial.values[1])


def _ask_held_out(
    judge: Judge, recipe: Recipe, held: list[int], goal: Goal, what: str, progress: Progress
) -> dict[str, Any]:
    def beat(done: int) -> None:
        progress(what, done, len(held))

    kept, facts = examine(judge, recipe, held, [len(held)], 0.0, _TIMED, beat)
    return {"of_dense": kept, **facts}


def _held_out(number: int, facts: dict[str, Any], objective: str) -> HeldOut:
    dense, right = (tuple(c == "1" for c in facts[k]) for k in ("dense", "right"))
    return HeldOut(number, dense, right, facts[objective]["ratio"])


def _row(facts: dict[str, Any], looks: int) -> dict[str, Any]:
    """Figures on the held-out half, the interval at the level of the verdict."""
    h = _held_out(0, facts, "memory")
    out = {k: v for k, v in facts.items() if k not in ("right", "dense", "whole")}
    return out | {"of_dense_ci": h.kept(looks)[1], "ci": list(wilson(sum(h.right), len(h.right)))}
