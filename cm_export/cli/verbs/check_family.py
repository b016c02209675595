"""`cm-export check-family`: prove a family on tiny random models of it, and say what its file lacks."""

from pathlib import Path
from typing import Any

import click

from ...base.by_name import nearest
from ..console import Count, Verb, emit_json, progress, quiet_option, write_json


class Name(click.ParamType):
    """A model type, with a suggestion for a misspelt one; those of other distributions count, too."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ... import families

        if value not in (known := families.names()):
            self.fail(f"unknown model type {value!r}; {nearest(str(value), known)}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from ... import families

        return [CompletionItem(name) for name in families.names() if name.startswith(incomplete)]


@click.command(
    cls=Verb,
    short_help="Prove a model family on tiny random models.",
    examples=(
        "cm-export check-family qwen2_vl",
        "cm-export check-family my_family --configurations 8 --seed 12 --json report.json",
    ),
)
@click.argument("name", type=Name())
@click.option("--configurations", type=Count(1), default=3, show_default=True, help="Random models to prove it on.")
@click.option("--seed", type=Count(0, 2**31 - 1), default=0, show_default=True, help="Of the first; the others follow.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the report as JSON to a file; without one or with -, to stdout and nothing else.",
)
@quiet_option
@click.pass_context
def command(ctx: click.Context, name: str, configurations: int, seed: int, json_file: str | None, quiet: bool) -> None:
    """Draw configurations of a family, export each, and compare every part with stock transformers.

    NAME is a model type: a file of cm_export/families, or an entry point `cm_export.families` of another distribution.
    The exit code is 1 where a proof fails or something is missing. docs/families.md says how a family is added.
    """
    from ...source.needs import check_installed

    check_installed("checking a family")
    from ...parity.check import check

    with progress(quiet or json_file == "-") as step:
        report = check(name, range(seed, seed + configurations), step)
    if json_file == "-":
        emit_json(report)
    else:
        if json_file:
            write_json(report, Path(json_file))
        _print(report)
    if not report["proved"]:
        ctx.exit(1)


def _print(report: dict[str, Any]) -> None:
    from ..tables import print_rows

    several = report["configurations"]
    rows = []
    for place, (proof, what) in enumerate(report["proofs"].items()):
        found = [c["proofs"][place] for c in several]
        limit = next((f"{p['limit']:.0e}" for p in found if p["limit"]), "")
        row = {"proof": proof, "what is compared": what, "limit": limit}
        rows.append(row | {f"seed {c['seed']}": _figure(p) for c, p in zip(several, found, strict=True)})
    notes = [f"seed {c['seed']}: {c['model'] or 'not exported'}, {c['seconds']:.0f} s" for c in several]
    for c in several:
        failed = [p for p in c["proofs"] if p["state"] == "FAILED"]
        notes += [f"FAILED, seed {c['seed']}: {p['proof']}: {p['detail']}" for p in failed]
    notes += [f"MISSING: {what}" for what in report["lacks"]]
    notes += [f"note: {what}" for what in report["notes"]]
    notes.append(
        "every proof holds" if report["proved"] else "NOT PROVED: docs/families.md says what each part must do"
    )
    print_rows({"rows": rows, "notes": notes}, title=f"family {report['family']}: largest differences")


def _figure(proof: dict[str, Any]) -> str:
    if proof["state"] != "proved":
        figure = f" {proof['value']:.1e}" if proof["value"] is not None else ""
        return proof["state"] + figure
    return "yes" if not proof["limit"] else f"{proof['value']:.1e}"
