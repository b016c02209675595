"""The race against peers: who answers when, what the page says of a report, and that nothing is measured that was not made."""

import argparse
import copy
import json
from pathlib import Path

import bench_peers
import pytest
from _page import into
from peers import page
from peers.contestants import CONTESTANTS, PAIRS, order

from cm_export.base.errors import InputError

ROOT = Path(__file__).parent.parent


def row(name, picture, prompt, decode):
    times = {"picture_ms": picture, "prompt_ms": prompt, "first_ms": picture + prompt, "decode_ms": decode}
    times["answer_ms"] = picture + prompt + 10 * decode
    out = {name: page.quartiles([0.99 * t, t, 1.01 * t]) for name, t in times.items()}
    return {"name": name, "versions": {"x": "1"}, "n": 3, "prompt_tokens": 40, "peak_memory_mb": 50, "load_s": 1} | out


@pytest.fixture
def report():
    sizes = {"hidden": 8, "ffn": 16, "layers": 2, "vocab": 99}
    where = {"processor": "P", "threads": 2, "cores": 2, "date": "2026-01-02T03"}
    rows = [row("cm-export int4, dense", 200, 50, 4), row("OpenVINO int4", 100, 100, 8)]
    out = {"sizes": {"mid": sizes}, "environment": where, "contestants": rows, "pixels": 448, "tokens": 11}
    return out | {"others_cores": 0.0, "load_average_before": 0.0, "left_out": {"A": "gone"}, "command": "c"}


def test_everybody_answers_once_a_round_and_nobody_always_first():
    rounds = [order(list("abcde"), turn) for turn in range(10)]
    assert all(sorted(r) == list("abcde") for r in rounds) and {r[0] for r in rounds} == set("abcde")


def test_a_loss_is_named_with_the_phase_it_comes_from(report):
    said = page.text(report)
    assert "picture x2.00" in said and "decode x" not in said
    assert "picture +100 ms, prompt -50 ms, decode -40 ms" in said and "| A | left out: gone |" in said


def test_a_difference_within_the_quartiles_is_no_loss(report):
    report["contestants"][0] = row("cm-export int4, dense", 100.5, 100, 8)
    said = page.text(report)
    assert "| ~ 1.00 |" in said and "nothing (where quartiles are apart)" in said


def test_a_busy_machine_is_said_to_be_one(report):
    assert "otherwise idle" in page.text(report)
    assert "**busy**" in page.text(report | {"others_cores": 1.5})


def test_pairs_are_contestants():
    assert {name for pair in PAIRS for name in pair} <= {c.name for c in CONTESTANTS}


def test_each_question_is_new():
    asked = [bench_peers.question(turn, 448, 64) for turn in range(20)]
    assert len({q["prompt"] for q in asked}) == len({q["seed"] for q in asked}) == 20


def test_what_was_not_made_is_not_measured(tmp_path):
    how = {"only": [""], "large": False, "threads": 2, "repeats": 1, "tokens": 2, "measure_only": True}
    with pytest.raises(InputError, match="not made yet"):
        bench_peers.race(argparse.Namespace(folder=tmp_path, **how))


def test_the_page_shows_the_committed_figures():
    found = json.loads((ROOT / "benchmarks" / "peers.json").read_text(encoding="utf-8"))
    shown = (ROOT / "docs" / "race.md").read_text(encoding="utf-8")
    assert into(shown, {"race": page.text(found)}) == shown
    other = copy.deepcopy(found)
    other["contestants"][0]["answer_ms"]["median"] += 100
    assert into(shown, {"race": page.text(other)}) != shown
