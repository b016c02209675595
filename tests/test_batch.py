"""Requests that decode together: each gets the tokens that it gets alone, whoever joins, leaves or reads beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
from random_models import SEEDS, patch_grids, prompt, request_of
from test_predicted import RECIPE, layered  # noqa: F401 - a fixture

from cm_export.backends.onnxruntime.backend import Rows
from cm_export.host import decode as decoding
from cm_export.host.decode import Batch, decode, greedy
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Recipe

NEW = 9
RECIPES = {
    "cut": {"tokens__prune_layer": 1},
    "index": {"tokens__prune_layer": 1, "tokens__cache": "index"},
    "quota": {"tokens__prune_layer": 1, "tokens__quota": "each", "tokens__first": "spread", "tokens__first_share": 0.9},
    "fill": {"tokens__prune_layer": 1, "tokens__cache": "index", "neurons__fill": "prompt"},
    "neurons only": {"tokens__policy": "dense", "neurons__policy": "coreinfer"},
    "tokens only": {"tokens__prune_layer": 1, "neurons__policy": "dense"},
}
# (pictures as merged rows and columns, words, budget): two pictures, none, long and short, each with a budget of its own.
ASKED = (
    (((3, 4), (2, 2)), 3, Budget(neuron_share=0.3, token_share=0.4)),
    ((), 2, Budget(neuron_share=0.7)),
    (((5, 5),), 20, Budget(dense=True)),
    (((1, 2),), 1, Budget(neuron_share=1.0, token_share=1.0)),
    (((2, 6),), 11, Budget(token_share=0.5)),
)


def runner_of(x, recipe):
    """A runner over graphs that were not written into a bundle."""
    runner = object.__new__(Runner)
    parts = {n: getattr(x, n) for n in ("shape", "family", "tower", "weights")}
    parts["embedding"] = x.weights[x.family.embedding]
    runner.bundle = SimpleNamespace(**parts, calibration=None, recipe=recipe, path=x.path)
    runner.recipe, runner.backend = recipe, x.backend(recipe)
    return runner


def rows_of(x, runner, seed):
    """The five requests after their prefills; budgets that the recipe does not know are left out."""
    rng, out = np.random.default_rng(seed), []
    for layout, words, budget in ASKED:
        ids = prompt(x.shape, list(layout), rng, words)
        images = int((ids == x.shape.image_token).sum())
        embeds = rng.standard_normal((images, x.shape.hidden)).astype(np.float32)
        neurons = None if runner.recipe.neurons.policy == "dense" else budget.neuron_share
        tokens = None if runner.recipe.tokens.policy == "dense" else budget.token_share
        known = Budget(budget.dense, None if budget.dense else neurons, None if budget.dense else tokens)
        request = request_of(x, ids, patch_grids(x, layout), embeds)
        out.append(runner.prefill(request, known).row(choose=greedy(), limit=NEW))
    return out


def alone(x, runner, seed):
    """What each request answers in a loop of its own, and the logits of its last step."""
    rows = rows_of(x, runner, seed)
    for row in rows:
        for _ in decode(runner.backend, [row]):
            pass
    return rows


def check(row, single, tokens=None):
    assert row.ids == single.ids[:tokens]
    if tokens is None:
        np.testing.assert_allclose(row.last, single.last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", RECIPES)
def test_five_unequal_requests_get_what_they_get_alone(exported, kind, seed):
    """One joins late, one leaves early, lengths, pictures and budgets differ."""
    x = exported(seed)
    runner = runner_of(x, Recipe().replace(**RECIPES[kind]))
    singles, rows = alone(x, runner, seed), rows_of(x, runner, seed)
    assert len({tuple(s.ids) for s in singles}) > 1, "requests that answer the same could hide a mix-up"
    batch = Batch(runner.backend, rows[:4])
    for step in range(NEW + 4):
        if step == 3:
            batch.add(rows[4])
        if step == 5:
            batch.remove(rows[1])
        batch.choose()
        if batch.rows:
            batch.read()
    for i, (row, single) in enumerate(zip(rows, singles, strict=True)):
        check(row, single, tokens=5 if i == 1 else None)
        assert row.ended == (None if i == 1 else "limit")


def test_decode_that_chooses_for_every_token_works_in_a_batch(layered):  # noqa: F811
    """`predicted`: one number of neurons serves a whole graph call, so other budgets make a call of their own."""
    x, backend, _ = layered
    runner = runner_of(x, RECIPE)
    runner.backend = backend
    singles, rows = alone(x, runner, 1), rows_of(x, runner, 1)
    for _ in decode(backend, rows):
        pass
    for row, single in zip(rows, singles, strict=True):
        check(row, single)


def test_requests_of_one_graph_share_a_call(exported):
    x = exported(1)
    runner = runner_of(x, Recipe().replace(**RECIPES["cut"]))
    rows = rows_of(x, runner, 1)
    sizes = []
    make = runner.backend.decoder
    runner.backend.decoder = lambda graph, cores, few=False: (
        sizes.append((graph, len(cores))) or make(graph, cores, few)
    )
    for _ in decode(runner.backend, rows):
        pass
    # Whole rows are read where they lie in the file, so a request that leaves nothing out is not copied beside others.
    assert sorted(sizes) == [("decode", 1), ("decode", 3), ("decode_dense", 1)]


PLANTED = {
    "another request's cache": lambda m: m.setattr(
        Rows, "regrouped", classmethod(lambda cls, rows, lengths=None, own=Rows.regrouped: own([rows[0]] * len(rows)))
    ),
    "masks change places": lambda m: m.setattr(
        decoding, "_tokens", lambda rows, ids, own=decoding._tokens: _swapped(own(rows, ids), "masks")
    ),
    "positions of the first request for all": lambda m: m.setattr(
        decoding, "_tokens", lambda rows, ids, own=decoding._tokens: _swapped(own(rows, ids), "positions")
    ),
    "core sets change places": lambda m: m.setattr(
        decoding, "_key", lambda rows, own=decoding._key: (*own(rows)[:-1], own(rows)[-1][::-1])
    ),
}


def _swapped(tokens, what):
    import dataclasses

    value = getattr(tokens, what)
    if what == "positions":
        return dataclasses.replace(tokens, positions=np.repeat(value[:, :1], value.shape[1], 1))
    rows = [m[: len(n)] if len(m) >= len(n) else np.pad(m, (len(n) - len(m), 0)) for m, n in zip(value[::-1], value)]  # noqa: B905
    return dataclasses.replace(tokens, masks=tuple(rows))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_mix_up_between_requests_is_seen(exported, monkeypatch, bug):
    x = exported(1)
    runner = runner_of(x, Recipe().replace(**RECIPES["cut"]))
    singles, rows = alone(x, runner, 1), rows_of(x, runner, 1)
    PLANTED[bug](monkeypatch)
    with pytest.raises((AssertionError, ValueError)):  # another answer, or lengths that do not go together
        for _ in decode(runner.backend, rows):
            pass
        for row, single in zip(rows, singles, strict=True):
            check(row, single)
