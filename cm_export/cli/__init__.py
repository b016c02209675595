"""The command line: one file per verb, found by its name and imported only when it is asked for.

Results go to stdout. Everything else goes to stderr; an error is one line, `cm-export: error: ...`, with an exit code:
2 the input is unusable, 1 the work failed, 130 interrupted.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

from .. import __version__
from ..base.by_name import load, names_in, nearest
from ..base.errors import CmExportError
from .console import debug_option

VERBS = "cm_export.cli.verbs"


class Verbs(click.Group):
    """Files of verbs/ as subcommands; the file `run.py` exposes `command` and becomes `cm-export run`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return names_in(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load(VERBS, name, "verb").command if name in names_in(VERBS) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb not in names_in(VERBS) and not verb.startswith("-"):
            raise click.UsageError(f"unknown verb {verb!r}; {nearest(verb, names_in(VERBS))}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`cm-export VERB --help` shows the options of a verb and examples.",
)
@click.version_option(__version__, prog_name="cm-export")
@debug_option
def group() -> None:
    """Export a vision-language or text-only checkpoint to ONNX, and run it on core neurons and core tokens only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; the console script of pyproject.toml calls it."""
    if os.environ.get("_CM_EXPORT_COMPLETE"):  # the shell asks for completions
        group.main(prog_name="cm-export")
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    state = {"debug": False, "args": args}
    try:
        with group.make_context("cm-export", args, obj=state) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()  # here, so that a closed pipe is seen below and not at interpreter exit
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as wrong:
        verb = getattr(wrong, "ctx", None)
        see = f"; see `{verb.command_path} --help`" if verb else ""
        return _fail(f"{wrong.format_message().rstrip('.')}{see}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, kind=None)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing to say, and nothing left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell reports it
    except Exception as error:
        if state["debug"]:
            traceback.print_exc()
        if isinstance(error, CmExportError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, MemoryError):
            return _fail("out of memory; use a smaller model or a machine with more of it", 1)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"{error.filename or 'writing'}: no space left on the disk; free some and run again", 1)
        again = "" if state["debug"] else ": run again with --debug and report what it prints"
        return _fail(f"{type(error).__name__}: {error} (this is a bug{again})", 1)


def _fail(message: str, code: int, kind: str | None = "error") -> int:
    print(" ".join(f"cm-export: {kind + ': ' if kind else ''}{message}".split()), file=sys.stderr)
    return code
