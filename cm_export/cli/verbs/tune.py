"""`cm-export tune`: search the recipe that is cheapest while it is shown to keep enough of the dense accuracy."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ...base.by_name import nearest
from ...base.errors import GateFailed
from ..console import (
    Count,
    Share,
    Verb,
    bundle_argument,
    emit_json,
    json_option,
    progress,
    quiet_option,
    seed_option,
    threads_option,
)
from .eval import TASKS, Several, load_questions

OBJECTIVES = ("latency", "memory")


class Objective(click.ParamType):
    """What to save, with a suggestion for a misspelt one."""

    name = "objective"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in OBJECTIVES:
            self.fail(f"unknown objective {value!r}; {nearest(str(value), list(OBJECTIVES))}", param, ctx)
        return value


@click.command(
    cls=Verb,
    short_help="Search policies and budgets for a floor of accuracy.",
    examples=(
        "cm-export tune demo.plan --task easy-vqa --limit 600 --floor 0.985 --out tuned.toml",
        "cm-export tune demo.plan --data my.jsonl --floor 0.97 --objective memory --trials 80 --out tuned.toml",
        "cm-export tune demo.plan --data my.jsonl --floor 0.97 --study mysql://me@host/studies --out tuned.toml",
    ),
)
@bundle_argument
@click.option("--task", type=TASKS, help=f"A task that comes with the program: {', '.join(TASKS.known())}.")
@click.option("--data", type=click.Path(path_type=Path), help="Your own questions; see `cm-export eval`.")
@click.option("--kinds", type=Several(click.STRING), help="Kinds of question of the task, by commas.  [default: all]")
@click.option("--limit", type=Count(1), help="Questions of each kind: half for the search, half for the verdict.")
@click.option("--max-new-tokens", type=Count(1), default=64, show_default=True, help="Longest answer, with --data.")
@click.option("--floor", type=Share(), required=True, help="Share of the dense accuracy that must be kept, (0, 1].")
@click.option(
    "--objective", type=Objective(), default="latency", show_default=True, help="What to save: latency or memory."
)
@click.option("--trials", type=Count(1), default=40, show_default=True, help="Trials in total, of all processes.")
@click.option("--out", required=True, help="The recipe to write (.toml); not written when none can be recommended.")
@click.option(
    "--study",
    help="File of the trials (.db: SQLite, else a journal) or an Optuna storage URL; several processes may share it.  "
    "[default: NAME.study.db beside --out]",
)
@click.option("--study-name", default="cm-export", show_default=True, help="Name in a storage that holds several.")
@seed_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, task: str | None, data: Path | None, kinds: tuple[str, ...] | None, limit: int | None,
    max_new_tokens: int, floor: float, objective: str, trials: int, out: str, study: str | None, study_name: str,
    seed: int | None, threads: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Search policies, shares, cut layer and voters for the cheapest recipe whose accuracy is shown to stay above a floor.

    The search uses half of the questions. The best recipes then answer the other half, and one is recommended only if its
    whole confidence interval lies above the floor there; otherwise the exit code is 1 and no recipe is written. After a
    kill or an interrupt, the same command goes on.
    """
    from ...host.overlay import check_output

    path = check_output(out, (".toml",))
    place = study or str(path.with_name(f"{path.stem}.study.db"))
    chosen = load_questions(task, data, kinds or (), limit, seed, max_new_tokens)
    from ...tune.held_out import Goal
    from ...tune.search import Interrupted, tune
    from ...tune.study import shown
    from ...tune.written import write

    with progress(quiet or as_json) as step:
        try:
            report = tune(bundle, chosen, Goal(floor, objective, trials, seed or 0), place, study_name, threads, step)
        except Interrupted as stop:
            print(f"cm-export: {stop} (study: {shown(place)})", file=sys.stderr)
            raise click.exceptions.Exit(130) from stop
    report["out"] = None
    if report["recommended"]:
        import datetime

        words = shown(shlex.join(["cm-export", *sys.argv[1:]]), place)
        write(path, report, words, datetime.date.today().isoformat())
        report["out"] = str(path)
    if as_json:
        emit_json({**report, "refusal": "; ".join(report["refusal"]) if report["refusal"] else None})
    else:
        _print(report)
    if report["refusal"]:
        what, fix = report["refusal"]
        raise GateFailed(f"no recipe was written: {what}", where=path, fix=fix)


