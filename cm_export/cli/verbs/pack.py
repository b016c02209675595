"""`cm-export pack`: one archive to carry to a Jetson, which builds its engines from it and asks them."""

from pathlib import Path
from typing import Any

import click

from ...deploy.jetson.devices import DEVICES, JETPACKS, PRECISIONS, find
from ..console import Verb, bundle_argument, emit_json, json_option, progress, quiet_option
from ..recipe_options import OneOf, recipe_option

JETPACK_NAMES = ", ".join(j.name for j in JETPACKS)
RECIPES = "  [default: the recipe's]"


@click.command(
    cls=Verb,
    short_help="Pack a bundle for a Jetson without a network.",
    examples=(
        "cm-export pack demo.plan --target jetson-orin-nano --out demo.tar.gz",
        "cm-export pack engine.plan --target jetson-orin --jetpack 7.2 --precision int8 --out engine.tar.gz",
        "cm-export pack engine.plan --target jetson-orin-nano --precision int4 --capacity 2048 --out engine.tar.gz --json",
    ),
)
@bundle_argument
@click.option("--target", required=True, help=f"Device: {', '.join(d.name for d in DEVICES)}.")
@click.option("--jetpack", help=f"Release on the device: {JETPACK_NAMES}.  [default: 6.2 on Orin, 7.1 on Thor]")
@recipe_option("--precision", type=OneOf(PRECISIONS), default=PRECISIONS[0], show_default=True)
@recipe_option("--capacity", RECIPES)
@recipe_option("--max-patches", RECIPES)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The archive to write (.tar.gz).")
@click.option("--force", is_flag=True, help="Write it although the predicted memory does not fit.")
@quiet_option
@json_option
def command(
    bundle: Path, target: str, jetpack: str | None, precision: str, capacity: int | None,
    max_patches: int | None, out: Path, force: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Pack graphs, plugin sources, tokenizer and a script that builds, proves and measures engines on the device.

    There, `bash build_on_device.sh` needs JetPack only; `python3 ask.py` then asks the model, with a few Python packages.
    The same bundle and options give the same bytes.
    """
    device, release = find(target, jetpack)
    from ...deploy.jetson import pack

    order = pack.Order(device, release, precision, capacity, max_patches, force)
    with progress(quiet or as_json) as step:
        summary = pack.pack(bundle, out, order, step)
    if as_json:
        emit_json(summary)
    elif not quiet:
        print(memory_table(summary["memory"]))
        print(f"{summary['path']}  {summary['bytes'] / 1e6:.1f} MB for {device.title}, JetPack {release.name}")
        if why := summary["cannot_ask"]:
            print(f"note: the device will build, prove and measure the engines, but not ask them: {why}")
        for note in summary["notes"]:
            print(f"note: {note}")


def memory_table(memory: dict[str, Any]) -> str:
    """The prediction as aligned lines: parts of running, then the two sums beside the limit."""
    rows = [*memory["parts"].items(), ("running", memory["run_bytes"]), ("building", memory["build_bytes"])]
    rows.append(("usable on the device", memory["limit_bytes"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {size / 1e6:>9,.1f} MB" for name, size in rows]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    return "\n".join(["Memory on the device, " + memory["status"], *lines, verdict])
