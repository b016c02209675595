"""The page to decide from: what it recommends, that it is one file, inert, the same every time, and whole in a browser."""

import dataclasses
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import chromium
import numpy as np
import pytest
from conftest import cm_export, here, low_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import numbered

from cm_export.base.errors import InputError
from cm_export.base.metrics import kept_interval
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.evals.task import Question
from cm_export.host.request import Request
from cm_export.recipe import recipe as recipes
from cm_export.recipe.recipe import Recipe
from cm_export.report import analysis, as_recipe, charts, enough, examples, make, page
from cm_export.report.pareto import choose, front
from cm_export.report.points import Point, Reference, distinct, points_of

SHAPE = SimpleNamespace(layers=4, hidden=64, ffn=256, kv_heads=2, head_dim=16)
FROM_DEMO = {"model": {"source": "demo", "type": "qwen2_vl", "revision": None}}
EVIL = "</script><script>console.log('pwned')</script><img src=x onerror=console.log(1)>\"'&"
_TIMES = ("prefill_ms", "gather_ms", "ms_per_token")


def row(key: str, of_dense: float, ci: tuple[float, float], ms: float | None = 2.0, **more) -> dict:
    """A row as `eval` writes it."""
    spread = {"median": 30.0, "q1": 29.0, "q3": 31.0, "n": 9}
    figures = {"accuracy": 0.9, "ci": [0.8, 0.95], "of_dense": of_dense, "of_dense_ci": list(ci), "n": 400}
    neurons, tokens = more.pop("neurons", "griffin"), more.pop("tokens", "attention")
    share = more.pop("share", 0.6)
    values = {
        "key": key,
        "policies": f"{neurons} + {tokens}",
        "is_random": "random" in (neurons, tokens),
        "neurons": neurons,
        "tokens": tokens,
        "prune_layer": 2,
        "recipe": Recipe().replace(neurons__policy=neurons, tokens__policy=tokens, neurons__share=share).to_dict(),
        "neuron_share": share,
        "token_share": 0.5,
        "kinds": {"word": figures, "sentence": figures},
        "kl": 0.01,
        "top1": 0.99,
        "prefill_ms": spread,
        "gather_ms": spread,
        "ms_per_token": ms and {**spread, "median": ms},
        "image_tokens": 64.0,
        "image_tokens_kept": 32.0,
        "bits_read_per_weight": 32 * share,
        "weight_bytes_read": 4e6 * share,
        "read_exact": True,
    }
    return {**values, **figures, **more}


def dense(ms: float = 9.0) -> dict:
    return row("d", 1.0, (0.99, 1.01), ms, share=1.0) | {"policies": "dense", "neurons": "dense", "tokens": "dense"}


def points(*rows: dict, task: str = "easy-vqa") -> list[Point]:
    return points_of({"task": task, "rows": list(rows)}, SHAPE)


def inputs(*rows: dict, **more) -> page.Inputs:
    environment = {"processor": "P", "cores": 2, "threads": 1, "versions": {"onnx": "1"}, "date": "2026-11-25T01:00:00"}
    report = {"task": "easy-vqa", "rule": "exact match", "n": 400, "environment": environment}
    values = {
        "bundle": Path("demo.plan"), "manifest": {"model": dict(FROM_DEMO["model"])}, "seal": "5ea1" * 16,
        "built": Recipe(), "evals": [report],
        "points": points(*rows), "floor": 0.985, "bench": None, "layers": None, "examples": None,
        "commands": [("accuracy", "cm-export eval demo.plan")], "notes": [],
    }  # fmt: skip
    return page.Inputs(**values | more)


# ---------------------------------------------------------------- which point


def test_the_cheapest_point_whose_lower_bound_holds_the_floor_is_chosen():
    rows = [
        dense(),
        row("a", 1.0, (0.99, 1.0), 3.0),
        row("b", 0.99, (0.985, 1.0), 2.0),
        row("c", 0.9, (0.85, 0.95), 1.0),
    ]
    best = choose(points(*rows), 0.985)
    assert (best.point.key, best.holds, best.holding, best.considered) == ("b", True, 2, 3)
    assert best.decided_by == "decode time per token"


