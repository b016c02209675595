"""Every field of a recipe states what it may hold: the command line, TOML files and the docs follow it, field by field."""

import dataclasses
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import click
import pytest
from conftest import cm_export

from cm_export.base.by_name import names_in
from cm_export.base.errors import InputError
from cm_export.cli import main
from cm_export.cli.recipe_options import fields, recipe_option, recipe_options, value_type
from cm_export.deploy.jetson.devices import PRECISIONS
from cm_export.recipe.engine import EngineSettings
from cm_export.recipe.option import bounds, check_fields, kind, option
from cm_export.recipe.recipe import Recipe, from_dict

FIELDS = {key: field for _, key, field in fields()}
OPTIONS = {key: field.metadata["option"] for key, field in FIELDS.items()}
FLAGS = {key: o for key, o in OPTIONS.items() if o.flag}
PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"


def other(key):
    """An allowed value that is not the default."""
    field, o = FIELDS[key], OPTIONS[key]
    if o.choices or o.registry:
        values = o.choices or names_in(o.registry)
        return values[0] if values[0] != field.default else values[-1]
    if o.share or kind(field) is float:
        return 0.35
    if kind(field) is bool:
        return not field.default
    return field.default + 1 if kind(field) is int else "spread" if key == "tokens__first" else "c/d"


def refused(key):
    """Values that the field must not take."""
    o = OPTIONS[key]
    if o.share:
        return [0.0, -0.1, 1.5, float("nan")]
    if o.choices or o.registry:
        return ["nonsense"] if kind(FIELDS[key]) is str else [12]
    return [v for v in (o.low is not None and o.low - 1, o.high is not None and o.high + 1) if v is not False]


def as_words(key, value):
    flag = OPTIONS[key].flag
    return [flag.split("/")[0 if value else 1]] if isinstance(value, bool) else [flag, str(value)]


def nested(key, value):
    table, _, name = key.rpartition("__")
    return {table: {name: value}} if table else {key: value}


@pytest.fixture
def built(monkeypatch):
    """built(words): the recipe that `build` hands over."""
    calls = []
    module = ModuleType("cm_export.build.build")
    module.build = lambda model, out, recipe, **given: calls.append(recipe) or {}
    monkeypatch.setitem(sys.modules, "cm_export.build.build", module)

    def run(words):
        assert main(["build", "--out", "o.plan", "--json", *words]) == 0
        return calls.pop()

    return run


# ---------------------------------------------------------------- the fields


def test_every_field_of_a_recipe_states_what_it_may_hold():
    tables = {
        f.name: f.default_factory
        for f in dataclasses.fields(Recipe)
        if f.name in ("neurons", "tokens", "weights", "engine")
    }
    named = {f"{t}__{f.name}" for t, table in tables.items() for f in dataclasses.fields(table)}
    named |= {f.name for f in dataclasses.fields(Recipe) if f.compare and f.name not in tables}
    assert set(OPTIONS) == named and len(named) > 35


def test_every_engine_setting_has_an_option():
    assert {f"engine__{f.name}" for f in dataclasses.fields(EngineSettings)} <= set(FLAGS)


def test_flags_are_unique_and_helps_are_sentences_without_their_stop():
    flags = [f for o in FLAGS.values() for f in o.flag.split("/")]
    assert len(set(flags)) == len(flags) and all(re.fullmatch(r"--[a-z][a-z-]+", f) for f in flags)
    assert all(len(o.help) > 8 and not o.help.endswith(".") for o in OPTIONS.values())
    assert all("/" in o.flag for key, o in FLAGS.items() if kind(FIELDS[key]) is bool)


def test_every_default_is_allowed_but_the_count_that_nobody_asked_for():
    outside = []
    for key, field in FIELDS.items():
        # A default is not checked as such, so it is checked here as any other value would be.
        table = dataclasses.make_dataclass("Table", [("it", object, dataclasses.field(metadata=field.metadata))])
        try:
            if field.default is not None:
                check_fields(table(field.default), "", "here")
        except InputError:
            outside.append(key)
    assert outside == ["tokens__count"]


def test_what_pack_offers_is_among_the_precisions_of_engines():
    assert set(PRECISIONS) < set(OPTIONS["engine__precision"].choices)


# ---------------------------------------------------------------- TOML


@pytest.mark.parametrize("key", [key for key in FIELDS if refused(key)])
def test_a_recipe_refuses_what_the_field_does_not_allow_and_names_it(key):
    for value in (v for v in refused(key) if v != FIELDS[key].default):
        with pytest.raises(InputError) as caught:
            from_dict(nested(key, value))
        o, message = OPTIONS[key], str(caught.value)
        assert key.replace("__", ".") in message or f"unknown {o.what}" in message
        assert "number above 0" in message or f"give {bounds(o)}" in message or "known: " in message


@pytest.mark.parametrize("key", FIELDS)
def test_a_recipe_refuses_a_value_of_another_type(key):
    for wrong in ([], {}, "text" if kind(FIELDS[key]) is not str else 1, True if kind(FIELDS[key]) is not bool else 1):
        with pytest.raises(InputError, match=f"{key.rpartition('__')[2]} = .* is not a {kind(FIELDS[key]).__name__}"):
            from_dict(nested(key, wrong))


# ---------------------------------------------------------------- command line


