"""`cm-export eval`: how accurate a bundle is, beside its dense, random and attention controls."""

from pathlib import Path
from typing import Any

import click

from ...base.errors import InputError
from ...base.paths import check_apart
from ..console import (
    ByName,
    Count,
    Share,
    Verb,
    backend_option,
    bundle_argument,
    command_line,
    control_tokens_option,
    device_option,
    emit_json,
    json_option,
    progress,
    quiet_option,
    seed_option,
    threads_option,
    write_json,
)

TASKS = ByName("cm_export.evals.tasks", "task")
NEURONS = ByName("cm_export.policies.neurons", "neuron policy")
TOKENS = ByName("cm_export.policies.tokens", "token policy")


class Several(click.ParamType):
    """Values separated by commas, each of one type."""

    def __init__(self, one: click.ParamType):
        self.one, self.name = one, f"{one.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(self.one.convert(v.strip(), param, ctx) for v in str(value).split(",")))


@click.command(
    cls=Verb,
    short_help="Measure a bundle's accuracy beside its controls.",
    examples=(
        "cm-export eval demo.plan --task easy-vqa --limit 200",
        "cm-export eval demo.plan --data my.jsonl --out report.json",
        "cm-export eval demo.plan --task easy-vqa --kinds sentence --neuron-share 0.4 --token-share 0.25",
        "cm-export eval demo.plan --task scenes --neurons griffin,coreinfer --neuron-share 0.6,0.4 --tokens dense",
    ),
)
@bundle_argument
@click.option("--task", type=TASKS, help=f"A task that comes with the program: {', '.join(TASKS.known())}.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help='Your own questions: lines of {"image": ..., "question": ..., "answer": ...}, pictures (if any) beside the file.',
)
@click.option("--kinds", type=Several(click.STRING), help="Kinds of question of the task, by commas.  [default: all]")
@click.option("--limit", type=Count(1), help="Questions asked of each kind.  [default: all]")
@click.option(
    "--neurons", type=Several(NEURONS), help="Neuron policies to compare, by commas.  [default: the recipe's]"
)
@click.option("--tokens", type=Several(TOKENS), help="Token policies to compare, by commas.  [default: the recipe's]")
@click.option("--neuron-share", type=Several(Share()), help="Shares of neurons, by commas.  [default: the recipe's]")
@click.option(
    "--token-share", type=Several(Share()), help="Shares of image tokens, by commas.  [default: the recipe's]"
)
@click.option("--max-new-tokens", type=Count(1), default=64, show_default=True, help="Longest answer, with --data.")
@click.option("--out", help="Write the report here (.json); after a kill, the same command goes on.")
@control_tokens_option
@seed_option
@backend_option
@device_option
@threads_option
@json_option
@quiet_option
def command(
    bundle: Path, task: str | None, data: Path | None, kinds: tuple[str, ...] | None, limit: int | None,
    max_new_tokens: int, out: str | None, control_tokens: bool, seed: int | None, backend: str | None, device: str | None,
    threads: int, as_json: bool, quiet: bool, **sweep: Any,
) -> None:  # fmt: skip
    """Measure a bundle's accuracy, with the dense model, random choices and attention as controls."""
    path = None
    if out is not None:
        from ...host.overlay import check_output

        path = check_output(out, (".json",))
        check_apart(path, [data] if data else [])
    chosen = load_questions(task, data, kinds or (), limit, seed, max_new_tokens, control_tokens)
    from ...evals.compare import Sweep, compare
    from ...evals.journal import forget

    asked = Sweep(
        sweep["neurons"] or (), sweep["tokens"] or (), sweep["neuron_share"] or (), sweep["token_share"] or ()
    )
    with progress(quiet or as_json) as step:
        report = compare(bundle, chosen, asked, seed, threads, path, step, backend, device)
    report["command"] = command_line()
    if path:
        write_json(report, path)
        forget(path)
    if as_json:
        emit_json(report)
    else:
        from ..tables import print_rows

        print_rows({"rows": report["table"], "notes": report["notes"]}, title=f"{report['task']} on {bundle}")


def load_questions(
    task: str | None,
    data: Path | None,
    kinds: tuple[str, ...],
    limit: int | None,
    seed: int | None,
    max_new_tokens: int,
    control_tokens: bool = False,
) -> Any:
    """The questions of --task or --data. Raises InputError unless exactly one of them is given."""
    if (task is None) == (data is None):
        raise InputError("no questions named", fix="give --task or --data, one of the two")
    if data is not None:
        if kinds or limit:
            raise InputError("--kinds and --limit choose from a task", where="--data", fix="shorten the file instead")
        from ...evals.user_data import load as load_data

        return load_data(data, max_new_tokens, control_tokens)
    if control_tokens:
        raise InputError("the questions of a task hold no control tokens", where="--control-tokens", fix="leave it out")
    assert task is not None  # one of the two is given
    from ...evals.task import load

    return load(task, kinds, limit, seed)
