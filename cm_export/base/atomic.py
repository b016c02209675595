"""A file is whole or not there: written under a temporary name beside its place, then renamed."""

import os
from pathlib import Path

from .errors import InputError


def write(path: Path, data: bytes | str) -> None:
    """Write text (as UTF-8) or bytes. Raises InputError when the file cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot be written ({e.strerror})", where=path, fix="check the disk and the path") from e
