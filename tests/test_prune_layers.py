"""Where to cut: the earliest layer as good as the best, measured with the cut that a recipe would make, never guessed."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_export.base.errors import InputError
from cm_export.bundle.calibration import Calibration
from cm_export.calibrating import prune_layers
from cm_export.recipe.recipe import Recipe, Tokens

CASES = settings(max_examples=60, deadline=None)


def calibrated(kl, policy="spread_keys", shares=(0.25, 0.5), layers=None):
    kl, nothing = np.array(kl, np.float32), np.zeros((1, 1), np.float32)
    layers = np.arange(1, len(kl) + 1, dtype=np.int32) if layers is None else np.array(layers, np.int32)
    about = {"ran": {"token_policy": policy}}
    order = np.zeros((1, 1), np.int32)
    return Calibration(
        nothing, nothing, nothing, nothing, nothing[0], order, about, layers, np.array(shares, np.float32), kl
    )


@pytest.mark.parametrize(
    ("column", "layer"),
    [
        ([0.31, 0.12, 0.115, 0.4], 2),  # within a tenth of the best, and earlier
        ([0.31, 0.2, 0.1, 0.4], 3),
        ([0.0008, 0.0, 0.0], 1),  # a thousandth of a nat is nothing
        ([0.5], 1),
    ],
)
def test_the_earliest_layer_within_reach_of_the_best_is_taken(column, layer):
    assert prune_layers.best(calibrated([[v, 9 - v] for v in column]), 0.3) == layer


@CASES
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0.01, 1))
def test_no_earlier_layer_is_as_good_and_the_chosen_one_is(column, share):
    found = prune_layers.best(calibrated([[v, v] for v in column]), share)
    limit = min(column) * (1 + prune_layers.SLACK) + prune_layers.LEAST
    assert column[found - 1] <= limit * (1 + 1e-6)
    assert all(v > limit * (1 - 1e-6) for v in column[: found - 1])


def test_the_column_of_the_nearest_share_decides():
    calibration = calibrated([[0.9, 0.0], [0.0, 0.9]], layers=[3, 7])
    assert [prune_layers.best(calibration, s) for s in (0.1, 0.3, 0.45, 1.0)] == [7, 7, 3, 3]


@pytest.mark.parametrize("layers", range(2, 100))
def test_candidates_lie_within_the_model_and_are_few(layers):
    found = prune_layers.candidates(layers)
    assert found[0] == 1 and found[-1] == layers - 1 and len(found) <= prune_layers.MOST_LAYERS
    assert found == sorted(set(found))


def test_a_recipe_gets_the_calibrated_layer_and_says_it():
    recipe = Recipe().replace(calibration="c", tokens__prune_layer=0, tokens__share=0.25)
    found = prune_layers.resolve(recipe, calibrated([[0.9, 0], [0.1, 0]]))
    assert found.to_dict()["tokens"]["prune_layer"] == 2
    assert found == recipe.replace(tokens__prune_layer=2)
    given_layer = Recipe().replace(tokens__prune_layer=3)
    assert prune_layers.resolve(given_layer, None) is given_layer


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (None, "did not measure where to cut"),
        (calibrated(np.zeros((0, 2))), "did not measure where to cut"),
        (calibrated([[0.1, 0.1]], policy="value"), "measured the token policy 'value', not 'spread_keys'"),
    ],
)
def test_a_layer_that_nobody_measured_is_refused(calibration, says):
    with pytest.raises(InputError, match=says):
        prune_layers.resolve(Recipe().replace(calibration="c", tokens__prune_layer=0), calibration)


def test_every_layer_is_measured_with_its_own_cut_on_prompts_with_pictures(monkeypatch):
    """A stand-in runner whose logits say which layer and share they were asked with."""
    cuts = []

    def runner_of(layer):
        def prefill(_request, budget):
            return SimpleNamespace(row=lambda: 0.0 if budget.dense else 10 * layer + budget.token_share)

        shape = SimpleNamespace(layers=4)
        return SimpleNamespace(prefill=prefill, bundle=SimpleNamespace(shape=shape), backend=None)

    def with_policies(_runner, recipe):
        cuts.append(recipe)
        return runner_of(recipe.tokens.prune_layer)

    def teacher_forced(_backend, value, ids):
        """Logits before each of these tokens, and after the last."""
        return np.full((len(ids) + 1, 3), value)

    monkeypatch.setattr(prune_layers, "with_policies", with_policies)
    monkeypatch.setattr(prune_layers, "teacher_forced", teacher_forced)
    answers = [
        (SimpleNamespace(image_tokens=0), np.arange(3)),
        (SimpleNamespace(image_tokens=9), np.arange(2)),
        (SimpleNamespace(image_tokens=9), np.arange(0)),
        (SimpleNamespace(image_tokens=4), np.arange(5)),
    ]

    def judge(p, q):
        assert p.shape == q.shape and not p.any()
        return q[:, 0]

    tokens = Tokens(policy="value", budget="knee")
    found = prune_layers.measure(runner_of(0), answers, tokens, judge, lambda *_: None)
    assert [(r.tokens.policy, r.tokens.prune_layer, r.tokens.budget, r.neurons.policy) for r in cuts] == [
        ("value", layer, "share", "dense") for layer in (1, 2, 3)
    ]
    assert found["prune_layers"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found["prune_kl"], [[10 * n + s for s in prune_layers.SHARES] for n in (1, 2, 3)])
    none = prune_layers.measure(runner_of(0), answers[:1], tokens, judge, lambda *_: None)
    assert none["prune_layers"].shape == (0,) and none["prune_kl"].shape == (0, len(prune_layers.SHARES))
