"""Checks a plugin library: its interface anywhere, its kernels where --device says.

python -m cm_export.plugins.harness --library artifacts/plugins/libcm_plugins.so --device cuda [--bench]
compute-sanitizer python -m cm_export.plugins.harness --library ... --device cuda
"""

import json
import sys
from pathlib import Path

import click

from cm_export.base.errors import CmExportError, InputError

from .cases import calls
from .interface import problems
from .library import Library
from .run import Cpu, Cuda, run


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option(
    "--library", type=click.Path(path_type=Path), required=True, help="libcm_plugins.so or its emulated twin."
)
@click.option("--harness", type=click.Path(path_type=Path), help="libcm_harness.so. Default: beside the library.")
@click.option(
    "--device",
    type=click.Choice(["none", "cpu", "cuda"]),
    default="none",
    show_default=True,
    help="none: the interface only; cpu: an emulated library; cuda: the real one.",
)
@click.option("--only", multiple=True, help="Run only the calls whose description contains this text, or one of these.")
@click.option("--bench", is_flag=True, help="Then measure the kernels against dense products (cuda).")
def main(library: Path, harness: Path | None, device: str, only: tuple[str, ...], bench: bool) -> None:
    opened = Library(library, harness)
    if device != "none" and opened.emulated != (device == "cpu"):
        fix = "give libcm_plugins_emulated.so for cpu, libcm_plugins.so for cuda"
        raise InputError(f"does not run on {device}", where=library, fix=fix)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("there is no CUDA device", where="--device cuda", fix="use --device none, or cpu")
    if bench and device != "cuda":
        raise InputError("kernels are measured on a CUDA device", where="--bench", fix="add --device cuda")
    broken = problems(opened)
    for problem in broken:
        click.echo(problem)
    click.echo(f"interface: {len(broken)} problems")
    if device != "none":
        place = Cuda() if device == "cuda" else Cpu()
        chosen = [call for call in calls() if not only or any(text in str(call) for text in only)]
        if not chosen:
            raise InputError(f"no call contains {' or '.join(map(repr, only))}", where="--only")
        outcomes = [run(opened, call, place) for call in chosen]
        wrong = [o for o in outcomes if o.problem]
        for outcome in wrong:
            click.echo(f"{outcome.call}: {outcome.problem}")
        click.echo(f"calls: {len(wrong)} of {len(outcomes)} wrong")
        broken = [*broken, *wrong]
    if broken:
        sys.exit(1)
    if bench:
        from .bench import measure

        click.echo(json.dumps(measure(opened), indent=1))


if __name__ == "__main__":
    try:
        main()
    except CmExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
