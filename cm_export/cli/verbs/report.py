"""`cm-export report`: one HTML file from which a team decides at what operating point to deploy a bundle."""

import sys
from pathlib import Path

import click

from ...base.errors import InputError
from ..console import (
    Count,
    Share,
    Verb,
    bundle_argument,
    command_line,
    emit_json,
    json_option,
    progress,
    quiet_option,
    seed_option,
    threads_option,
    write_json,
)
from .eval import TASKS, Several, load_questions


@click.command(
    cls=Verb,
    short_help="Write a page to decide an operating point from.",
    examples=(
        "cm-export report demo.plan",
        "cm-export report demo.plan --eval eval.json --floor 0.985 --out report.html",
        "cm-export report engine.plan --eval eval.json --eval more.json --bench bench.json --data my.jsonl",
        "cm-export report fp32.plan --beside int8.plan --beside int4.plan --data my.jsonl",
        "cm-export report engine.plan --data my.jsonl --out report.html --json",
    ),
)
@bundle_argument
@click.option(
    "--beside", multiple=True, type=click.Path(path_type=Path),
    help="Another bundle of the same checkpoint, such as one of fewer bits; repeat it for several.",
)  # fmt: skip
@click.option(
    "--eval", "evals", multiple=True, type=click.Path(path_type=Path),
    help="A report of `eval --out`; repeat it for several.  [default: a small evaluation is run]",
)  # fmt: skip
@click.option("--bench", type=click.Path(path_type=Path), help="What `bench --json` printed, in a file.")
@click.option(
    "--floor", type=Share(), default=0.985, show_default=True, help="Least share of the dense accuracy, (0, 1]."
)
@click.option(
    "--task", type=TASKS, help="Questions that come with the program.  [default: the report's, or the demo's]"
)
@click.option("--data", type=click.Path(path_type=Path), help="Your own questions, as for `eval`.")
@click.option("--kinds", type=Several(click.STRING), help="Kinds of question of the task, by commas.  [default: all]")
@click.option(
    "--limit",
    type=Count(1),
    help="Questions of each kind of the task.  [default: enough to show --floor where one answer is lost]",
)
@click.option("--max-new-tokens", type=Count(1), default=64, show_default=True, help="Longest answer, with --data.")
@click.option("--examples", type=Count(0, 50), default=4, show_default=True, help="Pictures shown with their answers.")
@click.option("--out", default="report.html", show_default=True, help="The file to write (.html).")
@seed_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, beside: tuple[Path, ...], evals: tuple[Path, ...], bench: Path | None, floor: float, task: str | None,
    data: Path | None, kinds: tuple[str, ...] | None, limit: int | None, max_new_tokens: int, examples: int, out: str,
    seed: int | None, threads: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write one self-contained HTML file: the recommended operating point, its cost, controls, layers and examples.

    The page recommends the cheapest measured point whose lower 95 % bound is at or above --floor. Without --eval, the
    recipe and two lower budgets are measured first, and the figures are written beside the page. With --beside, points of all
    bundles are compared, each as a share of what the dense model of BUNDLE gets right. Few questions show no high
    floor: .985 needs 144 of which no answer is lost, or 286 of which one is.
    """
    from ...host.overlay import check_output

    path = check_output(out, (".html", ".htm"))
    if len({p.resolve() for p in evals}) < len(evals):
        raise InputError("one report is given twice", where="--eval", fix="give each file once")
    if task is None and data is None and not evals:
        task = _own_task(bundle)
    if task is None and data is None and (kinds or limit):
        raise InputError("--kinds and --limit choose from a task", fix="give --task")
    asked = None
    if task is not None or data is not None:
        limit = limit or (_enough(task, kinds, floor) if task else None)
        asked = load_questions(task, data, kinds or (), limit, seed, max_new_tokens)
        from ...report.enough import too_few

        few = None if evals else too_few(len(asked.questions), floor)
        if few and not quiet:  # said before the long work, not after it
            print(f"cm-export: {few}", file=sys.stderr)
    from ...report import make
    from ...report.page import write
    from ...report.pareto import choose

    with progress(quiet or as_json) as step:
        inputs = make.make(
            bundle,
            evals,
            bench,
            asked,
            floor,
            examples,
            seed,
            threads,
            # Where the page is written must not change what is in it.
            command_line(leave_out=("--out", "--json", "--quiet", "-q")),
            path.with_suffix(".eval.json"),
            write_json,
            step,
            beside,
        )
        step("write the page")
        write(inputs, path)
    if as_json:
        emit_json({"path": str(path), **make.summary(inputs)})
    elif not quiet:
        print(make.sentence(choose(inputs.points, floor), floor))
        print(path)


def _enough(task: str, kinds: tuple[str, ...] | None, floor: float) -> int:
    """Questions of each kind that show the floor."""
    from ...evals.task import kinds_of
    from ...report.enough import to_ask

    return to_ask(floor, len(dict.fromkeys(kinds or kinds_of(task))))


def _own_task(bundle: Path) -> str | None:
    """The task of a model that comes with the program."""
    from ...bundle.bundle import read_manifest
    from ...evals.task import OWN_TASKS

    own = OWN_TASKS.get(read_manifest(bundle)["model"]["source"])
    return own and own.replace("-", "_")
