"""A point as something to build: its recipe in TOML, the command, and whether a rebuild is needed at all."""

import dataclasses
import shlex
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
    if recipe.calibration:  # the file that it was read from may be gone, and the recipe may be saved anywhere
        recipe = dataclasses.replace(recipe, calibration=f"{bundle.resolve()}/{CALIBRATION}")
    return toml(recipe)


def build_command(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """The command that builds the recipe; a checkpoint that came from a directory is left for the reader to name."""
    known = recipe.model or findable(manifest["model"]["source"])
    return f"cm-export build --recipe best.toml{'' if known else ' --model CHECKPOINT_DIRECTORY'} --out best.plan"


def run_command(recipe: Recipe, bundle: Path, built: Recipe) -> str | None:
    """The command with which the bundle, `built` as it is, answers as `recipe`; None where that takes a rebuild."""
    if not only_shares_differ(recipe, built):
        return None
    words = ["cm-export", "run", str(bundle)]
    if recipe.neurons.policy != "dense":
        words += ["--neuron-share", f"{recipe.neurons.share:g}"]
    if recipe.tokens.policy != "dense":
        words += ["--token-share", f"{recipe.tokens.share:g}"]
    return f"{shlex.join(words)} --image PICTURE --prompt QUESTION"


def only_shares_differ(a: Recipe, b: Recipe) -> bool:
    """Whether the bundle answers as `a` with --neuron-share and --token-share alone."""
    same = {"neurons__share": 1.0, "tokens__share": 1.0, "tokens__first_share": 1.0, "tokens__budget": "share"}
    return a.tokens.budget == "share" and a.replace(**same) == b.replace(**same)
