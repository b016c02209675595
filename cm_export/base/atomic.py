"""A file is whole or not there: written under a temporary name beside its place, then renamed.

A symbolic link stays one: what it leads to is replaced. A device or a pipe, such as /dev/stdout, is written into.
"""

import ctypes
import os
from pathlib import Path

from . import disk
from .errors import InputError
from .links import behind_links

LONGEST = 200  # bytes of a name: file systems take 255 at most, and a temporary name is longer than the final one


def check_name(path: Path) -> None:
    """Raises InputError for a name under which nothing can be written."""
    size = len(os.fsencode(path.name))
    if size > LONGEST:
        raise InputError(f"its name is {size} bytes long", where=path, fix=f"give one of up to {LONGEST}")


def write(path: Path, data: bytes | str) -> None:
    """Write text (as UTF-8) or bytes. Raises InputError when the file cannot be written, CmExportError on a full disk."""
    content = data.encode() if isinstance(data, str) else data
    try:
        with disk.writing(path.parent):
            if path.exists() and not path.is_file():
                path.write_bytes(content)
                return
            target = behind_links(path)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                temporary.write_bytes(content)
                temporary.replace(target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise InputError(f"cannot be written ({e.strerror})", where=path, fix="check the disk and the path") from e


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step, so that there is no moment without one; False where that is not known."""
    libc = ctypes.CDLL(None)
    # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h; macOS and some network file systems have neither.
    return hasattr(libc, "renameat2") and libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0
