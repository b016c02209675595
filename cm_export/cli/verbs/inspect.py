"""`cm-export inspect`: what is inside a bundle, and which proofs it passed."""

from pathlib import Path

import click

from ...base.by_name import nearest
from ...base.errors import InputError
from ..console import Verb, bundle_argument, emit_json, json_option


@click.command(
    cls=Verb,
    short_help="Show what is inside a bundle.",
    examples=(
        "cm-export inspect demo.plan",
        "cm-export inspect demo.plan --graph decode",
        "cm-export inspect demo.plan --json",
    ),
)
@bundle_argument
@click.option("--graph", help="Show the inputs, outputs and operators of this graph only.")
@json_option
def command(bundle: Path, graph: str | None, as_json: bool) -> None:
    """Show the recipe, graphs, weights, passes and gate results of a bundle."""
    from ...bundle.inspect import describe

    described = describe(bundle)
    if graph is not None:
        by_name = {entry["name"]: entry for entry in described["graphs"]}
        if graph not in by_name:
            raise InputError(f"no graph {graph!r}", where=bundle, fix=nearest(graph, list(by_name)))
        described = by_name[graph]
    if as_json:
        emit_json(described)
        return
    from .. import tables as _tables

    if graph is not None:
        _tables.print_graph(described)
    else:
        _tables.print_bundle(described)
