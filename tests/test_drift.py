"""Drift: what a recipe changes in the model's own text is measured by every build, told where it is much, and can be required."""

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import here
from random_models import copy

from cm_export.base.errors import GateFailed
from cm_export.base.metrics import divergences, wilson
from cm_export.build import drift
from cm_export.bundle.bundle import read_manifest
from cm_export.host.decode import decode, forced, recorded
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Recipe
from cm_export.source.probe import probe

SPARSE = Recipe().replace(neurons__policy="griffin", neurons__share=0.1, tokens__prune_layer=1)
WHOLE = SPARSE.replace(neurons__share=1.0, tokens__share=1.0)


def runner_of(x, recipe):
    """The portable graphs of a random checkpoint that has no tokenizer."""
    graphs = x.graphs(recipe)
    parts = {n: getattr(x, n) for n in ("weights", "family", "shape", "tower", "config", "path")}
    parts["embedding"] = x.weights[x.family.embedding]
    bundle = SimpleNamespace(
        **parts, manifest={}, calibration=None, packed=None, recipe=recipe, processor=lambda name: None
    )
    return Runner(bundle, 1, recipe, lambda name: copy(graphs[name]))


def quiet(*_):
    return None


@pytest.fixture(scope="module")
def x(exported):
    return exported(0)


def test_a_recipe_that_keeps_everything_agrees_everywhere(x, monkeypatch):
    monkeypatch.setattr(drift, "prunes", lambda recipe: True)  # such a recipe is not measured otherwise
    found = drift.measure(runner_of(x, WHOLE), x.config, quiet)
    assert found.agreement == 1 and found.kl < 1e-9 and found.places >= 8 and found.prompts == 8


def test_the_figures_are_those_of_both_models_along_the_dense_text(x):
    """The same, asked in another way: both models are given the dense model's own tokens one by one."""
    runner = runner_of(x, SPARSE)
    found = drift.measure(runner, x.config, quiet)
    dense, sparse = [], []
    for request in drift.made_up(runner, x.config):
        tokens = list(
            runner.tokens(runner.prefill(request, Budget(dense=True)), drift.STEPS, frozenset(x.shape.stop_ids))
        )
        for budget, into in ((Budget(dense=True), dense), (Budget(), sparse)):
            logits = []
            row = runner.prefill(request, budget).row(choose=recorded(forced(tokens), logits), limit=len(tokens) + 1)
            assert [t for _, t in decode(runner.backend, [row])] == tokens
            into += logits if len(tokens) < drift.STEPS else logits[:-1]
    dense, sparse = np.stack(dense), np.stack(sparse)
    same = dense.argmax(-1) == sparse.argmax(-1)
    assert found.places == len(dense) and found.agreement == pytest.approx(same.mean(), abs=1e-9)
    assert found.kl == pytest.approx(divergences(dense, sparse).mean(), rel=1e-4)
    assert found.agreement < drift.WARN_BELOW and found.ci == wilson(int(same.sum()), len(same))


def test_a_model_that_nothing_is_pruned_of_is_not_asked():
    dense = Recipe().replace(neurons__policy="dense", tokens__policy="dense")
    for recipe in (dense, WHOLE, dense.replace(tokens__policy="random", tokens__share=1.0)):
        found = drift.measure(SimpleNamespace(recipe=recipe), {}, None)
        assert (found.agreement, found.places) == (1.0, 0) and "not measured" in found.text
        assert drift.notes(found.to_dict(), recipe)[0].startswith("nothing is pruned")
        drift.require(found.to_dict(), 1.0)
    assert drift.prunes(SPARSE) and drift.prunes(WHOLE.replace(tokens__budget="count", tokens__count=3))


def test_no_prompt_follows_once_the_time_is_up_or_enough_places_were_compared(monkeypatch):
    logits = np.eye(4, dtype=np.float32)
    monkeypatch.setattr(drift, "_beginnings", lambda *_: ("made up", frozenset(), itertools.repeat(None)))
    monkeypatch.setattr(drift, "_written", lambda *_: ([1, 2, 3], logits))
    monkeypatch.setattr(drift, "teacher_forced", lambda *_: logits)
    prefilled = SimpleNamespace(row=lambda: None)
    backend = SimpleNamespace(drop=lambda *_: None)
    runner = SimpleNamespace(recipe=SPARSE, backend=backend, prefill=lambda *_: prefilled)
    assert drift.measure(runner, {}, quiet, seconds=0).prompts == 1
    assert drift.measure(runner, {}, quiet).places == drift.PLACES


