"""What went wrong, as one line on stderr, an exit code and, with --json, an object on stdout.

InputError("no such bundle", where="x.plan", fix="...")  ->  cm-export: error: x.plan: no such bundle; ...    exit code 2
                                                             {"error": {"what", "where", "fix", "exit_code"}}
"""

import contextlib
import errno
import io
import sys
from dataclasses import dataclass
from typing import Any

import click

from ..base.errors import CmExportError, InputError
from . import streams
from .console import emit_json

_SPENT = {errno.ENOSPC, errno.EDQUOT}
# Not a mistake in what was typed: the machine gave out while it worked.
_GAVE_OUT = {*_SPENT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}


@dataclass(frozen=True)
class Failure:
    """An error for people and for programs."""

    what: str
    where: str | None
    fix: str | None
    exit_code: int
    line: str
    kind: str = "error: "

    def show(self, as_json: bool) -> int:
        """Print it; returns the exit code."""
        print(" ".join(f"cm-export: {self.kind}{self.line}".split()), file=sys.stderr)
        try:
            if as_json:
                named = {"what": self.what, "where": self.where, "fix": self.fix, "exit_code": self.exit_code}
                emit_json({"error": named})
            sys.stdout.flush()
        except OSError:  # it may be stdout that failed
            _drop()
        return self.exit_code


def of(error: BaseException, debug: bool = False) -> Failure:
    """What to say about whatever a verb raised."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", None, None, 130, "interrupted", kind="")
    if isinstance(error, click.ClickException):
        verb = getattr(error, "ctx", None)
        what, see = error.format_message().rstrip("."), f"see `{verb.command_path} --help`" if verb else None
        return Failure(what, verb.command_path if verb else None, see, 2, f"{what}; {see}" if see else what)
    if isinstance(error, OSError) and not isinstance(error, CmExportError):
        error = _from_system(error)
    if isinstance(error, MemoryError):
        error = CmExportError("out of memory", fix="use a smaller model or a machine with more of it")
    if isinstance(error, CmExportError):
        where = None if error.where is None else str(error.where)
        return Failure(error.what, where, error.fix, 1 if _gave_out(error) else error.exit_code, str(error))
    what, again = (
        f"{type(error).__name__}: {error}",
        "" if debug else ": run again with --debug and report what it prints",
    )
    return Failure(what, None, f"this is a bug{again}", 1, f"{what} (this is a bug{again})")


def _from_system(error: OSError) -> Any:
    """An error of the operating system in words: about a file, or about what this machine has left."""
    if error.errno in _SPENT:
        where = error.filename or "writing"
        return CmExportError("no space left on the disk", where=where, fix="free some and run again")
    if error.errno is None or (error.filename is None and error.errno not in _GAVE_OUT):
        return error  # raised by no system call, or about nothing that a user could mend
    what, kind = str(error.strerror).lower(), CmExportError if error.errno in _GAVE_OUT else InputError
    return kind(what, where=error.filename, fix="see that its path can be read and written")


def _gave_out(error: CmExportError) -> bool:
    """Whether the disk or the memory ended, whatever was made of that."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _GAVE_OUT):
            return True
        cause = cause.__cause__
    return False


def _drop() -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # a stand-in without a number, as tests have
        streams.drop_stdout()
