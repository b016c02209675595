"""What the verbs share: options and their value checks, progress on stderr, JSON on stdout.

Nothing heavy is imported here: `--help` must answer at once.
"""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..base import atomic
from ..base.by_name import names_in, nearest
from ..base.errors import InputError
from ..bundle import not_a_bundle

Step = Callable[..., None]  # step("hash the weights") or step("trace", done=3, total=28)


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj["debug"] = True  # the dict that cli.main made; it outlives the context


debug_option = click.option(
    "--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors."
)


_MAY_BE_EMPTY = {"prompt", "prompts", "system"}  # texts; `run` has its own words for an empty question


class Verb(click.Command):
    """A command with --debug, which every verb takes, and with Examples below its options.

    Options that have a `heading` are listed below it, the others below "Options".
    """

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = examples
        debug_option(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, after values that are empty: an unset variable of a shell is no path and no name."""
        given = self.make_parser(ctx).parse_args(list(args))[0]
        for param in self.params:
            values = given.get(param.name or "")
            empty = values == "" or (isinstance(values, list | tuple) and "" in values)
            if empty and param.name not in _MAY_BE_EMPTY:
                name = param.opts[0] if isinstance(param, click.Option) else param.make_metavar(ctx)
                raise InputError("is empty", where=name, fix="give a value (is a variable of the shell not set?)")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in self.examples))


class Share(click.ParamType):
    """A share in (0, 1]."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number; give a share such as 0.4", param, ctx)
        if math.isfinite(share) and 0 < share <= 1:
            return share
        hint = f"for {share:g} % write {share / 100:g}" if 1 < share <= 100 else "give a share such as 0.4"
        self.fail(f"{value} is not above 0 and up to 1; {hint}", param, ctx)


class Count(click.IntRange):
    """A whole number from `min`; --help shows the bound in words, where it matters."""

    name = "n"

    def get_metavar(self, *_args: Any, **_kwargs: Any) -> str:
        return "N"


class ByName(click.ParamType):
    """The name of a file in a package, such as a policy; checked without importing it. easy_vqa.py is `easy-vqa`."""

    def __init__(self, package: str, what: str):
        self.package, self.what, self.name = package, what, what.split()[-1]

    def known(self) -> list[str]:
        return [name.replace("_", "-") for name in names_in(self.package)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = value.replace("-", "_")
        if name not in names_in(self.package):
            self.fail(f"unknown {self.what} {value!r}; {nearest(value, self.known())}", param, ctx)
        return name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


def _check_bundle(_ctx: click.Context, _param: click.Parameter, value: Path) -> Path:
    if value.is_dir():  # whoever opens it says what it lacks
        return value
    raise not_a_bundle.refusal(value)


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path), callback=_check_bundle)
seed_option = click.option(
    "--seed", type=Count(0, 2**31 - 1), help="Seed of random choices.  [default: the recipe's; 0 for drawing questions]"
)
threads_option = click.option(
    "--threads", type=Count(0), default=0, help="CPU threads, up to the processors allowed here; 0 takes all."
)
_BACKENDS = ByName("cm_export.backends", "backend")
backend_option = click.option(
    "--backend", type=_BACKENDS, help=f"Run on {' or '.join(_BACKENDS.known())}.  [default: what it was built for]"
)
device_option = click.option(
    "--device", help="cpu, cuda, cuda:1 or auto, for ONNX Runtime.  [default: cpu; engines: the GPU]"
)
control_tokens_option = click.option(
    "--control-tokens",
    is_flag=True,
    help="Read control tokens such as <|im_end|> in texts as tokens.  [default: as text]",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, nothing else.")


def command_line(leave_out: tuple[str, ...] = ()) -> str:
    """The command as it was typed, for a report; without the options named in `leave_out` and their values."""
    ctx = click.get_current_context()
    flags = {name for p in ctx.command.params if getattr(p, "is_flag", False) for name in p.opts}
    args, kept = list((ctx.obj or {}).get("args", ())), []
    while args:
        word = args.pop(0)
        name, has_value, _ = word.partition("=")
        if name not in leave_out:
            kept.append(word)
        elif name not in flags and not has_value:
            args = args[1:]
    return shlex.join(["cm-export", *kept])


def emit_json(value: Any) -> None:
    """Prints `value` as JSON on stdout; paths become text, numpy scalars numbers, NaN and infinity null."""
    print(_json(value))
    ctx = click.get_current_context(silent=True)
    if ctx and ctx.obj is not None:
        ctx.obj["printed"] = True


def write_json(value: Any, path: Path) -> None:
    """The same into a file, under a temporary name and then renamed. Raises InputError."""
    atomic.write(path, _json(value) + "\n")


def _json(value: Any) -> str:
    plain = _plain(value)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file that is no UTF-8: escaped, Python reads it back as it was
        return json.dumps(plain, indent=2, allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, without importing it
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def wants_plain_text() -> bool:
    """Whether even a terminal is to get no escape codes (https://no-color.org), or cannot read any."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


@contextmanager
def progress(silent: bool) -> Iterator[Step]:
    """Yields `step(what, done=None, total=None)`: on stderr, spinners on a terminal, else one plain line per `what`."""
    if silent:
        yield lambda what, done=None, total=None: None
    elif sys.stderr.isatty() and not wants_plain_text() and find_spec("rich"):  # a device needs none to answer
        with _bars() as step:
            yield step
    else:
        yield _lines()


def _lines() -> Step:
    start, seen = time.perf_counter(), set()

    def step(what: str, done: int | None = None, total: int | None = None) -> None:
        if what not in seen:
            seen.add(what)
            print(f"cm-export: [{time.perf_counter() - start:6.1f} s] {what}", file=sys.stderr, flush=True)

    return step


@contextmanager
def _bars() -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        running: dict[str, Any] = {}

        def finish() -> None:
            for what, task in running.items():
                bars.update(task, description=what, total=1, completed=1)
            running.clear()

        def step(what: str, done: int | None = None, total: int | None = None) -> None:
            if what not in running:
                finish()
                running[what] = bars.add_task(what, total=None)
            if done is not None:
                bars.update(running[what], description=f"{what} {done}" + (f" of {total}" if total else ""))

        yield step
        finish()
