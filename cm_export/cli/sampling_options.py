"""Options that say how the tokens of an answer are chosen: --temperature 0.7 --top-p 0.9 -> Sampling(...)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .console import Count

if TYPE_CHECKING:
    from ..host.sampling import Sampling

HEADING = "Tokens of the answer"


class _Option(click.Option):
    heading = HEADING  # console.Verb lists these options below it


_OPTIONS = (
    click.option("--sample", cls=_Option, is_flag=True, help="Draw the tokens; without it answers are greedy."),
    click.option(
        "--temperature", cls=_Option, type=click.FloatRange(0), metavar="T",
        help="Draw at this temperature; 0 is greedy.  [default: the checkpoint's, or 1]",
    ),
    click.option(
        "--top-k", cls=_Option, type=Count(0),
        help="Draw among the N most likely tokens; 0 is all.  [default: the checkpoint's, or 50]",
    ),
    click.option(
        "--top-p", cls=_Option, type=click.FloatRange(0, 1), metavar="P",
        help="Draw among the most likely tokens that hold this mass.  [default: the checkpoint's, or 1]",
    ),
    click.option(
        "--min-p", cls=_Option, type=click.FloatRange(0, 1), metavar="P",
        help="Draw among tokens of this share of the likeliest one's probability.  [default: the checkpoint's, or 0]",
    ),
    click.option(
        "--repetition-penalty", cls=_Option, type=click.FloatRange(0, min_open=True), metavar="X",
        help="Divide scores of tokens that came before, prompt included; 1 is none.  [default: the checkpoint's]",
    ),
    click.option("--stop", cls=_Option, multiple=True, metavar="TEXT", help="End before this text; repeat it for several."),
    click.option(
        "--min-new-tokens", cls=_Option, type=Count(0), help="No stop token before so many.  [default: the checkpoint's]"
    ),
)  # fmt: skip
NAMES = ("sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "min_new_tokens")


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; their values come as keywords, for `asked`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked(choices: dict[str, Any], seed: int | None) -> "Sampling":
    """What the options and --seed ask for. Raises InputError."""
    from ..host.sampling import Sampling

    values = {name: choices[name] for name in NAMES}
    # Not `in (None, False, ())`: 0 equals False, and says something.
    given = {name: v for name, v in values.items() if not (v is None or v is False or v == ())}
    return Sampling(seed=seed, **given)