def test_a_place_is_every_choice_of_the_dense_model_a_stop_included(x):
    runner = runner_of(x, SPARSE)
    request = next(drift.made_up(runner, x.config))

    def read(*how, **more):
        ids, dense = drift._written(runner, request, *how, **more)
        return dense, drift.teacher_forced(runner.backend, runner.prefill(request, Budget()).row(), ids)

    written = list(runner.tokens(runner.prefill(request, Budget(dense=True)), drift.STEPS, frozenset()))
    for stop, places in ((frozenset(), drift.STEPS), (frozenset(written[:1]), 1), (frozenset(written), 1)):
        dense, sparse = read(stop)
        assert dense.shape == sparse.shape == (places, x.shape.vocab)
        assert dense.argmax(-1).tolist() == written[:places]
    dense, sparse = read(frozenset(), deadline=0)
    assert dense.shape == sparse.shape == (drift.LEAST, x.shape.vocab)


def test_prompts_that_do_not_fit_are_left_out(x):
    runner = runner_of(x, SPARSE)
    length = len(probe(x.shape, x.tower, x.config).ids)
    runner.bundle.shape = dataclasses.replace(x.shape, max_positions=length)
    found = drift.measure(runner, x.config, quiet)
    assert found.agreement is None and not found.gates()
    with pytest.raises(GateFailed, match="was not measured"):
        drift.require(found.to_dict(), 0.1)
    runner.bundle.shape = dataclasses.replace(x.shape, max_positions=length + 1)
    assert drift.measure(runner, x.config, quiet).places == 8  # one token fits after each prompt


@pytest.mark.parametrize(
    "encode", [lambda *_: np.zeros(0, np.int64), lambda *_: np.array([10**6])], ids=["none", "too large"]
)
def test_prompts_that_the_tokenizer_cannot_write_give_way_to_random_words(x, encode):
    runner = runner_of(x, SPARSE)
    runner.chat = SimpleNamespace(encode=encode, stop_ids=frozenset([2]))
    runner.picture_rule = x.tower.rule({})
    about, stop, requests = drift._beginnings(runner, x.config)
    assert about == "random words: no built-in prompt fits" and stop == frozenset(x.shape.stop_ids)
    assert next(requests).image_tokens > 0


# ---------------------------------------------------------------- builds


def test_a_bundle_says_how_far_it_is_from_dense_and_so_does_inspect(demo_bundle):
    found = read_manifest(demo_bundle)["drift"]
    assert found["agreement"] > 0.8 and found["places"] > 100 and "made-up picture" in found["text"]
    told = json.loads(here("inspect", demo_bundle, "--json").stdout)
    assert told["drift"] == found
    assert [g["value"] for g in told["gates"] if g["name"] == "drift: top-1 agreement"] == [found["agreement"]]


def test_what_was_not_agreed_to_leaves_the_old_bundle(bare_checkpoint, bare_bundle, tmp_path):
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(bare_bundle.with_name(name), tmp_path / name)
    out = tmp_path / "x.plan"
    before = (out / "manifest.json").read_bytes()
    build = ["build", "--model", bare_checkpoint, "--out", out, "--neurons", "griffin", "--prune-layer", "1"]
    done = here(*build, "--neuron-share", "0.05", "--require-agreement", "0.99", "--quiet")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "below the required 0.99" in done.stderr
    assert (out / "manifest.json").read_bytes() == before
    done = here(*build, "--neuron-share", "0.05")
    assert done.returncode == 0 and "warning: the pruned model's next token is the dense model's at 0." in done.stdout
    assert read_manifest(out)["drift"]["text"].count("random words: has no tokenizer") == 1


@pytest.mark.parametrize("model", ["sees", "reads text only"])
def test_neurons_that_nobody_asked_to_prune_stay(model):
    """No set of neurons per answer that was measured holds a real language model: docs/quality.md."""
    shape = SimpleNamespace(sees=model == "sees", whole_layers=0, weights=10**6, largest=(0, 0))
    assert Recipe().for_model(shape).neurons.policy == "dense"
    for asked in ({"policy": "griffin"}, {"share": 0.5}, {"fill": "prompt"}):
        recipe = Recipe().replace(**{f"neurons__{k}": v for k, v in asked.items()})
        assert recipe.for_model(shape).neurons == recipe.neurons
    assert Recipe().for_model(shape).tokens.policy == ("spread_keys" if shape.sees else "dense")
