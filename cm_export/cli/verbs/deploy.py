"""`cm-export deploy`: a bundle becomes a service, as a model repository of Triton Inference Server."""

from pathlib import Path
from typing import Any

import click

from ...base.by_name import nearest
from ...base.errors import InputError
from ..console import (
    Count,
    Share,
    Verb,
    bundle_argument,
    emit_json,
    json_option,
    progress,
    quiet_option,
    threads_option,
)
from ..recipe_options import OneOf

TARGETS = ("triton",)


def _target(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if value in TARGETS:
        return value
    raise InputError(f"unknown target {value!r}", where="TARGET", fix=nearest(value, list(TARGETS)))


@click.command(
    cls=Verb,
    short_help="Make a bundle a service on Triton.",
    examples=(
        "cm-export deploy triton engine.plan --out model_repository",
        "cm-export deploy triton engine.plan --out model_repository --at-once 4 --token-share 0.25",
        "cm-export deploy triton engine.plan --out model_repository --backend onnxruntime --json",
    ),
)
@click.argument("target", metavar="TARGET", callback=_target)
@bundle_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model repository to write.")
@click.option(
    "--backend",
    type=OneOf(("onnxruntime", "tensorrt")),
    help="What runs the graphs.  [default: what the bundle was built for]",
)
@click.option(
    "--execution",
    type=OneOf(("in-process", "bls")),
    default="in-process",
    show_default=True,
    help="Where they run: in the model that answers, or as models of the server that it calls (slower).",
)
@click.option("--at-once", type=Count(1), default=8, show_default=True, help="Requests that are answered together.")
@click.option("--lanes", type=Count(0), default=0,
              help="Decode in so many threads side by side.  [default: one for each core for a tiny model, else 1]")  # fmt: skip
@click.option("--queued", type=Count(1), default=64, show_default=True, help="That wait; more are refused.")
@click.option("--max-tokens", type=Count(1), default=1024, show_default=True, help="Longest answer of a request.")
@click.option("--neuron-share", type=Share(), help="Of requests that name none.  [default: the recipe's]")
@click.option("--token-share", type=Share(), help="Of requests that name none.  [default: the recipe's]")
@click.option("--no-warm-up", is_flag=True, help="Load without reading the largest picture first.")
@threads_option
@quiet_option
@json_option
def command(
    target: str, bundle: Path, out: Path, backend: str | None, execution: str, at_once: int, lanes: int, queued: int,
    max_tokens: int, neuron_share: float | None, token_share: float | None, no_warm_up: bool, threads: int, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a model repository that Triton Inference Server loads as it is. TARGET: triton.

    Its model `vlm` takes pictures and text and streams answers; weights are linked, not copied. README.md in it says how
    to run the server.
    """
    from ...deploy.triton import repository
    from ...serving.triton_settings import Settings

    settings = Settings(
        execution=execution.replace("-", "_"), threads=threads, lanes=lanes, at_once=at_once, queued=queued,
        max_tokens=max_tokens, neuron_share=neuron_share, token_share=token_share, warm_up_pixels=-1 if no_warm_up else 0,
    )  # fmt: skip
    with progress(quiet or as_json) as step:
        made = repository.deploy(bundle, out, settings, backend, step)
    if as_json:
        emit_json(made)
    elif not quiet:
        for line in _summary(made):
            print(line)


def _summary(made: dict[str, Any]) -> list[str]:
    copied = f", {made['copied_bytes'] / 1e6:.1f} MB of them copied" if made["copied_bytes"] else ", weights linked"
    lines = [f"{made['path']}  {made['bytes'] / 1e6:.1f} MB{copied}; runs in {made['container']}"]
    lines += [f"no model {name}: {why}" for name, why in made["left_out"].items()]
    return [*lines, f"next: see {made['path']}/README.md"]
