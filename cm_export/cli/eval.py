"""`cm-export eval`: how accurate a bundle is, beside its dense and random controls."""

from pathlib import Path

import click

from ._console import (
    ByName,
    Count,
    Verb,
    bundle_argument,
    emit_json,
    json_option,
    neuron_share,
    progress,
    quiet_option,
    seed_option,
    threads_option,
    token_share,
)

TASKS = ByName("cm_export.evals", "task")


@click.command(
    cls=Verb,
    short_help="Measure a bundle's accuracy beside its controls.",
    examples=(
        "cm-export eval demo.plan --task easy-vqa --limit 200",
        "cm-export eval demo.plan --task easy-vqa --answers sentence --neuron-share 0.4 --out report.json",
    ),
)
@bundle_argument
@click.option("--task", type=TASKS, required=True, help=f"What to measure: {', '.join(TASKS.known()) or 'none yet'}.")
@click.option("--limit", type=Count(1), help="Questions asked.  [default: all]")
@neuron_share
@token_share
@click.option(
    "--answers",
    type=click.Choice(("word", "sentence", "both")),
    default="both",
    show_default=True,
    help="Short answers judge prefill, sentences judge decode.",
)
@click.option("--out", help="Write the report here as well (.json).")
@seed_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, task: str, limit: int | None, neuron_share: float | None, token_share: float | None, answers: str,
    out: str | None, seed: int | None, threads: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure a bundle's accuracy, with the dense model and random choices of the same size as controls."""
    from ..by_name import load

    if out:
        from ..overlay import check_output

        out = check_output(out, (".json",))
    measure = load("cm_export.evals", task, "task").measure
    with progress(quiet or as_json) as step:
        report = measure(
            bundle,
            limit=limit,
            neuron_share=neuron_share,
            token_share=token_share,
            answers=answers,
            seed=seed,
            threads=threads,
            progress=step,
        )
    if out:
        from ._console import write_json

        write_json(report, out)
    if as_json:
        emit_json(report)
    else:
        from ._tables import print_rows

        print_rows(report, title=f"{task.replace('_', '-')} on {bundle}")
