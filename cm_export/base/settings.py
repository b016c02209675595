"""Reads single values of a settings file of somebody else's: a wrong type, null included, is refused by its key.

flag({"do_rescale": "no"}, "do_rescale", True, where)  ->  InputError("...: do_rescale = 'no' is neither true nor false")
"""

import math
from collections.abc import Mapping
from typing import Any

from .errors import InputError

FIX = "correct it in the file"


def flag(values: Mapping[str, Any], key: str, default: bool, where: object) -> bool:
    """true or false. Raises InputError."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} = {value!r} is neither true nor false", where=where, fix=FIX)
    return value


def number(values: Mapping[str, Any], key: str, default: float, where: object, above: float = -math.inf) -> float:
    """A finite number above a bound. Raises InputError."""
    value = values.get(key, default)
    if not is_number(value) or value <= above:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise InputError(f"{key} = {value!r} is not a number{bound}", where=where, fix=FIX)
    found: float = value
    return found


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
