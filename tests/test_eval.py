"""The easy-VQA task: its sentences and labels, and that a wrong model would show in the figures."""

import json

import pytest
from conftest import cm_export

from cm_export.evals import easy_vqa
from cm_export.evals._controls import wilson


def test_labels_follow_from_the_official_answers():
    pairs = [
        ("what shape is in the image?", "circle"),
        ("is there a red shape?", "no"),
        ("is a teal shape present?", "yes"),
    ]
    assert easy_vqa.label(pairs) == ("circle", "teal")
    assert easy_vqa.label([("is there not a circle?", "no")]) is None  # a circle, of any colour
    assert easy_vqa.label([("what is the blue shape?", "triangle")]) == ("triangle", "blue")
    assert easy_vqa.label([("what color is the circle?", "gray")]) == ("circle", "gray")


def test_sentences_state_the_answer_and_the_picture():
    seen = ("circle", "teal")
    assert easy_vqa.sentence("is there a red shape?", "no", seen) == "no , there is a teal circle in the image ."
    assert easy_vqa.sentence("what shape is it?", "circle", seen) == "the shape in the image is a teal circle ."
    assert easy_vqa.sentence("what color is it?", "teal", seen) == "the color of the circle is teal ."


def test_the_whole_official_test_split_is_asked():
    assert len(easy_vqa.questions("word")) == 9673
    assert len(easy_vqa.questions("sentence")) == 8879


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_interval_equals_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


@pytest.fixture(scope="module")
def report(demo_bundle):
    done = cm_export("eval", demo_bundle, "--task", "easy-vqa", "--limit", "60", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_demo_bundle_answers_and_keeps_its_accuracy_at_the_recipes_budget(report):
    """n = 60 of each kind; the measured values are .998 and .99, so falling below .95 is not chance."""
    for kind in ("word", "sentence"):
        assert report["dense"]["kinds"][kind]["accuracy"] >= 0.95
        assert report["sparse"]["kinds"][kind]["of_dense"] >= 0.95
    assert report["sparse"]["token_share"] == 0.5 and report["sparse"]["neuron_share"] == 614 / 1024
    assert report["random"]["token_share"] == 0.5 and report["random"]["neuron_share"] == 614 / 1024


def test_random_controls_and_lower_budgets_stand_beside(report):
    names = [row["answered by"] for row in report["rows"]]
    assert names[0] == "dense" and sum("random + random" in n for n in names) == 3 and len(names) == 7
    low = [r for r in report["details"] if "20 % neurons" in r["name"]]
    assert all(r["kinds"]["sentence"]["accuracy"] < 0.9 for r in low), "a budget this small must cost something"
