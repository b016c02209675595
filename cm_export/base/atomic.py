"""A file is whole or not there: written under a temporary name beside its place, then renamed."""

import os
from pathlib import Path

from .errors import InputError

LONGEST = 200  # bytes of a name: file systems take 255 at most, and a temporary name is longer than the final one


def check_name(path: Path) -> None:
    """Raises InputError for a name under which nothing can be written."""
    size = len(os.fsencode(path.name))
    if size > LONGEST:
        raise InputError(f"its name is {size} bytes long", where=path, fix=f"give one of up to {LONGEST}")


def write(path: Path, data: bytes | str) -> None:
    """Write text (as UTF-8) or bytes. Raises InputError when the file cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot be written ({e.strerror})", where=path, fix="check the disk and the path") from e
