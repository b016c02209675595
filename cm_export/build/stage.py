"""What a stage of a build is: the stages that it reads, whatever else it reads, and its work.

key = hash of the keys of `reads`, of `inputs(job)`, of the library versions and of our sources behind `run`

Same key, same result: such a stage is taken over from an earlier build (stages.py).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .job import Job


@dataclass(frozen=True)
class Stage:
    """One stage; each file in steps/ has one. The key covers the module of `run` and all that it imports (sources.py)."""

    name: str
    reads: tuple[str, ...]  # stages before this one
    inputs: Callable[["Job"], dict[str, Any]]  # the rest that it reads, as plain values
    # run(folder, job, stages) writes into `folder` and returns what later stages and the manifest should know. It finds
    # what it reads by stages.file and stages.state; a stage with `begin` also gets `begun`.
    run: Callable[..., dict[str, Any] | None]
    begin: Callable[["Job", Path], AbstractContextManager[Any]] | None = None  # work beside the stages before this one
    libraries: tuple[str, ...] = ()  # distributions that it uses without importing them
    needed: Callable[["Job"], bool] = lambda job: True


def fingerprint(value: Any) -> str:
    """A hash of arrays and plain values, and of tuples, mappings and dataclasses of them, for `inputs`."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part + b"\n")
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif is_dataclass(value):
        yield from _parts({field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield repr(name).encode()
            yield from _parts(value[name])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values".encode()
        for one in value:
            yield from _parts(one)
    elif isinstance(value, str | int | float | None):
        yield repr(value).encode()
    else:
        raise TypeError(f"no fingerprint of a {type(value).__name__}")