def test_build_help_shows_every_option_with_what_it_may_be():
    shown = " ".join(cm_export("build", "--help").stdout.split()).replace("- ", "-")
    for key, o in FLAGS.items():
        assert all(f"{flag} " in shown for flag in o.flag.split("/")), key
        assert " ".join(o.help.split()).replace("- ", "-") in shown, key
        if o.choices:
            assert f"{o.flag} [{'|'.join(map(str, o.choices))}]" in shown
        elif o.registry:
            assert f"{o.help}: {', '.join(n.replace('_', '-') for n in names_in(o.registry))}." in shown
        elif o.share:
            assert f"{o.help}, (0, 1]." in shown
        elif o.low is not None:
            assert (f"[x>={o.low}]" if o.high is None else f"[{o.low}<=x<={o.high}]") in shown


def test_build_help_lists_options_below_the_table_that_they_belong_to():
    parts = re.split(r"^(\S.*):$", cm_export("build", "--help").stdout, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for key, o in FLAGS.items():
        table = key.rpartition("__")[0]
        heading = next(h for h in sections if (f"[{table}]" in h if table else h == "Options"))
        assert f"{o.flag.split('/')[0]} " in sections[heading]


@pytest.mark.parametrize("key", FLAGS)
def test_an_option_sets_its_field_and_no_other(key, built):
    base = [] if key == "calibration" else ["--calibration", "c.safetensors"]
    value = other(key)
    before = built([*base, "--model", "a/b"])
    after = built([*base, *([] if key == "model" else ["--model", "a/b"]), *as_words(key, value)])
    implied = {"tokens__budget": "count"} if key == "tokens__count" else {}
    assert after == before.replace(**{key: value}, **implied)
    assert after != before
    assert key == "model" or {key, *implied} <= after.chosen


@pytest.mark.parametrize("key", [key for key in FLAGS if refused(key)])
def test_an_option_refuses_what_its_field_does_not_allow_and_names_it(key, capsys):
    for value in refused(key):
        assert main(["build", "--model", "demo", "--out", "o.plan", *as_words(key, value)]) == 2
        assert OPTIONS[key].flag in capsys.readouterr().err


def test_a_bool_of_a_recipe_file_can_be_taken_back(built, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('model = "demo"\n[engine]\nweight_streaming = true\ndense = false\n')
    assert built(["--recipe", str(file)]).engine == EngineSettings(weight_streaming=True, dense=False)
    taken_back = built(["--recipe", str(file), "--no-weight-streaming", "--dense-engines"])
    assert taken_back.engine == EngineSettings()


@pytest.mark.parametrize(
    ("words", "capacity", "prompt"),
    [
        ((), 4096, 2048),
        (("--capacity", "8192"), 8192, 2048),
        (("--capacity", "2048"), 2048, 1024),
        (("--max-prompt", "3000"), 4096, 3000),
        (("--max-prompt", "4096"), 8192, 4096),
        (("--capacity", "5000", "--max-prompt", "4096"), 5000, 4096),
        (("--capacity", "96"), 96, 48),
        (("--max-prompt", str(2**19)), 2**20, 2**19),
    ],
)
def test_of_capacity_and_prompt_the_one_not_given_gives_way(words, capacity, prompt, built):
    engine = built(["--model", "demo", *words]).engine
    assert (engine.capacity, engine.max_prompt) == (capacity, prompt)


def test_a_new_field_with_an_option_needs_no_other_place(monkeypatch):
    """The generator reads the dataclasses alone."""
    more = dataclasses.make_dataclass(
        "More", [("depth", int, option(3, "--depth", "How deep", low=1, high=9))], bases=(EngineSettings,), frozen=True
    )
    table = next(f for f in dataclasses.fields(Recipe) if f.name == "engine")
    monkeypatch.setattr(table, "default_factory", more)
    command = recipe_options(click.Command("x", callback=lambda **_: None, params=[]))
    asked = command.__click_params__ if hasattr(command, "__click_params__") else command.params
    added = next(p for p in asked if p.name == "engine__depth")
    assert added.opts == ["--depth"] and (added.type.min, added.type.max) == (1, 9)


def test_another_verb_takes_an_option_with_its_bounds():
    @click.command()
    @recipe_option("--capacity", "  [default: the recipe's]")
    def verb(capacity):
        return capacity

    (param,) = verb.params
    o = OPTIONS["engine__capacity"]
    assert (param.name, param.type.min, param.type.max) == ("capacity", o.low, o.high)
    assert param.help == f"{o.help}.  [default: the recipe's]"
    assert type(param.type) is type(value_type(FIELDS["engine__capacity"]))


def test_build_help_answers_within_a_quarter_of_a_second_although_it_reads_the_recipe():
    def seconds():
        start = time.perf_counter()
        cm_export("build", "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.25


# ---------------------------------------------------------------- docs


def row(key, field):
    o = field.metadata["option"]
    allowed = ""
    if o.choices:
        allowed = ", ".join(f"`{c}`" for c in o.choices)
    elif o.registry:
        allowed = ", ".join(f"`{n if o.what != 'backend' else n.replace('_', '-')}`" for n in names_in(o.registry))
    elif o.share:
        allowed = "(0, 1]"
    elif o.low is not None:
        allowed = bounds(o)
    elif kind(field) is bool:
        allowed = "`true`, `false`"
    default = "" if field.default in (None, "") else f"`{str(field.default).lower()}`"
    flag = " ".join(f"`{f}`" for f in o.flag.split("/") if f)
    return f"| `{key.replace('__', '.')}` | {flag} | {default} | {allowed} | {o.help} |\n"


def test_the_page_about_recipes_lists_every_field():
    head = "| key | option of `build` | default | values | |\n|---|---|---|---|---|\n"
    expected = head + "".join(row(key, field) for key, field in FIELDS.items())
    shown = PAGE.read_text(encoding="utf-8").split("<!-- fields -->\n")[1].split("<!-- end fields -->")[0]
    assert shown == expected, f"put this between the marks of {PAGE.name}:\n{expected}"
