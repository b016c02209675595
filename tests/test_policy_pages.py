"""The pages about policies show the committed figures, and the figures say what the docs claim of them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from _page import into

ROOT = Path(__file__).parent.parent
PAGES = {  # bench -> (report, page)
    "policies": ("scenes.json", "policies.md"),
    "policies llava": ("scenes-llava.json", "policies.md"),
    "matching": ("matching.json", "policies.md"),
    "neuron_policies": ("neurons.json", "neurons.md"),
}


BOTH = ("policies", "policies llava")  # the same measurements of two architectures


def bench(name):
    name = name.split()[0]
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def report(name):
    return json.loads((ROOT / "benchmarks" / "policies" / PAGES[name][0]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_committed_figures(name):
    page = (ROOT / "docs" / PAGES[name][1]).read_text(encoding="utf-8")
    found = report(name)
    assert into(page, bench(name).tables(found)) == page
    row = found["joint" if name in BOTH else "rows"][1]
    row["of_dense"] += 0.0123
    assert into(page, bench(name).tables(found)) != page, "another figure makes another page"


def test_the_page_on_thresholds_shows_the_committed_figures_and_random_channels_lose_the_model():
    found = json.loads((ROOT / "benchmarks" / "quality" / "active.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "active.md").read_text(encoding="utf-8")
    assert into(page, {"table": bench("active").table(found)}) == page
    for bundle in found["bundles"]:
        drawn = [row for row in bundle["rows"] if "random" in row]
        assert [(r["ffn"], r["rest"]) for r in drawn] == list(bench("active").RANDOM)
        assert all(row["random"]["ci"][1] < row["own"]["ci"][0] / 2 for row in drawn)
        bits = [row["bits_read_per_weight"] for row in bundle["rows"]]
        assert bits[0] == max(bits) and bundle["rows"][0]["read_exact"]
        assert all(row["read_exact"] == (bundle["precision"] != "fp32") for row in bundle["rows"][1:])


def test_the_page_shows_both_architectures_beside_each_other():
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    both = [report(name) for name in BOTH]
    assert [r["model"] for r in both] == list(bench("policies").MODELS)
    assert into(page, bench("policies").beside(both)) == page
    both[1]["joint"][1]["of_dense"] += 0.0123
    assert into(page, bench("policies").beside(both)) != page


def of_dense(found, part, policies, **shares):
    """The figure of a row of the report, by its shares (0 to 1) of FFN bytes or tokens."""
    rows = [r for r in found[part] if r["policies"] == policies]
    return next(r["of_dense"] for r in rows if all(abs(r[k] - v) < 0.02 for k, v in shares.items()))


@pytest.mark.parametrize("name", BOTH)
def test_what_the_page_says_of_both_architectures_holds_on_each(name):
    found = report(name)
    assert of_dense(found, "tokens", "dense + spread_keys", token_share=0.5) >= 0.99, "the default of a small model"
    for policy in ("glass", "glass_rank", "predicted", "active"):
        assert of_dense(found, "neurons", f"{policy} + dense", ffn_bytes_share=0.4) >= 0.99
    griffin, paper, chance = (
        of_dense(found, "neurons", f"{p} + dense", ffn_bytes_share=0.4) for p in ("griffin", "coreinfer", "random")
    )
    assert 0.99 > griffin > paper > chance
    for share in bench(name).TOKENS:
        drawn = of_dense(found, "tokens", "dense + random", token_share=share)
        for policy in ("overlap", "anchor", "attention"):
            assert of_dense(found, "tokens", f"dense + {policy}", token_share=share) < drawn


def test_what_the_page_says_of_one_architecture_does_not_hold_on_the_other():
    qwen, llava = (report(name) for name in BOTH)
    cut = {"ffn_bytes_share": 0.43, "token_share": 0.25}
    assert of_dense(qwen, "active", "active + spread_keys", **cut) >= 0.985
    assert of_dense(llava, "active", "active + spread_keys", **cut) < 0.985
    half = {"token_share": 0.5}
    assert (
        of_dense(llava, "tokens", "dense + attention", **half)
        < 0.5
        < of_dense(qwen, "tokens", "dense + attention", **half)
    )
    few = {"token_share": 0.05}
    for found, ahead, behind in ((qwen, "spread_keys", "spread"), (llava, "spread", "spread_keys")):
        assert of_dense(found, "tokens", f"dense + {ahead}", **few) > of_dense(
            found, "tokens", f"dense + {behind}", **few
        )


@pytest.mark.parametrize("name", BOTH)
def test_the_recipe_holds_the_floor_and_beats_both_controls(name):
    dense, default, *controls = report(name)["joint"]
    assert dense["policies"] == "dense" and default["policies"] == "griffin + spread_keys"
    assert default["token_share"] == pytest.approx(0.25) and default["ffn_bytes_share"] <= 0.601
    assert default["of_dense"] >= 0.985
    assert {c["policies"] for c in controls} == {"random + random", "griffin + attention"}
    for control in controls:
        assert control["of_dense_ci"][1] < default["of_dense_ci"][0], "outside the interval"
        assert control["token_share"] == pytest.approx(default["token_share"], abs=0.01)


@pytest.mark.parametrize("name", BOTH)
def test_at_least_six_policies_of_each_kind_at_four_budgets(name):
    found = report(name)
    for part, share, budgets in (("neurons", "ffn_bytes_share", 4), ("tokens", "token_share", 4)):
        rows = [r for r in found[part] if r["policies"] != "dense"]
        cells = {}
        for r in rows:
            cells.setdefault(r[part], set()).add(round(r[share], 2))
        assert len(cells) >= 6 and "random" in cells
        assert all(len(c) >= budgets for c in cells.values()), cells


@pytest.mark.parametrize(("name", "shares"), [("policies", (0.53, 0.43)), ("policies llava", (0.53,))])
def test_thresholds_keep_the_model_at_half_of_the_bytes_with_and_without_a_token_cut(name, shares):
    rows = {(r["policies"], round(r["ffn_bytes_share"], 2)): r for r in report(name)["active"]}
    assert set(shares) <= set(bench(name).ACTIVE)
    for share in shares:
        whole, cut, control = (rows[f"active + {t}", share] for t in ("dense", "spread_keys", "attention"))
        assert whole["of_dense"] >= 1.0 and whole["token_share"] == 1
        assert cut["of_dense"] >= 0.985 > control["of_dense"] and cut["token_share"] == pytest.approx(0.25)
        for pair, ours in (("random + dense", whole), ("random + random", cut)):
            assert rows[pair, share]["of_dense_ci"][1] < ours["of_dense_ci"][0]
