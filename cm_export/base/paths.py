"""Paths as people type them: `~/x.png` is a file in the own home directory, `~anna/x.png` one in Anna's."""

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError


def expanded(path: str | Path) -> Path:
    """`path` with its leading ~ or ~name replaced. Raises InputError for somebody whose home directory is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        name = Path(path).parts[0]
        fix = f"write the whole path, or ./{name} for what is called so"
        raise InputError(f"no home directory is known for {name}", where=path, fix=fix) from e


def check_apart(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises InputError where writing to `out` would replace something that the same command reads."""
    for given in inputs:
        try:
            same = os.path.samefile(out, given)
        except (OSError, ValueError):  # one of them does not exist, or is no path
            continue
        if same:
            raise InputError("is what this command reads, and would be replaced", where=out, fix="write elsewhere")
