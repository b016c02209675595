"""`cm-export build`: a checkpoint becomes a bundle of ONNX graphs that passed every gate."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ...base.errors import InputError
from ...recipe.recipe import Recipe, load
from ..console import ByName, Count, Share, Verb, emit_json, json_option, progress, quiet_option, threads_option
from ..recipe_options import overrides, recipe_options

TASKS = ByName("cm_export.evals.tasks", "task")


@click.command(
    cls=Verb,
    short_help="Export a checkpoint to a bundle of ONNX graphs.",
    examples=(
        "cm-export build --model demo --out demo.plan",
        "cm-export build --model qwen2-vl --out engine.plan",
        "cm-export build --model ./my-qwen2-vl --out my.plan --neurons griffin --neuron-share 0.5",
        "cm-export build --model demo --neurons glass --calibration calibration.safetensors --out demo.plan",
        "cm-export build --recipe my-recipe.toml --out my.plan --force --json",
        "cm-export build --model ./my-qwen2-vl --out my.plan --backend tensorrt --precision fp16 --capacity 4096",
        "cm-export build --model ./my-qwen2-vl --out my.plan --backend tensorrt --max-batch 4 --no-dense-engines",
        "cm-export build --model demo --out demo.plan --backend tensorrt-rtx --architecture sm_86",
        "cm-export build --model ./my-qwen2-vl --out my.plan --require-retained 0.985 --data my.jsonl",
        "cm-export build --model ./my-qwen2-vl --out my.plan --neurons griffin --require-agreement 0.9",
    ),
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle directory to write.")
@click.option("--recipe", help="Name of a shipped recipe, or a TOML file; options in the sections below override it.")
@recipe_options
@click.option("--require-accuracy", type=Share(), help="Fail unless this share of --data or --task is answered right.")
@click.option("--require-retained", type=Share(), help="Fail unless this share of the dense model's accuracy is kept.")
@click.option(
    "--require-agreement",
    type=Share(),
    help="Fail unless the pruned model's next token is the dense model's at this share of text that the model writes.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Questions for the first two; see `cm-export eval`.")
@click.option("--task", type=TASKS, help=f"The same from a task: {', '.join(TASKS.known())}.")
@click.option("--limit", type=Count(1), help="Questions of each kind, with --task.  [default: all]")
@click.option(
    "--force",
    is_flag=True,
    help="Do every stage again, and replace another model's bundle; without it, unchanged stages are reused.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where stages are kept, so that a rebuild skips the unchanged ones.  [default: .NAME.stages beside --out]",
)
@threads_option
@quiet_option
@json_option
def command(
    out: Path, recipe: str | None, force: bool, work_dir: Path | None, threads: int, quiet: bool, as_json: bool,
    require_accuracy: float | None, require_retained: float | None, require_agreement: float | None,
    data: Path | None, task: str | None, limit: int | None, **choices: Any,
) -> None:  # fmt: skip
    """Export a checkpoint to a bundle of ONNX graphs.

    Every stage is proved against PyTorch before the bundle appears at --out. What no option sets is as the recipe says,
    or has its default.
    """
    from ...source.needs import check_installed

    check_installed("building")
    chosen = _recipe(recipe, choices)
    required = None
    if require_accuracy or require_retained:
        from ...build.quality import Requirement
        from .eval import load_questions

        questions = load_questions(task, data, (), limit, chosen.seed, max_new_tokens=64)
        required = Requirement(questions, require_accuracy, require_retained)
    elif data or task or limit:
        raise InputError(
            "questions without a requirement", where="build", fix="add --require-accuracy or --require-retained"
        )

    from ...build.build import build

    silent = quiet or as_json
    if silent:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # of a download
    assert chosen.model is not None  # `_recipe` refuses one that names none
    idle = _idle(choices, chosen)
    with progress(silent) as step:
        summary = build(
            chosen.model, out, chosen, progress=step, force=force, work_dir=work_dir, threads=threads, required=required,
            require_agreement=require_agreement,
        )  # fmt: skip
    if idle:
        summary["notes"] = [*idle, *summary.get("notes", ())]
    if as_json:
        emit_json(summary)
    elif not quiet:
        from ..tables import print_build

        print_build(summary)


def _idle(choices: dict[str, Any], chosen: Recipe) -> list[str]:
    """A note on options of engines for a bundle that gets none."""
    given = [key for key, value in choices.items() if key.startswith("engine__") and value is not None]
    if chosen.backend != "onnxruntime" or not given:
        return []
    ctx = click.get_current_context()
    flags = {p.name: p.opts[0] for p in ctx.command.params}
    named = ", ".join(flags[key] for key in given)
    return [f"{named}: only recorded, since engines are built with --backend tensorrt or tensorrt-rtx"]


def _recipe(name: str | None, choices: dict[str, Any]) -> Recipe:
    """The recipe of that name or file, or the default one, with the choices of the options in it. Raises InputError."""
    model, revision = choices.pop("model"), choices["revision"]
    if model:
        from ...source.checkpoint import locate

        locate(model, revision)  # a mistyped name is told at once, before torch is imported
    elif not name:
        raise InputError("no model named", where="--model", fix="give one, such as --model demo")
    chosen = load(name) if name else Recipe()
    if model:  # a recipe's revision belongs to the recipe's model
        chosen = dataclasses.replace(chosen, model=model, revision=None)
    chosen = chosen.replace(**overrides(choices, chosen))
    if not chosen.model:
        raise InputError("names no model", where=name, fix="give --model as well, such as --model demo")
    return chosen
