"""Plain values that a stranger sends: parsed without letting them grow, and named in an error without repeating all of it.

b'{"temperature": "..a megabyte.."}'   ->   {"temperature": "..."}   ->   temperature: is 'the first 200 characters'
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..base.errors import InputError

SHOWN = 200  # characters of a value in an error
_STRUCTURE = 250_000  # brackets and commas of a body: many more than a request has, and few enough to parse


def parse(body: bytes) -> Any:
    """A body of JSON as plain values. Raises InputError, also for bodies that are small and would take much memory."""
    if sum(map(body.count, (b"[", b"{", b","))) > _STRUCTURE:
        raise InputError(f"has more than {_STRUCTURE} values", where="body", fix="send one request")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as e:
        raise InputError("is nested too deeply", where="body", fix="send one request, as OpenAI's API takes it") from e
    except UnicodeDecodeError as e:
        raise InputError("is not valid text (UTF-8)", where="body", fix="encode the JSON as UTF-8") from e
    except json.JSONDecodeError as e:
        what = f"is no JSON ({e.msg}: line {e.lineno} column {e.colno})"
        raise InputError(what, where="body", fix="send one JSON object") from e
    except ValueError as e:  # a number of thousands of digits
        raise InputError("holds a number that is too long", where="body", fix="send numbers of usual length") from e


def text(value: object, where: str, most: int) -> str:
    """A text of at most that many characters. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"is a {kind(value)}", where=where, fix="give a text")
    if len(value) > most:
        raise InputError(f"has {len(value)} characters, at most {most} are taken", where=where, fix="shorten it")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InputError("is not valid text (UTF-8)", where=where, fix="leave out its lone surrogates") from e
    return value


def flag(given: Mapping[str, Any], name: str) -> bool:
    """The truth value of that name; false where there is none. Raises InputError."""
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"is {short(value)}", where=name, fix="give true or false")
    return value


_KINDS = {
    dict: "object",
    list: "list",
    str: "text",
    bool: "truth value",
    int: "number",
    float: "number",
    type(None): "null",
}


def kind(value: object) -> str:
    """What JSON calls such a value."""
    return _KINDS.get(type(value), type(value).__name__)


def short(value: object) -> str:
    """A client's value in words, none of them so long that an answer or a log grows with it."""
    if isinstance(value, str | bytes):
        return ascii(value[:SHOWN])
    if isinstance(value, list | tuple | Mapping):
        return f"a {kind(value)} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _no_number(text: str) -> NoReturn:
    raise InputError(f"{text} is no number of JSON", where="body", fix="send a finite number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("a field stands in an object twice", where="body", fix="send each field once")
    return found
