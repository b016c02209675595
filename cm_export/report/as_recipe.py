"""A point as something to build: its recipe in TOML, the command, and whether a rebuild is needed at all."""

from pathlib import Path
from typing import Any

from ..calibration import FILE as CALIBRATION
from ..checkpoint import ALIASES
from ..recipe import Recipe


def recipe_toml(recipe: Recipe, bundle: Path, manifest: dict[str, Any]) -> str:
    """A recipe that `cm-export build --recipe` reads as this one; what is None is left out."""
    values, source = recipe.to_dict(), manifest["model"]
    if not values["model"] and _findable(source["source"]):
        values |= {"model": source["source"], "revision": source["revision"]}
    if values["calibration"]:  # the bundle's own copy: the file that it was read from may be gone
        values["calibration"] = f"{bundle}/{CALIBRATION}"
    plain = [f"{k} = {_toml(v)}" for k, v in values.items() if v is not None and not isinstance(v, dict)]
    tables = [
        "\n".join([f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items() if v is not None)])
        for name, table in values.items()
        if isinstance(table, dict)
    ]
    return "\n\n".join(["\n".join(plain), *tables]) + "\n"


def build_command(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """How the recipe becomes a bundle; where the checkpoint lies, only the reader knows if it came from a directory."""
    known = recipe.model or _findable(manifest["model"]["source"])
    return f"cm-export build --recipe best.toml{'' if known else ' --model CHECKPOINT_DIRECTORY'} --out best.plan"


def _findable(source: str) -> bool:
    """An alias or a hub id; of a directory the manifest has only the bare name."""
    return source in ALIASES or "/" in source


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # what JSON escapes, TOML reads the same way
        return '"' + "".join(_escaped(c) for c in value) + '"'
    return repr(value)


def _escaped(c: str) -> str:
    return f"\\{c}" if c in '"\\' else f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c


def only_shares_differ(a: Recipe, b: Recipe) -> bool:
    """Whether the bundle answers as `a` with --neuron-share and --token-share alone."""
    same = {"neurons__share": 1.0, "tokens__share": 1.0, "tokens__first_share": 1.0, "tokens__budget": "share"}
    return a.tokens.budget == "share" and a.replace(**same) == b.replace(**same)
