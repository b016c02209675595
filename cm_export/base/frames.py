"""Room for Python's frames, so that a deep program does not ask the system for memory in every call.

CPython 3.11 and 3.12 keep frames in pieces of 16 KB and give a piece back as soon as it is empty. A loop that calls a function
just where a piece ends takes and returns one in every turn: torch's exporter lost a quarter of its time so, or nothing,
depending on how deep it was called. Pieces are made to fit, so one frame that is large leaves room for all behind it.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Slots of 8 bytes: a little over half a megabyte takes a piece of a megabyte, half of which stays for other frames.
_ROOM = (1 << 16) + 400


def with_room(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args, **kwargs), with room for the frames of some hundred calls inside each other."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=_ROOM)