def test_an_interval_that_crosses_the_floor_does_not_hold_it():
    best = choose(points(dense(), row("a", 0.999, (0.9849, 1.01)), row("b", 0.97, (0.96, 0.98))), 0.985)
    assert (best.point.key, best.holds, best.holding) == ("a", False, 0)


def test_dense_and_random_are_never_recommended():
    control = row("r", 1.0, (1.0, 1.0), 0.1, neurons="random", tokens="random")
    assert choose(points(dense(0.1), control), 0.985).point is None
    assert choose(points(dense(0.1), control, row("a", 1.0, (0.99, 1.0), 5.0)), 0.985).point.key == "a"


def test_equal_decode_is_decided_by_prefill_then_bytes_and_unknown_decode_comes_last():
    slow = {"prefill_ms": {"median": 40.0, "q1": 39.0, "q3": 41.0, "n": 9}}
    one, two = row("a", 1.0, (0.99, 1.0), 2.0, **slow), row("b", 1.0, (0.99, 1.0), 2.0)
    assert (choose(points(one, two), 0.9).point.key, choose(points(one, two), 0.9).decided_by) == ("b", "prefill time")
    best = choose(points(two, row("c", 1.0, (0.99, 1.0), 2.0, share=0.4)), 0.9)
    assert (best.point.key, best.decided_by) == ("c", "bytes read per token")
    assert choose(points(row("n", 1.0, (0.99, 1.0), None), one), 0.9).point.key == "a"


def test_a_point_asked_in_two_reports_counts_by_the_worse():
    both = [*points(row("a", 1.0, (0.99, 1.0))), *points(row("a", 0.9, (0.8, 1.0)), task="other")]
    assert not choose(both, 0.985).holds
    assert choose(both, 0.985).considered == 1
    assert choose(both[::-1], 0.985).point.task == "other"


def test_rows_that_two_sweeps_share_are_shown_once():
    assert len(distinct([*points(dense(9.0)), *points(dense(9.1))])) == 1
    assert len(distinct([*points(dense()), *points(dense(), task="other")])) == 2


