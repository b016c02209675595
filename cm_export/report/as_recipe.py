"""A point as something to build: its recipe in TOML, the command, and whether a rebuild is needed at all."""

import dataclasses
from pathlib import Path
from typing import Any

from ..bundle.calibration import FILE as CALIBRATION
from ..recipe.recipe import Recipe
from ..recipe.text import findable, toml


def recipe_toml(recipe: Recipe, bundle: Path, manifest: dict[str, Any]) -> str:
    """The recipe of a point as a file of its own: where the model is from, and the bundle's own copy of a calibration."""
    source = manifest["model"]
    if not recipe.model and findable(source["source"]):
        recipe = dataclasses.replace(recipe, model=source["source"], revision=source["revision"])
    if recipe.calibration:  # the file that it was read from may be gone
        recipe = dataclasses.replace(recipe, calibration=f"{bundle}/{CALIBRATION}")
    return toml(recipe)


def build_command(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """The command that builds the recipe; a checkpoint that came from a directory is left for the reader to name."""
    known = recipe.model or findable(manifest["model"]["source"])
    return f"cm-export build --recipe best.toml{'' if known else ' --model CHECKPOINT_DIRECTORY'} --out best.plan"


def only_shares_differ(a: Recipe, b: Recipe) -> bool:
    """Whether the bundle answers as `a` with --neuron-share and --token-share alone."""
    same = {"neurons__share": 1.0, "tokens__share": 1.0, "tokens__first_share": 1.0, "tokens__budget": "share"}
    return a.tokens.budget == "share" and a.replace(**same) == b.replace(**same)