def _print(report: dict[str, Any]) -> None:
    from ..tables import print_rows

    rows = [_row("dense", report["dense"], None, "")]
    for trial in sorted(report["trials"], key=lambda t: t["cost"]):
        if trial["on_front"] or trial["held_out"]:
            note = "recommended" if trial is report["recommended"] else "finalist" if trial["held_out"] else ""
            rows.append(_row(_name(trial["recipe"], trial), None, trial, note))
    if report["random"]:
        rows.append(_row("random, same size as recommended", None, {"held_out": report["random"]}, ""))
    notes = [
        f"cost: {report['objective']} beside dense (1 = dense), measured in the same process; in brackets: 95 % interval of "
        "what is kept of the dense accuracy, questions paired (above 1: right where dense is wrong)",
        "memory: weights and cache rows that a decoded token reads, beside dense; bits/weight: of the weights alone",
        f"held out: questions that the search never saw; {100 * report['level']:.2f} % intervals, {report['looks']} point(s) "
        "looked at (Bonferroni), random 95 %; only they decide",
    ]
    if report["failed"]:
        notes.append(f"{len(report['failed'])} trial(s) could not be run, the first: {report['failed'][0]['error']}")
    if report["out"]:
        notes.append(
            f"written: {report['out']}; build it with `cm-export build --recipe {report['out']} --out tuned.plan`"
        )
    done = len(report["trials"])
    print_rows({"rows": rows, "notes": notes}, title=f"{done} trials on {report['bundle']}, floor {report['floor']:g}")


def _row(name: str, dense: dict[str, Any] | None, trial: dict[str, Any] | None, note: str) -> dict[str, Any]:
    held = trial and trial["held_out"]
    out: dict[str, Any] = {"answered by": name, "": note, "cost": None, "of dense": "-", "n": None}
    out |= {"held out: accuracy": "-", "of dense, held out": "-", "memory": None, "bits/weight": None, "latency": None}
    if dense:
        accuracy = dense["held_out"]
        out |= {"cost": 1.0, "n": dense["search"]["n"], "memory": 1.0, "latency": 1.0}
        out["held out: accuracy"] = f"{accuracy['accuracy']:.4f} [{accuracy['ci'][0]:.3f}, {accuracy['ci'][1]:.3f}]"
    elif trial and "recipe" in trial:
        out |= {"cost": round(trial["cost"], 3), "of dense": _span(trial["of_dense"], trial["of_dense_ci"])}
        out["n"] = trial["n"]
    if held:
        out["held out: accuracy"] = f"{held['accuracy']:.4f} [{held['ci'][0]:.3f}, {held['ci'][1]:.3f}]"
        out["of dense, held out"] = _span(held["of_dense"], held["of_dense_ci"])
        out["memory"] = round(held["memory"]["ratio"], 3)
        out["bits/weight"] = round(held["memory"]["bits_read_per_weight"], 2)
        out["latency"] = round(held["latency"]["ratio"], 3) if held["latency"] else None
    return out


def _span(kept: float, interval: list[float]) -> str:
    return f"{kept:.4f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _name(recipe: dict[str, Any], trial: dict[str, Any]) -> str:
    neurons, tokens = recipe["neurons"], recipe["tokens"]
    left = neurons["policy"] if neurons["policy"] == "dense" else f"{neurons['policy']} {trial['neuron_share']:.0%}"
    right = tokens["policy"]
    if right != "dense":
        right = f"{right} {trial['token_share']:.0%} after {tokens['prune_layer']}, {tokens['voters']} vote"
    return f"{left} + {right}".replace("%", " %")
