"""A recipe as TOML, the way back from `recipe.load`."""

from typing import Any

from .aliases import ALIASES
from .recipe import Recipe


def toml(recipe: Recipe) -> str:
    """What `recipe.load` reads as this recipe; what is None is left out."""
    values = {k: v for k, v in recipe.to_dict().items() if v is not None}
    lines = [f"{k} = {_value(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{k} = {_value(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def findable(source: str) -> bool:
    """Whether a manifest's source names a checkpoint anywhere: an alias or a hub id; of a directory it has the bare name."""
    return source in ALIASES or "/" in source


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # what JSON escapes, TOML reads the same way
        return '"' + "".join(_escaped(c) for c in value) + '"'
    return repr(value)


def _escaped(c: str) -> str:
    return f"\\{c}" if c in '"\\' else f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c
