"""A cache in bytes: a quarter of the memory, the same tokens, and each request as if it were alone."""

import numpy as np
import pytest
from conftest import active_bundle, built, few_answers, low_bits, take_stages
from test_packed import IDS, asked_of, logits

from cm_export.backends.onnxruntime import backend as runtime
from cm_export.bundle.bundle import Bundle
from cm_export.host.decode import Reader
from cm_export.host.runner import Budget, Runner
from cm_export.plugins.cpu import library

STEP = 0.02  # of the largest logit: how far rounding keys and values may take one of the demo model (measured .004)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if library.find() is None:
        pytest.skip("no native library: there is no compiler")


@pytest.fixture(scope="module")
def low(demo_bundle):
    return Bundle(low_bits(demo_bundle, "int8"))


def in_bytes(bundle):
    return Runner(bundle, 1, bundle.recipe.replace(weights__cache="int8"))


def answer(runner):
    return list(runner.tokens(runner.prefill(asked_of(runner), Budget(dense=True)), 12, frozenset()))


@pytest.mark.parametrize("graph", ["decode_dense", "decode"])
def test_logits_are_near_and_the_same_to_the_last_bit_alone_and_among_others(low, graph):
    floats, ours = Runner(low, 1), in_bytes(low)
    expected, found = (logits(r, asked_of(r), graph) for r in (floats, ours))
    off = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < off < STEP and np.array_equal(found[0], expected[0])  # a prompt attends to numbers
    assert np.array_equal(found[-2], found[-1])
    assert answer(ours) == answer(floats)


def test_it_takes_a_quarter_of_the_memory(low):
    floats, ours = (r.prefill(asked_of(r), Budget(dense=True)).cache for r in (Runner(low, 1), in_bytes(low)))
    assert ours.memory.capacity == floats.memory.capacity and ours.memory.held.keys() == floats.memory.held.keys()
    d, weights = low.shape.head_dim, low.recipe.replace(weights__cache="int8").weights
    for name, held in ours.memory.held.items():
        of_floats = floats.memory.held[name].array.nbytes
        assert held.array.nbytes * 4 * d == of_floats * weights.row_of_cache(d)
    assert weights.row_of_cache(d) <= 0.29 * 4 * d == 0.29 * low.recipe.weights.row_of_cache(d)
    for name, numbers in ours.arrays().items():
        exact = floats.arrays()[name]
        assert numbers.shape == exact.shape and numbers.dtype == np.float32
        assert (np.abs(numbers - exact) <= np.abs(exact).max(-1, keepdims=True) / 127 / 2 * 1.01).all()


def test_requests_that_join_and_leave_get_what_they_get_alone(low):
    runner = in_bytes(low)
    long = runner.prefill(asked_of(runner), Budget(dense=True))
    short = runner.prefill(runner.ask("yes or no ?", runner.see([])), Budget(dense=True))

    def read(steps):
        rows, reader = (long.row(), short.row()), Reader(runner.backend)
        out = ([], [])
        for who, token in steps:
            reader.read([rows[i] for i in who], [[token]] * len(who))
            for i in who:
                out[i].append(rows[i].last)
        return out

    together = read([((0,), 3), ((0, 1), 4), ((0, 1), 5), ((1,), 6)])
    alone = read([((0,), 3), ((0,), 4), ((0,), 5)])[0], read([((1,), 4), ((1,), 5), ((1,), 6)])[1]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_forgotten_leaves_nothing_behind(low):
    runner = in_bytes(low)
    prefilled = runner.prefill(asked_of(runner), Budget(dense=True))
    expected, row, reader = prefilled.row(), prefilled.row(), Reader(runner.backend)
    reader.read([expected], [[IDS[0], 7]])
    reader.read([row], [IDS])
    row.back_to(1)
    reader.read([row], [[7]])
    np.testing.assert_array_equal(row.last, expected.last)


def test_a_later_turn_reads_the_numbers_and_leaves_the_bytes_as_they_are(demo_bundle):
    bundle = Bundle(active_bundle(demo_bundle, "int8"))
    runner = in_bytes(bundle)
    assert runner.backend.in_bytes
    begun = runner.prefill(asked_of(runner), Budget())
    later, before = begun.then(IDS), begun.cache.width
    assert later.cache.width == before + len(IDS)
    for name, held in later.cache.memory.held.items():
        assert held.array.dtype == np.uint8
        np.testing.assert_array_equal(held.array[:, :, :before], begun.cache.memory.held[name].array[:, :, :before])
        assert held.array[:, :, before : later.cache.width].any(-1).all()
    floats = Runner(bundle, 1)
    expected = floats.prefill(asked_of(floats), Budget()).then(IDS)
    off = np.abs(later.logits - expected.logits).max() / np.abs(expected.logits).max()
    assert 0 < off < STEP


def _other_attention(patch):
    patch.setattr(runtime, "attend_natively", lambda *_: None)


def _one_layer_left(patch):
    """A graph in which a layer has a mask of its own."""
    real = runtime.attend_natively

    def spoilt(model, heads):
        attention = next(n for n in model.graph.node if n.op_type in ("Attention", "CoreAttention"))
        attention.input[3] = "another"
        model.graph.input.add().CopyFrom(next(v for v in model.graph.input if v.name == "cache_bias"))
        model.graph.input[-1].name = "another"
        real(model, heads)

    patch.setattr(runtime, "attend_natively", spoilt)


@pytest.mark.parametrize("other", [_other_attention, _one_layer_left])
def test_where_something_else_reads_it_a_cache_holds_floats(low, other, monkeypatch):
    other(monkeypatch)
    runner = in_bytes(low)
    prefilled = runner.prefill(asked_of(runner), Budget(dense=True))
    assert not runner.backend.in_bytes
    assert {h.array.dtype for h in prefilled.cache.memory.held.values()} == {np.dtype(np.float32)}


def test_without_the_library_a_cache_holds_floats(low, monkeypatch):
    monkeypatch.setattr(library, "find", lambda: None)
    runner = in_bytes(low)
    found = logits(runner, asked_of(runner))
    assert not runner.backend.in_bytes
    np.testing.assert_array_equal(found, logits(Runner(low, 1), asked_of(runner)))


def test_a_build_measures_what_the_cache_costs_as_well(low, tmp_path):
    take_stages(low.path, tmp_path / "bytes.plan")
    options = ["--model", "demo", "--neurons", "dense", "--weights", "int8", "--keep-floats", "--cache", "int8"]
    with few_answers():
        built(tmp_path / "bytes.plan", *options)
    bundle = Bundle(tmp_path / "bytes.plan")
    ours, floats = (b.manifest["weights_drift"] for b in (bundle, low))
    assert ours != floats
    runner = Runner(bundle, 1)
    assert runner.backend.in_bytes and answer(runner) == answer(Runner(low, 1))
