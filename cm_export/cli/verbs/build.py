"""`cm-export build`: a checkpoint becomes a bundle of ONNX graphs that passed every gate."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ...base.errors import InputError
from ..console import (
    ByName,
    Count,
    Share,
    Verb,
    emit_json,
    json_option,
    progress,
    quiet_option,
    seed_option,
    threads_option,
)

NEURONS = ByName("cm_export.policies.neurons", "neuron policy")
TOKENS = ByName("cm_export.policies.tokens", "token policy")
TASKS = ByName("cm_export.evals.tasks", "task")
BACKENDS = ByName("cm_export.backends", "backend")
PRECISIONS = ("fp16", "bf16", "fp32", "int8", "int4")


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
        "cm-export build --model demo --out demo.plan --backend tensorrt-rtx --architecture sm_86",
        "cm-export build --model ./my-qwen2-vl --out my.plan --require-retained 0.985 --data my.jsonl",
    ),
)
@click.option("--model", help="demo, scenes, qwen2-vl, qwen2-vl-7b, a directory, or a hub id owner/name[@revision].")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle directory to write.")
@click.option("--recipe", help="Name of a shipped recipe, or a TOML file; the options below override it.")
@click.option("--revision", help="Commit, branch or tag of a hub id.")
@click.option("--neurons", type=NEURONS, help=f"Neuron policy: {', '.join(NEURONS.known())}.")
@click.option("--neuron-share", type=Share(), help="Share of FFN neurons that decode computes, (0, 1].")
@click.option("--calibration", type=click.Path(), help="File of `cm-export calibrate`; the bundle keeps a copy.")
@click.option("--fill", type=click.Choice(("none", "prompt", "calibrated")), help="Mean that replaces dropped neurons.")
@click.option("--neuron-layers", type=click.Choice(("uniform", "calibrated")), help="Neurons per layer.")
@click.option("--neuron-block", type=click.Choice(("1", "8", "16", "32")), help="Neighbours chosen together.")
@click.option("--tokens", type=TOKENS, help=f"Token policy: {', '.join(TOKENS.known())}.")
@click.option("--token-share", type=Share(), help="Share of image tokens kept after the cut, (0, 1].")
@click.option("--token-budget", type=click.Choice(("share", "count", "knee")), help="How the number kept is decided.")
@click.option("--token-count", type=Count(1), help="Image tokens kept, with --token-budget count.")
@click.option("--token-quota", type=click.Choice(("shared", "each")), help="One budget for all pictures, or one each.")
@click.option("--prune-layer", type=Count(0), help="Layers that run with every token before the cut; 0: as calibrated.")
@click.option(
    "--token-layers", type=click.Choice(("last", "all")), help="Score in the last layer before the cut, or add."
)
@click.option("--first-cut", help="Token policy of a cut before the first layer, such as spread; none: no such cut.")
@click.option("--first-share", type=Share(), help="Share of image tokens that the first cut leaves, (0, 1].")
@click.option("--voters", type=click.Choice(("all", "text", "last")), help="Whose activations judge the image tokens.")
@click.option("--token-cache", type=click.Choice(("cut", "index")), help="Drop the KV of cut tokens, or skip its rows.")
@seed_option
@click.option("--require-accuracy", type=Share(), help="Fail unless this share of --data or --task is answered right.")
@click.option("--require-retained", type=Share(), help="Fail unless this share of the dense model's accuracy is kept.")
@click.option("--data", type=click.Path(path_type=Path), help="Questions for the two above; see `cm-export eval`.")
@click.option("--task", type=TASKS, help=f"The same from a task: {', '.join(TASKS.known())}.")
@click.option("--limit", type=Count(1), help="Questions of each kind, with --task.  [default: all]")
@click.option("--backend", type=BACKENDS, help=f"What the bundle runs on: {', '.join(BACKENDS.known())}.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Engines: type of weights, products and cache.")
@click.option("--capacity", type=Count(96, 2**20), help="Engines: rows of the cache, prompt and answer together.")
@click.option("--max-prompt", type=Count(48, 2**19), help="Engines: tokens that a prefill reads.")
@click.option("--max-patches", type=Count(4), help="Engines: patches of one picture.")
@click.option("--optimization-level", type=Count(0, 5), help="Engines: of the builder, 0 (fast) to 5.")
@click.option(
    "--plugins", type=click.Path(), help="Engines: libcm_plugins.so.  [default: where `make plugins` puts it]"
)
@click.option("--architecture", help="Engines for cards that are not here, such as sm_86,sm_89 (tensorrt-rtx).")
@click.option("--force", is_flag=True, help="Do every stage again. (An existing bundle is replaced anyway.)")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where stages are kept, so that a rebuild skips the unchanged ones.  [default: .NAME.stages beside --out]",
)
@threads_option
@quiet_option
@json_option
def command(
    model: str | None, out: Path, recipe: str | None, revision: str | None, force: bool, work_dir: Path | None,
    threads: int, quiet: bool, as_json: bool, require_accuracy: float | None, require_retained: float | None,
    data: Path | None, task: str | None, limit: int | None, **choices: Any,
) -> None:  # fmt: skip
    """Export a checkpoint to a bundle of ONNX graphs.

    Every stage is proved against PyTorch before the bundle appears at --out. Options not given keep the value of the
    recipe, or its default.
    """
    from ...source.needs import check_installed

    check_installed("building")
    if model:
        from ...source.checkpoint import locate

        locate(model, revision)  # a mistyped name is told at once, before torch is imported
    elif not recipe:
        raise InputError("no model named", where="--model", fix="give one, such as --model demo")
    from ...recipe import recipe as recipes

    chosen = recipes.load(recipe) if recipe else recipes.Recipe()
    if model:  # a recipe's revision belongs to the recipe's model
        chosen = dataclasses.replace(chosen, model=model, revision=None)
    chosen = chosen.replace(
        revision=revision,
        seed=choices["seed"],
        backend=choices["backend"],
        neurons__policy=choices["neurons"],
        neurons__share=choices["neuron_share"],
        calibration=choices["calibration"],
        neurons__fill=choices["fill"],
        neurons__layers=choices["neuron_layers"],
        neurons__block=int(choices["neuron_block"]) if choices["neuron_block"] else None,
        tokens__policy=choices["tokens"],
        tokens__share=choices["token_share"],
        # count and budget are checked together, so a count alone asks for the budget it belongs to
        tokens__count=choices["token_count"],
        tokens__budget=choices["token_budget"] or ("count" if choices["token_count"] else None),
        tokens__prune_layer=choices["prune_layer"],
        tokens__quota=choices["token_quota"],
        tokens__layers=choices["token_layers"],
        tokens__first=choices["first_cut"],
        tokens__first_share=choices["first_share"],
        tokens__voters=choices["voters"],
        tokens__cache=choices["token_cache"],
        engine__precision=choices["precision"],
        engine__capacity=choices["capacity"] or _other(choices["max_prompt"], chosen.engine.capacity, above=True),
        engine__max_prompt=choices["max_prompt"] or _other(choices["capacity"], chosen.engine.max_prompt, above=False),
        engine__max_patches=choices["max_patches"],
        engine__optimization_level=choices["optimization_level"],
        engine__plugins=choices["plugins"],
        engine__architecture=choices["architecture"],
    )
    if not chosen.model:
        raise InputError("names no model", where=recipe, fix="give --model as well, such as --model demo")
    if chosen.tokens.budget != "count" and choices["token_count"]:
        raise InputError(f"--token-count with --token-budget {chosen.tokens.budget}", fix="leave one of them out")

    required = None
    if require_accuracy or require_retained:
        from ...build.quality import Requirement
        from .eval import load_questions

        required = Requirement(
            load_questions(task, data, (), limit, chosen.seed, 64), require_accuracy, require_retained
        )
    elif data or task or limit:
        raise InputError(
            "questions without a requirement", where="build", fix="add --require-accuracy or --require-retained"
        )

    from ...build.build import build

    silent = quiet or as_json
    if silent:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # of a download
    with progress(silent) as step:
        summary = build(
            chosen.model, out, chosen, progress=step, force=force, work_dir=work_dir, threads=threads, required=required
        )
    if as_json:
        emit_json(summary)
    elif not quiet:
        from ..tables import print_build

        print_build(summary)


def _other(given: int | None, own: int, above: bool) -> int | None:
    """Capacity or prompt where only the other one was named: the recipe's own, unless they do not go together."""
    if given is None or (given < own if above else own < given):
        return None
    return 2 * given if above else given // 2
