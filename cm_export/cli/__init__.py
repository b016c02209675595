"""The command line: one file per verb, found by its name and imported only when it is asked for.

Results go to stdout. Everything else goes to stderr; an error is one line, `cm-export: error: ...`, with an exit code:
2 what was given or what this machine has is unusable, 1 the work failed, 130 interrupted. With --json the error is also
an object on stdout (failure.py).
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__
from ..base.by_name import load, names_in, nearest
from ..base.frames import with_room
from . import failure, streams
from .console import debug_option

VERBS = "cm_export.cli.verbs"


def verb_names() -> list[str]:
    """What can be typed after `cm-export`: the file `check_family.py` is the verb `check-family`."""
    return [name.replace("_", "-") for name in names_in(VERBS)]


class Verbs(click.Group):
    """Files of verbs/ as subcommands; the file `run.py` exposes `command` and becomes `cm-export run`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return verb_names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load(VERBS, name.replace("-", "_"), "verb").command if name in verb_names() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb not in verb_names() and not verb.startswith("-"):
            raise click.UsageError(f"unknown verb {verb!r}; {nearest(verb, verb_names())}", ctx)
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
    state: dict[str, Any] = {"debug": False, "args": args, "printed": False}
    try:
        streams.open_all()
        with group.make_context("cm-export", args, obj=state) as ctx:
            with_room(group.invoke, ctx)
        sys.stdout.flush()  # here, so that a closed pipe is seen below and not at interpreter exit
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        streams.drop_stdout()  # whoever read our output has gone: nothing to say
        return 141  # 128 + SIGPIPE, as a shell reports it
    except (Exception, KeyboardInterrupt) as error:
        if state["debug"] and not isinstance(error, click.ClickException | KeyboardInterrupt):
            traceback.print_exc()
        # One object on stdout: a verb that has printed its result there says in it what is wrong.
        return failure.of(error, state["debug"]).show(as_json="--json" in args and not state["printed"])
