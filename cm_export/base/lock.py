"""One process at a time works on a place: a lock on a file, which goes with the process that holds it.

with alone(out.with_name(f".{out.name}.lock"), InputError("another build ..."), passing=True) as note: ...

Some file systems offer no locks (Lustre without its option, some of FUSE and of NFS): that is told apart from a lock that
another process holds. A file in the temporary directory takes the place then, which only keeps out this machine's processes.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import InputError

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NOT_OFFERED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def alone(file: Path, busy: InputError, passing: bool = False) -> Iterator[str | None]:
    """Hold `file`, or raise `busy`; yields a note for the user where locks are not offered, else None.

    passing: the file goes when the block ends. Raises InputError when it cannot be locked for another reason.
    """
    with contextlib.ExitStack() as stack:
        note = None
        try:
            held = _locked(file, busy)
        except _NotOfferedError as e:
            note = f"{file.parent} offers no locks ({e.strerror}): only your processes on this machine are kept out"
            passing, file = False, _stand_in(file)
            held = _locked(file, busy)
        stack.enter_context(held)
        if passing:  # while it is still held: whoever waits for it sees that the name is another file's by now
            stack.callback(file.unlink, missing_ok=True)
        yield note


class _NotOfferedError(OSError):
    """The file system has no such lock."""


def _locked(file: Path, busy: InputError) -> IO[str]:
    """`file`, opened and locked; closing it gives the lock back."""
    while True:
        try:
            held = open(file, "w")  # noqa: SIM115 - the caller closes it
        except OSError as e:
            fix = "give another --out or --work-dir"
            raise InputError(f"cannot be written ({e.strerror})", where=file, fix=fix) from e
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            held.close()
            if e.errno in _HELD:
                raise busy from e
            if e.errno in _NOT_OFFERED and file.parent != Path(tempfile.gettempdir()):
                raise _NotOfferedError(e.errno, e.strerror) from e
            fix = "give an --out and a --work-dir on a local disk"
            raise InputError(f"cannot be locked ({e.strerror})", where=file, fix=fix) from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held.fileno()), os.stat(file)):
                return held
        held.close()  # its last holder took the name away between our opening and locking it


def _stand_in(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"cm-export-{os.getuid()}-{name}.lock"
