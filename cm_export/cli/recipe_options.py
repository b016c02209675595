"""Options of the command line that set a field of the recipe, made from the fields: recipe/option.py says what each may hold.

Tokens.share: option(0.5, "--token-share", ...)  ->  --token-share SHARE  ->  tokens__share=0.4, as Recipe.replace takes it
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import click

from ..base.errors import InputError
from ..recipe.option import Option, kind
from ..recipe.recipe import Recipe
from .console import ByName, Count, Share

HEADINGS = {
    "": "Options",
    "neurons": "Core neurons, [neurons] of a recipe",
    "tokens": "Core tokens, [tokens] of a recipe",
    "weights": "Low-bit weights on ONNX Runtime, [weights] of a recipe",
    "engine": "TensorRT engines, [engine] of a recipe",
}
Decorator = Callable[[Any], Any]


class RecipeOption(click.Option):
    """An option that `Verb` lists below the heading of its table."""

    def __init__(self, *args: Any, heading: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


class OneOf(click.Choice):
    """One of a few values, texts or numbers."""

    def __init__(self, choices: tuple[Any, ...]):
        super().__init__([str(c) for c in choices])
        self.values = {str(c): c for c in choices}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.values[super().convert(str(value), param, ctx)]


def fields() -> Iterator[tuple[str, str, dataclasses.Field]]:
    """(table, key, field) of everything in a recipe, tables in their place; table "" is the recipe itself."""
    for field in dataclasses.fields(Recipe):
        if "option" in field.metadata:
            yield "", field.name, field
        elif dataclasses.is_dataclass(field.default_factory):
            for inner in dataclasses.fields(field.default_factory):
                yield field.name, f"{field.name}__{inner.name}", inner


def recipe_options(command: Any) -> Any:
    """Adds an option for every field that has one; its parameter is named as the key of `Recipe.replace`."""
    for table, key, field in reversed([*fields()]):
        o = field.metadata["option"]
        if o.flag:
            add = click.option(
                o.flag,
                key,
                type=value_type(field),
                default=None,
                cls=RecipeOption,
                heading=HEADINGS[table],
                help=help_of(field),
            )
            command = add(command)
    return command


def recipe_option(flag: str, note: str = "", **changes: Any) -> Decorator:
    """One of them for another verb, its parameter named after the flag; `changes`: click's arguments that differ.

    `note` follows the help.
    """
    field = next(f for _, _, f in fields() if f.metadata["option"].flag == flag)
    return click.option(flag, **{"type": value_type(field), "help": help_of(field) + note, **changes})


def value_type(field: dataclasses.Field) -> click.ParamType | None:
    """What click checks a value with; None for a bool, whose flag has two names."""
    o: Option = field.metadata["option"]
    if o.share:
        return Share()
    if o.choices:
        return OneOf(o.choices)
    if o.registry:
        return ByName(o.registry, o.what)
    if o.low is not None:
        if kind(field) is int:
            return Count(int(o.low), None if o.high is None else int(o.high))
        return click.FloatRange(o.low, o.high)
    return click.Path() if o.path else None if kind(field) is bool else click.STRING


def help_of(field: dataclasses.Field) -> str:
    """The line of --help: what it is and, where click does not say so, what it may be."""
    o: Option = field.metadata["option"]
    if o.share:
        return f"{o.help}, (0, 1]."
    if o.registry:
        return f"{o.help}: {', '.join(ByName(o.registry, o.what).known())}."
    return o.help if o.help.endswith("]") else f"{o.help}."


def overrides(values: dict[str, Any], own: Recipe) -> dict[str, Any]:
    """What `own.replace` takes from the options that were given; an option may imply another one.

    A count alone asks for the budget it belongs to. Of capacity and max_prompt, the one not given gives way where the
    recipe's own does not go together with the other. Raises InputError for a count with another budget.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if "tokens__count" in given and given.setdefault("tokens__budget", "count") != "count":
        raise InputError(f"--token-count with --token-budget {given['tokens__budget']}", fix="leave one of them out")
    capacity, prompt = given.get("engine__capacity"), given.get("engine__max_prompt")
    if prompt and not capacity and prompt >= own.engine.capacity:
        given["engine__capacity"] = 2 * prompt
    if capacity and not prompt and capacity <= own.engine.max_prompt:
        given["engine__max_prompt"] = capacity // 2
    return given
