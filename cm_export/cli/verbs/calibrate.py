"""`cm-export calibrate`: measure on the model's own answers what `glass`, fill, layer budgets and blocks need."""

import tempfile
from pathlib import Path

import click

from ...base import atomic, disk
from ...base.errors import InputError
from ...base.paths import check_apart
from ..console import Count, Verb, emit_json, json_option, progress, quiet_option, threads_option


@click.command(
    cls=Verb,
    short_help="Measure the neurons of a model while it answers.",
    examples=(
        "cm-export calibrate --model demo --out calibration.safetensors",
        "cm-export calibrate engine.plan --data prompts.jsonl --out calibration.safetensors",
        'cm-export calibrate engine.plan --data "own text" --prompts 64 --out calibration.safetensors',
    ),
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="A checkpoint instead of a bundle; it is exported to a temporary place first.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@click.option(
    "--data",
    help='Prompts: a .jsonl file of {"prompt": ..., "image": ...}, a task such as easy-vqa (its training half), or '
    '"own text".  [default: the demo model\'s task; for others, text that the model makes up]',
)
@click.option("--prompts", type=Count(1), default=128, show_default=True, help="Prompts used, at most.")
@click.option("--max-new-tokens", type=Count(1), default=64, show_default=True, help="Longest answer.")
@click.option(
    "--sensitivity-prompts", type=Count(1), default=16, show_default=True, help="Answers decoded layer by layer."
)
@click.option("--seed", type=Count(0, 2**31 - 1), default=0, show_default=True, help="Seed of random choices.")
@threads_option
@quiet_option
@json_option
def command(
    bundle: Path | None, model: str | None, out: Path, data: str | None, prompts: int, max_new_tokens: int,
    sensitivity_prompts: int, seed: int, threads: int, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure the neurons of a bundle's (or a checkpoint's) dense model on the text that it generates.

    The same command on the same machine writes the same file, to the byte.
    """
    if (bundle is None) == (model is None):
        raise InputError("give a bundle or --model, one of them", where="calibrate", fix="calibrate demo.plan --out F")
    if model is not None:
        from ...source.needs import check_installed

        check_installed("calibrating a checkpoint")
    atomic.check_name(out)
    if not out.parent.is_dir():
        raise InputError("no such directory", where=out.parent, fix="make it, or give another --out")
    check_apart(out, [data] if data else [])
    from ...bundle import calibration
    from ...calibrating.answers import prompts_of
    from ...calibrating.calibrate import measure
    from ...host.loaded import load

    with progress(quiet or as_json) as step, tempfile.TemporaryDirectory(prefix=disk.TEMPORARY) as temporary:
        if model is not None:
            from ...build.build import build
            from ...recipe.recipe import Recipe

            bundle = Path(temporary) / "dense.plan"
            recipe = Recipe().replace(neurons__policy="dense", tokens__policy="dense", weights__float32=True)
            build(model=model, out=bundle, recipe=recipe, progress=step, threads=threads)
        assert bundle is not None  # given, or built above
        engine = load(bundle, threads, step, backend="onnxruntime")
        asked, what = prompts_of(data, engine.bundle.manifest["model"]["source"], prompts, seed)
        found = measure(
            engine,
            asked,
            own=prompts,
            max_new_tokens=max_new_tokens,
            sensitivity_prompts=sensitivity_prompts,
            seed=seed,
            what=what,
            progress=step,
        )
        calibration.write(out, found)
    summary = {
        "path": str(out),
        **found.about,
        "rows": [
            {"layer": i, **{f"KL at {p:.0%}": float(v) for p, v in zip(found.shares, row, strict=True)}}
            for i, row in enumerate(found.sensitivity)
        ],
    }
    if as_json:
        emit_json(summary)
    elif not quiet:
        from ..tables import print_rows

        ran = found.about["ran"]
        notes = [
            f"{out}: {ran['generated_tokens']} generated tokens of {ran['prompts']} prompts ({ran['data']})",
            "KL to dense in nats per token when only that layer is sparse (glass)",
            *ran.get("notes", ()),
            *engine.bundle.notes,
        ]
        print_rows({"rows": summary["rows"], "notes": notes}, title="sensitivity of the layers")
