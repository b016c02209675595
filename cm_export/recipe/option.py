"""A recipe's field states once what it may hold and which option of `build` sets it: for TOML, command line and docs.

share: float = option(0.6, "--neuron-share", "Share of FFN neurons that decode computes", share=True)

check_fields(...)             neurons.share = 1.5 is not a share; give a number above 0 and up to 1
cli/recipe_options.py         --neuron-share SHARE   Share of FFN neurons that decode computes, (0, 1].
docs/recipe.md                a row of the table
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..base.by_name import names_in, nearest
from ..base.errors import InputError


@dataclass(frozen=True)
class Option:
    """What a field may hold. Bounds belong to it; `high` None: no bound."""

    flag: str  # "" where only a recipe file sets it; "--x/--no-x" for a bool
    help: str  # without a full stop
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    share: bool = False  # a number above 0 and up to 1
    registry: str = ""  # the package whose files are the allowed names, such as cm_export.policies.tokens
    what: str = ""  # what such a file is: "token policy"
    path: bool = False


def option(default: Any, flag: str, help: str, **allowed: Any) -> Any:
    """A dataclass field of this default; `allowed`: the other fields of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(flag, help, **allowed)})


def options_of(table: Any) -> dict[str, Option]:
    """Field name -> Option, in the order of the fields; `table`: a dataclass or a value of it."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(table) if "option" in f.metadata}


def kind(field: dataclasses.Field[Any]) -> type:
    """The type of a field's values, from its default; None is the default of texts only."""
    return str if field.default is None else type(field.default)


def check_fields(table: Any, prefix: str, where: str) -> None:
    """Raises InputError naming the first field of `table` whose value is not allowed; `prefix`: such as "tokens.".

    A default is always allowed: it may say that nobody asked (tokens.count = 0).
    """
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if "option" in field.metadata and value != field.default:
            _check(value, f"{prefix}{field.name}", field.metadata["option"], where)


def _check(value: Any, label: str, o: Option, where: str) -> None:
    if o.share and not 0 < value <= 1:  # also refuses nan
        raise InputError(f"{label} = {value} is not a share", where=where, fix="give a number above 0 and up to 1")
    if o.choices and value not in o.choices:
        text = isinstance(value, str)
        fix = nearest(value, list(o.choices)) if text else f"known: {', '.join(map(str, o.choices))}"
        raise InputError(f"{label} = {value!r}", where=where, fix=fix)
    if o.registry and value.replace("-", "_") not in names_in(o.registry):
        raise InputError(f"unknown {o.what} {value!r}", where=where, fix=nearest(value, names_in(o.registry)))
    if o.low is not None and not o.low <= value <= (value if o.high is None else o.high):
        raise InputError(f"{label} = {value}", where=where, fix=f"give {bounds(o)}")


def bounds(o: Option) -> str:
    """The range in words: `0 to 5`, `1 or more`."""
    return f"{o.low} or more" if o.high is None else f"{o.low} to {o.high}"
