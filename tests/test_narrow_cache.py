"""A cache in float16 or in bytes: half or a quarter of the memory, the same tokens, and each request as if it were alone."""

import numpy as np
import pytest
from conftest import active_bundle, built, few_answers, low_bits, take_stages
from test_packed import IDS, asked_of, logits

from cm_export.backends.onnxruntime import backend as runtime
from cm_export.bundle.bundle import Bundle
from cm_export.host.decode import Reader
from cm_export.host.runner import Budget, Runner
from cm_export.plugins.cpu import library
from cm_export.quant.cache_rows import CELLS

# Of the largest logit: how far rounding keys and values may take one of the demo model (measured: .0001, .004).
STEP = {"fp16": 5e-4, "int8": 0.02}
FORMS = pytest.mark.parametrize("form", STEP)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if library.find() is None:
        pytest.skip("no native library: there is no compiler")


@pytest.fixture(scope="module")
def low(demo_bundle):
    return Bundle(low_bits(demo_bundle, "int8"))


def narrow(bundle, form):
    return Runner(bundle, 1, bundle.recipe.replace(weights__cache=form))


def answer(runner):
    return list(runner.tokens(runner.prefill(asked_of(runner), Budget(dense=True)), 12, frozenset()))


@FORMS
@pytest.mark.parametrize("graph", ["decode_dense", "decode"])
def test_logits_are_near_and_the_same_to_the_last_bit_alone_and_among_others(low, graph, form):
    floats, ours = Runner(low, 1), narrow(low, form)
    expected, found = (logits(r, asked_of(r), graph) for r in (floats, ours))
    off = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < off < STEP[form] and np.array_equal(found[0], expected[0])  # a prompt attends to numbers
    assert np.array_equal(found[-2], found[-1])
    assert answer(ours) == answer(floats)


@pytest.mark.parametrize("form, share, off", [("fp16", 0.5, 2**-11), ("int8", 0.29, 1.01 / 127 / 2)])
def test_it_takes_half_or_a_quarter_of_the_memory(low, form, share, off):
    floats, ours = (r.prefill(asked_of(r), Budget(dense=True)).cache for r in (Runner(low, 1), narrow(low, form)))
    assert ours.memory.capacity == floats.memory.capacity and ours.memory.held.keys() == floats.memory.held.keys()
    d, weights = low.shape.head_dim, low.recipe.replace(weights__cache=form).weights
    for name, held in ours.memory.held.items():
        of_floats = floats.memory.held[name].array.nbytes
        assert held.array.nbytes * 4 * d == of_floats * weights.row_of_cache(d)
    assert weights.row_of_cache(d) <= share * 4 * d == share * low.recipe.weights.row_of_cache(d)
    for name, numbers in ours.arrays().items():
        exact = floats.arrays()[name]
        assert numbers.shape == exact.shape and numbers.dtype == np.float32
        assert (np.abs(numbers - exact) <= np.abs(exact).max(-1, keepdims=True) * off).all()


@FORMS
def test_requests_that_join_and_leave_get_what_they_get_alone(low, form):
    runner = narrow(low, form)
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


@FORMS
def test_what_is_forgotten_leaves_nothing_behind(low, form):
    runner = narrow(low, form)
    prefilled = runner.prefill(asked_of(runner), Budget(dense=True))
    expected, row, reader = prefilled.row(), prefilled.row(), Reader(runner.backend)
    reader.read([expected], [[IDS[0], 7]])
    reader.read([row], [IDS])
    row.back_to(1)
    reader.read([row], [[7]])
    np.testing.assert_array_equal(row.last, expected.last)


@FORMS
def test_a_later_turn_reads_the_numbers_and_leaves_the_rows_as_they_are(demo_bundle, form):
    bundle = Bundle(active_bundle(demo_bundle, "int8"))
    runner = narrow(bundle, form)
    assert runner.backend.cache_form == form
    begun = runner.prefill(asked_of(runner), Budget())
    later, before = begun.then(IDS), begun.cache.width
    assert later.cache.width == before + len(IDS)
    for name, held in later.cache.memory.held.items():
        assert held.array.dtype == CELLS[form]
        np.testing.assert_array_equal(held.array[:, :, :before], begun.cache.memory.held[name].array[:, :, :before])
        assert held.array[:, :, before : later.cache.width].any(-1).all()
    floats = Runner(bundle, 1)
    expected = floats.prefill(asked_of(floats), Budget()).then(IDS)
    off = np.abs(later.logits - expected.logits).max() / np.abs(expected.logits).max()
    assert 0 < off < STEP[form]


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


@FORMS
@pytest.mark.parametrize("other", [_other_attention, _one_layer_left])
def test_where_something_else_reads_it_a_cache_holds_floats(low, other, form, monkeypatch):
    other(monkeypatch)
    runner = narrow(low, form)
    prefilled = runner.prefill(asked_of(runner), Budget(dense=True))
    assert runner.backend.cache_form == "fp32"
    assert {h.array.dtype for h in prefilled.cache.memory.held.values()} == {np.dtype(np.float32)}


@FORMS
def test_without_the_library_a_cache_holds_floats(low, form, monkeypatch):
    monkeypatch.setattr(library, "find", lambda: None)
    runner = narrow(low, form)
    found = logits(runner, asked_of(runner))
    assert runner.backend.cache_form == "fp32"
    np.testing.assert_array_equal(found, logits(Runner(low, 1), asked_of(runner)))


@FORMS
def test_a_build_measures_what_the_cache_costs_as_well(low, form, tmp_path):
    take_stages(low.path, tmp_path / "narrow.plan")
    options = ["--model", "demo", "--neurons", "dense", "--weights", "int8", "--keep-floats", "--cache", form]
    with few_answers():
        built(tmp_path / "narrow.plan", *options)
    bundle = Bundle(tmp_path / "narrow.plan")
    ours, floats = (b.manifest["weights_drift"] for b in (bundle, low))
    assert ours != floats
    runner = Runner(bundle, 1)
    assert runner.backend.cache_form == form and answer(runner) == answer(Runner(low, 1))