def test_a_dense_model_that_got_nothing_right_leaves_nothing_to_choose():
    none = {"of_dense": None, "of_dense_ci": None}
    found = inputs(dense() | none, row("a", 0, (0, 0)) | none)
    assert "No point can be recommended" in page.render(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_dominates(values):
    """Against the definition, by all pairs."""
    some = points(*(row(str(n), y / 8, (0, 1), float(x)) for n, (x, y) in enumerate(values)))
    found = front(some, lambda p: p.decode.median)
    wanted = {
        (x, y) for x, y in values if not any((a <= x and b > y) or (a < x and b >= y) for a, b in values)
    }  # fmt: skip
    assert {(p.decode.median, round(8 * p.figures.of_dense)) for p in found} == wanted


def test_random_points_are_not_on_the_front():
    lucky = row("r", 1.0, (0.9, 1.0), 0.1, neurons="random", tokens="random")
    assert [p.key for p in front(points(lucky, row("a", 0.9, (0.8, 1.0))), lambda p: p.decode.median)] == ["a"]


def test_attention_is_a_control_only_beside_other_token_policies():
    assert [p.role for p in points(dense(), row("a", 1.0, (0.9, 1.0)))] == ["dense", "policy"]
    both = points(row("a", 1.0, (0.9, 1.0)), row("b", 1.0, (0.9, 1.0), tokens="overlap"))
    assert [p.role for p in both] == ["attention", "policy"]


def test_bytes_are_those_of_the_rows_and_the_kept_image_cache():
    (p,) = points(row("a", 1.0, (0.9, 1.0), share=0.5))
    assert (p.bits, p.weight_bytes) == (16, 2_000_000)
    assert p.image_kv_bytes == 2 * 4 * 2 * 16 * 4 * 32


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_lie_inside_and_are_few(low, span):
    ticks = charts.Scale(low, low + span, 0, 100).ticks()
    slack = 1e-6 * max(abs(low), span)
    assert 1 <= len(ticks) <= 6
    assert all(low - slack <= t <= low + span + slack for t in ticks)


# ---------------------------------------------------------------- how many questions


def lower_end(n: int, lost: int) -> float:
    return kept_interval(np.array([n - lost, lost, 0, 0]))[0]


@pytest.mark.parametrize("floor", [0.9, 0.95, 0.985])
@pytest.mark.parametrize("kinds", [1, 2, 7])
def test_a_report_asks_enough_by_default_to_show_its_floor_even_if_an_answer_is_lost(floor, kinds):
    n = kinds * enough.to_ask(floor, kinds)
    assert lower_end(n, 1) >= floor
    assert kinds * (enough.to_ask(floor, kinds) - 1) < 20 * kinds or lower_end(n - 2 * kinds, 1) < floor, (
        "and not far more"
    )


def test_too_few_questions_are_told_with_the_number_that_is_needed():
    assert lower_end(100, 0) < 0.985 <= lower_end(144, 0)
    assert enough.too_few(100, 0.985) == (
        "100 questions cannot show a floor of 0.985, even if no answer is lost: 144 or more are needed."
    )
    assert "only if it loses no answer: 286 allow for one" in enough.too_few(144, 0.985)
    assert enough.too_few(286, 0.985) is None
    assert "Not even a million questions" in enough.too_few(10**5, 1.0)


def answered(both: int, lost: int, won: int = 0, wrong: int = 0) -> Point:
    """A point that answered beside dense as counted."""
    right = [True] * both + [False] * lost + [True] * won + [False] * wrong
    of = [True] * (both + lost) + [False] * (won + wrong)
    n, kept = len(right), sum(right) / sum(of)
    interval = kept_interval(np.array([both, lost, won, wrong]))
    found = points(dense() | {"right": of}, row("a", kept, interval) | {"right": right, "n": n})
    return next(p for p in found if p.role == "policy")


def test_a_page_says_why_no_point_holds_the_floor():
    few = enough.why(answered(100, 0), 0.985)
    assert "lost 0 of the 100 answers" in few and "100 questions cannot show" in few and "144" in few
    lossy = enough.why(answered(280, 20, 3), 0.985)
    assert "lost 20 of the 300 answers" in lossy and "got 3 right that dense got wrong" in lossy
    assert "more questions would not help" in lossy
    assert "Not even a million questions" in enough.why(answered(300, 0), 1.0)
    between = enough.why(answered(197, 2), 0.985)
    more = int(re.search(r"about (\d+) questions in all", between)[1])
    assert more > 199 and kept_interval(np.array([197, 2, 0, 0]) * more / 199)[0] >= 0.985
    assert "may settle it" in enough.why(points(dense(), row("a", 0.99, (0.98, 1.0)))[1], 0.985), (
        "no counts in the report"
    )


def test_the_page_and_its_summary_say_why_nothing_holds():
    found = inputs(dense(), points=[*points(dense()), answered(100, 0)])
    assert "100 questions cannot show a floor of 0.985" in page.render(found)
    assert "144 or more are needed" in make.summary(found)["why_not"]
    assert "144 or more are needed" in make.sentence(choose(found.points, 0.985), 0.985)
    held = dataclasses.replace(found, floor=0.9)
    assert make.summary(held)["why_not"] is None and "cannot show" not in page.render(held)


def test_a_kind_of_which_too_few_were_asked_is_not_called_weak():
    few = row("a", 0.99, (0.986, 1.0))
    few["kinds"]["sentence"] = few["kinds"]["sentence"] | {"of_dense": 1.0, "of_dense_ci": [0.9, 1.1], "n": 20}
    text = page.render(inputs(dense(), few))
    assert re.search(r"Too few were asked to judge these kinds by themselves:\s+sentence\.", text)
    assert "reaches below the floor" not in text


# ---------------------------------------------------------------- recipe


def test_the_command_that_spares_a_rebuild_is_whole_and_keeps_a_path_in_one_word():
    built = Recipe()
    asked = built.replace(neurons__share=0.4, tokens__share=0.25)
    assert as_recipe.run_command(asked, Path("my plans/x.plan"), built) == (
        "cm-export run 'my plans/x.plan' --neuron-share 0.4 --token-share 0.25 --image PICTURE --prompt QUESTION"
    )
    assert as_recipe.run_command(built.replace(tokens__prune_layer=1), Path("x.plan"), built) is None


def test_a_calibration_is_found_from_wherever_the_recipe_was_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = Recipe().replace(neurons__policy="glass", calibration="c.safetensors")
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "best.toml"
    file.write_text(as_recipe.recipe_toml(asked, Path("x.plan"), FROM_DEMO))
    assert Path(recipes.load(str(file)).calibration) == tmp_path / "x.plan" / "calibration.safetensors"


def test_the_recipe_on_the_page_builds_what_was_recommended(tmp_path):
    asked = Recipe().replace(model="demo", neurons__share=0.45, neurons__row_norm=True, tokens__policy="overlap")
    (tmp_path / "best.toml").write_text(as_recipe.recipe_toml(asked, Path("x.plan"), FROM_DEMO))
    assert recipes.load(str(tmp_path / "best.toml")) == asked


def test_a_recipe_with_any_text_stays_one_string(tmp_path):
    odd = dataclasses.replace(Recipe(), model='a"b\\c\n[neurons]\x7f\x01é')
    (tmp_path / "best.toml").write_text(as_recipe.recipe_toml(odd, Path("x.plan"), FROM_DEMO))
    assert recipes.load(str(tmp_path / "best.toml")).model == odd.model


def test_only_a_checkpoint_that_can_be_found_again_is_named():
    hub = {"model": {"source": "owner/name", "type": "qwen2_vl", "revision": "abc"}}
    assert 'model = "owner/name"\nrevision = "abc"' in as_recipe.recipe_toml(Recipe(), Path("x.plan"), hub)
    folder = {"model": {"source": "my-finetune", "type": "qwen2_vl", "revision": None}}
    assert "model" not in as_recipe.recipe_toml(Recipe(), Path("x.plan"), folder)
    assert "--model CHECKPOINT_DIRECTORY" in as_recipe.build_command(Recipe(), folder)
    assert "--model" not in as_recipe.build_command(Recipe(), hub)


def test_a_rebuild_is_only_spared_where_nothing_but_shares_differs():
    built = Recipe()
    assert as_recipe.only_shares_differ(built.replace(neurons__share=0.4, tokens__share=0.25), built)
    assert not as_recipe.only_shares_differ(built.replace(neurons__policy="coreinfer"), built)
    assert not as_recipe.only_shares_differ(built.replace(tokens__prune_layer=1), built)


# ---------------------------------------------------------------- layers


def test_attention_and_activation_figures_on_made_up_layers():
    request = Request(numbered(np.array([[False, *[True] * 8, False, False]])), *[None] * 4)
    q, k = np.zeros((4, 11, 8)), np.zeros((2, 11, 8))
    image, top = analysis.attention(q, k, request)  # all alike: every visible token gets the same
    assert image == pytest.approx((8 / 10 + 8 / 11) / 2) and top == pytest.approx(0.25)
    q[:], k[:, 3:5] = 1, 100
    assert analysis.attention(q, k, request) == pytest.approx((1.0, 1.0))
    z = np.zeros((2, 10))
    z[0, :2] = z[1, 2:4] = 1  # two neurons for each token, others for the next
    assert analysis.activation(z) == pytest.approx((1.0, 0.5))


def test_overlap_of_sets_and_of_chance():
    ids = [np.array([[[0, 1, 2, -1]]], np.int32), np.array([[[1, 2, 3, -1]]], np.int32)]
    overlap, chance = analysis._overlap([(i, np.array([3])) for i in ids], 6)
    assert overlap.tolist() == [[0.5]] and chance.tolist() == pytest.approx([0.5 / 1.5])
    assert analysis._overlap([(None, np.array([3]))] * 2, 6) == (None, None)


def test_examples_are_spread_over_kinds_and_always_the_same():
    asked = [Question("ab"[n % 2], (), str(n), ("x",)) for n in range(40)]
    got = examples.pick(asked, 4)
    assert [q.kind for q in got] == ["a", "b", "a", "b"] and got == examples.pick(asked, 4)
    assert len(examples.pick(asked[:3], 10)) == 3 and examples.pick([], 4) == []


# ---------------------------------------------------------------- the page


def evil() -> page.Inputs:
    """A page on which everything that a user or a model writes tries to be a script."""
    said = examples.Said(EVIL, False)
    shown = examples.Example(EVIL, EVIL, (EVIL,), said, said, [], (1, 2))
    rng = np.random.default_rng(0)
    some, pairs = rng.uniform(0.2, 0.9, (4, 3)), rng.uniform(0.3, 0.6, (4, 3))
    rows = [
        dense(),
        row("a", 0.99, (0.986, 1.0)) | {"policies": EVIL},
        row("b", 0.97, (0.95, 0.99), 1.0, tokens="overlap", share=0.4),
        row("r", 0.9, (0.8, 0.95), 1.1, neurons="random", tokens="random", share=0.4),
    ]
    for r in rows:
        r["kinds"] = {EVIL: r["kinds"]["word"], "other": r["kinds"]["word"]}
    found = inputs(
        *rows,
        bundle=Path(EVIL.replace("/", "")),
        commands=[(EVIL, EVIL)],
        notes=[EVIL],
        examples=examples.Examples([shown], 4, 3, 2),
        layers=analysis.Layers(3, some, some, some, some / 2, pairs, np.full(4, 0.25)),
    )
    found.evals[0]["task"] = found.evals[0]["rule"] = EVIL
    found.evals[0]["environment"]["versions"] = {EVIL: EVIL}
    found.manifest["model"]["source"] = EVIL
    return found


def tags(text: str) -> list[tuple[str, dict[str, str]]]:
    """Elements as a parser of HTML sees them: (name, attributes)."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, own: found.append((tag, dict(own)))
    parser.feed(text)
    return found


def test_whatever_a_user_writes_stays_text():
    text = page.render(evil())
    assert "&lt;/script&gt;&lt;script&gt;" in text
    found = tags(text)
    assert [tag for tag, _ in found].count("script") == 1 and "img" not in [tag for tag, _ in found]
    assert not [name for _, own in found for name in own if name.startswith("on")]


def test_nothing_is_loaded_from_elsewhere():
    text = page.render(evil())
    links = [own[name] for _, own in tags(text) for name in ("src", "href", "srcset", "action", "data") if name in own]
    assert links == ["data:,"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text and "unsafe-inline" not in text


def test_the_headline_says_what_to_deploy_or_that_nothing_holds():
    good = page.render(inputs(dense(), row("a", 0.99, (0.986, 1.0))))
    assert "Deploy griffin + attention at 60 % of the neurons and 50 % of the image tokens" in good
    bad = page.render(inputs(dense(), row("a", 0.99, (0.98, 1.0))))
    assert "No measured point holds the floor" in bad and "Nearest of 1: griffin + attention" in bad
    assert "Deploy griffin" not in bad


def test_the_front_is_said_to_leave_random_controls_out():
    lucky = row("r", 1.0, (0.9, 1.0), 0.1, neurons="random", tokens="random")
    text = page.render(inputs(dense(), row("a", 0.99, (0.986, 1.0)), lucky))
    assert "no policy, and not the dense model, is both cheaper and better" in text
    assert "Random controls are drawn beside it but left out of it" in text and "nothing else" not in text


def test_random_choices_that_kept_as_much_are_told_beside_the_recommendation():
    control = row("r", 0.992, (0.98, 1.0), neurons="random", tokens="random")
    assert "Random choices of the same size kept as much (0.992)" in page.render(
        inputs(dense(), row("a", 0.99, (0.986, 1.0)), control)
    )
    worse = control | {"of_dense": 0.98}
    assert "kept as much" not in page.render(inputs(dense(), row("a", 0.99, (0.986, 1.0)), worse))


def test_an_interval_above_one_is_explained_where_there_is_one():
    assert "may reach above 1" in page.render(
        inputs(dense(), row("a", 1.0, (0.986, 1.01)), row("b", 0.9, (0.8, 1.0), 1.0))
    )
    assert "may reach above 1" not in page.render(
        inputs(dense(), row("a", 1.0, (0.986, 1.0)), row("b", 0.9, (0.8, 1.0), 1.0))
    )


def test_a_command_that_made_several_things_is_printed_once():
    told = [("accuracy", "cm-export report x"), ("speed", None), ("this page", "cm-export report x")]
    assert make._once(told) == [("accuracy; this page", "cm-export report x"), ("speed", "not recorded")]


def test_a_recommended_point_that_is_no_faster_says_so():
    assert "no faster than dense" in page.render(inputs(dense(2.0), row("a", 0.99, (0.986, 1.0), 2.5)))
    assert "no faster than dense" not in page.render(inputs(dense(3.0), row("a", 0.99, (0.986, 1.0), 2.5)))


def test_a_kind_below_the_floor_is_named_beside_the_recommendation():
    weak = row("a", 0.99, (0.986, 1.0))
    weak["kinds"]["sentence"] = weak["kinds"]["sentence"] | {"of_dense_ci": [0.9, 1.0]}
    assert re.search(r"below the floor:\s+sentence\.", page.render(inputs(dense(), weak)))


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "r.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        page.write(inputs(dense(), row("a", 1.0, (0.99, 1.0))), tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(demo_bundle, tmp_path_factory) -> tuple[Path, dict]:
    """The one command that suffices, on the demo bundle, and what --json said."""
    folder = tmp_path_factory.mktemp("report")
    asked = ("--task", "easy-vqa", "--limit", "2", "--examples", "2", "--threads", "1")
    done = cm_export("report", demo_bundle, *asked, "--out", folder / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "r.html", json.loads(done.stdout)


def test_one_command_writes_a_page_with_everything(made, demo_bundle):
    file, said = made
    text = file.read_text()
    assert sorted(p.name for p in file.parent.iterdir()) == ["r.eval.json", "r.html"]
    for part in ("decision", "costs", "rows", "layers", "examples", "source"):
        assert f'id="{part}"' in text, part
    assert text.count("data:image/png;base64,") == 2
    assert said["seal"] == Bundle(demo_bundle).seal and said["seal"] in text
    assert len(said["rows"]) == 7 and said["holds"] is False and said["nearest"]["policies"] == "griffin + attention"
    assert "cm-export report" in text and "--limit 2" in text


def test_the_same_reports_give_the_same_bytes(made, demo_bundle, tmp_path):
    evals = made[0].with_name("r.eval.json")
    for name in ("a.html", "b.html"):
        asked = ["--eval", str(evals), "--examples", "1", "--threads", "1", "--out", str(tmp_path / name), "--quiet"]
        assert main(["report", str(demo_bundle), *asked]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_floor_that_is_low_enough_is_held(made, demo_bundle, tmp_path, capsys):
    asked = ["--eval", str(made[0].with_name("r.eval.json")), "--floor", "0.01", "--examples", "0", "--threads", "1"]
    assert main(["report", str(demo_bundle), *asked, "--out", str(tmp_path / "r.html"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] and recipes.from_dict(said["recommended"]["recipe"])
    assert said["decided_by"] == "decode time per token"


def test_the_command_is_on_the_page_once_and_too_few_questions_are_told(made, demo_bundle, tmp_path, capfd):
    text = re.sub(r"<[^>]+>", "", made[0].read_text())
    assert text.count("cm-export report") == 1
    data = tmp_path / "q.jsonl"
    lines = [f'{{"question": "what {what} is present?", "answer": "circle"}}\n' for what in ("shape", "color", "thing")]
    data.write_text("".join(lines))
    asked = ["--data", str(data), "--examples", "0", "--threads", "1", "--out", str(tmp_path / "r.html"), "--json"]
    assert main(["report", str(demo_bundle), *asked]) == 0
    assert "3 questions cannot show a floor of 0.985" in capfd.readouterr().err


def other_seal(report: dict) -> dict:
    return report | {"seal": "0" * 64}


def without_seal(report: dict) -> dict:
    return {k: v for k, v in report.items() if k != "seal"}


def broken_row(report: dict) -> dict:
    return report | {"rows": [{k: v for k, v in r.items() if k != "of_dense_ci"} for r in report["rows"]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_seal, "measured another bundle"),
        (without_seal, "does not say which bundle"),
        (broken_row, "rows are not those of an eval report"),
        (lambda report: [1], "not an eval report"),
        (lambda report: {"rows": []}, "not an eval report"),
        (lambda report: report | {"rows": []}, "no rows"),
    ],
)
def test_a_report_that_is_not_this_bundles_is_one_line_and_code_two(
    change, words, made, demo_bundle, tmp_path, capsys
):  # fmt: skip
    report = json.loads(made[0].with_name("r.eval.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps(change(report)))
    asked = ["--eval", str(tmp_path / "e.json"), "--out", str(tmp_path / "r.html")]
    assert main(["report", str(demo_bundle), *asked]) == 2
    assert re.fullmatch(rf"cm-export: error: [^\n]*e\.json: [^\n]*{words}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--floor", "1.5"), "not above 0 and up to 1"),
        (("--floor", "0"), "not above 0"),
        (("--out", "r.pdf"), "use .html"),
        (("--out", "no/such/r.html"), "no directory"),
        (("--eval", "none.json"), "cannot be read"),
        (("--eval", "text.json"), "is not JSON"),
        (("--bench", "eval.json", "--eval", "eval.json"), "not a bench report"),
        (("--eval", "eval.json", "--eval", "./eval.json"), "given twice"),
        (("--task", "easy-vqa", "--data", "x.jsonl"), "one of the two"),
        (("--eval", "eval.json", "--limit", "3"), "give --task"),
    ],
)
def test_wrong_input_is_one_line_and_code_two(asked, words, made, demo_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("not json")
    shutil.copyfile(made[0].with_name("r.eval.json"), "eval.json")
    assert main(["report", str(demo_bundle), *asked]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


# ---------------------------------------------------------------- several bundles of one checkpoint


def asked_of(bundle: str, right: list[bool], *rows: dict) -> dict:
    """An eval report: `right` of its dense row."""
    answers = dense() | {"right": right, "of_dense": 1.0, "of_dense_ci": [0.9, 1.0]}
    return {
        "task": "t",
        "bundle": bundle,
        "seal": bundle,
        "questions": "q",
        "kinds": ["word"] * 3 + ["sentence"],
        "rows": [answers, *rows],
    }


def test_points_of_another_bundle_are_shares_of_the_first_ones_dense_answers():
    first = asked_of("a", [True, True, True, True])
    other = asked_of(
        "b", [True, False, True, False], row("p", 1.0, (0.9, 1.0)) | {"right": [True, False, False, False]}
    )
    found = points_of(other, SHAPE, "e.json", Reference(first), named=True)
    assert [(p.policies, p.role, p.figures.of_dense) for p in found] == [
        ("dense, auto", "policy", 0.5), ("griffin + attention, auto", "policy", 0.25),
    ]  # fmt: skip
    assert found[0].recipe.neurons.policy == "dense" and found[0].beside_dense == (2, 2, 0, 0)
    assert {k: f.of_dense for k, f in found[0].kinds.items()} == {"word": pytest.approx(2 / 3), "sentence": 0.0}
    with pytest.raises(InputError, match="its questions are not those"):
        points_of(other | {"questions": "others"}, SHAPE, "e.json", Reference(first), named=True)


@pytest.fixture(scope="module")
def across(demo_bundle, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A page over two precisions of the demo model: its file, the other bundle, what --json said."""
    folder, low = tmp_path_factory.mktemp("across"), low_bits(demo_bundle, "int8")
    asked = ("--task", "easy-vqa", "--limit", "2", "--examples", "1", "--threads", "1", "--floor", "0.01")
    done = here("report", demo_bundle, "--beside", low, *asked, "--out", folder / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "r.html", low, json.loads(done.stdout)


def test_a_page_over_several_precisions_has_one_front_of_bits(across):
    file, low, said = across
    assert sorted(p.name for p in file.parent.iterdir()) == ["r.eval.1.json", "r.eval.json", "r.html"]
    bits = {r["policies"]: r["bits"] for r in said["rows"] if r["role"] in ("dense", "policy")}
    assert bits["dense, fp32"] == 32 and 8 < bits["dense, int8"] < 10
    griffin = [(r["neuron_share"], r["bits"]) for r in said["rows"] if r["policies"] == "griffin + attention, fp32"]
    assert len(griffin) == 3 and sorted(griffin) == sorted(griffin, key=lambda p: p[1]) and griffin[0][1] < 32
    text = file.read_text()
    assert "bits that a decoded token reads for each weight" in text and "measured one after the other" in text
    assert str(low) in text and Bundle(low).seal[:12] in text
    assert said["recommended"] and recipes.from_dict(said["recommended"]["recipe"])


def test_reports_of_several_bundles_are_told_apart_by_their_seals(across, demo_bundle, tmp_path, capsys):
    file, low, said = across
    own, other = (file.with_name(name) for name in ("r.eval.json", "r.eval.1.json"))
    basic = ["report", str(demo_bundle), "--examples", "0", "--threads", "1", "--out", str(tmp_path / "r.html")]
    assert main([*basic, "--beside", str(low), "--eval", str(other), "--eval", str(own), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert sorted(r["key"] for r in again["rows"]) == sorted(r["key"] for r in said["rows"])
    for more, words in (
        (["--beside", str(low), "--eval", str(other)], "nobody asked"),
        (["--eval", str(own), "--eval", str(other)], "measured another bundle"),
        (["--beside", str(demo_bundle), "--eval", str(own)], "is given twice"),
        (["--beside", str(tmp_path), "--eval", str(own)], "manifest"),
    ):
        assert main([*basic, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err


# ---------------------------------------------------------------- in a browser

needs_chromium = pytest.mark.skipif(
    chromium.binary() is None,
    reason=f"no {' or '.join(chromium.NAMES)} in PATH; install one (apt-get install chromium)",
)


@needs_chromium
@pytest.mark.parametrize("width", [390, 1366])
def test_a_browser_shows_the_page_whole_without_errors_or_requests(width, tmp_path):
    found = evil()
    page.write(found, tmp_path / "r.html")
    with chromium.Page(width) as tab:
        tab.open(tmp_path / "r.html")
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert "of the image tokens" in tab.run("document.querySelector('h1').innerText")
        marks, rows = tab.run("document.querySelectorAll('svg .mark[data-tip]').length"), "[data-of=''] tbody tr"
        assert marks == 2 * 4 + 5 * 4  # decode time and bits differ; five series over four layers
        # Sorting, filtering, hovering: the script runs under its own policy.
        before = tab.run(f'document.querySelectorAll("{rows}").length')
        tab.run("document.querySelectorAll('[data-of=\"\"] thead button')[1].click()")
        shares = "[...document.querySelectorAll(\"[data-of=''] tbody tr\")].map(r => Number(r.cells[1].dataset.value))"
        assert tab.run(shares) == [0.9, 0.97, 0.99, 1.0]
        assert before == 4 + len({(p.neuron_share, p.token_share) for p in found.points})
        tab.run("document.querySelectorAll('[data-kind]')[1].click()")
        assert tab.run("[...document.querySelectorAll('[data-of]')].map(t => t.hidden)") == [True, False, True]
        tab.run("document.querySelector('.mark[data-tip]').focus()")
        assert "image tokens" in tab.run("document.getElementById('tip').textContent")
        assert not tab.run("document.getElementById('tip').hidden")
        assert tab.complaints == []
        assert [r for r in tab.requests if not r.startswith("data:")] == [(tmp_path / "r.html").as_uri()]


@needs_chromium
def test_the_recipe_of_the_page_is_saved_as_a_file(tmp_path):
    found = inputs(dense(), row("a", 0.99, (0.986, 1.0)))
    page.write(found, tmp_path / "r.html")
    with chromium.Page() as tab:
        tab.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        tab.open(tmp_path / "r.html")
        tab.run("document.querySelector('button.save').click()")
        end = time.monotonic() + 20
        while not (tmp_path / "best.toml").exists():
            tab.run("new Promise(done => setTimeout(done, 50))")
            assert time.monotonic() < end, "nothing was saved"
        assert tab.complaints == []
    assert recipes.load(str(tmp_path / "best.toml")) == found.points[1].recipe.replace(model="demo")


@needs_chromium
def test_a_table_wider_than_the_screen_shows_that_it_goes_on(tmp_path):
    page.write(inputs(dense(), row("a", 0.99, (0.986, 1.0))), tmp_path / "r.html")
    shown = "getComputedStyle(document.querySelector('.slide')).display"
    sides = "['more-left', 'more-right'].filter(c => document.querySelector('[data-of=\"\"]').classList.contains(c))"
    for width, wide in ((390, True), (1366, False)):
        with chromium.Page(width) as tab:
            tab.open(tmp_path / "r.html")
            assert (tab.run(shown), tab.run(sides)) == (("block", ["more-right"]) if wide else ("none", []))
            if wide:
                tab.run(
                    "new Promise(done => { const t = document.querySelector('[data-of=\"\"]'); "
                    "t.addEventListener('scroll', () => setTimeout(done, 50)); t.scrollLeft = 1e4; })"
                )
                assert tab.run(sides) == ["more-left"]
                name = "document.querySelector('[data-of=\"\"] tr.best td').getBoundingClientRect().left"
                assert 0 <= tab.run(name) < 60, "the name of the row stays in sight"
