"""A head in two times 4 bits: what is stored, which logits are computed to the end, and that no other one is ever needed."""

from dataclasses import replace

import numpy as np
import pytest
from cpu_cases import Head, refine
from test_cpu_ops import INSTRUCTIONS, best_instructions, compiled, run, use  # noqa: F401 (fixtures)

from cm_export.base.errors import InputError
from cm_export.plugins.cpu import library
from cm_export.quant import remainder, rows
from cm_export.quant.choose import by_inputs
from cm_export.quant.rounding import nearest

HEADS = [
    Head(), Head(K=1, N=1), Head(K=31, N=63), Head(K=32, N=64, S=3), Head(K=33, N=65), Head(K=530, N=1000, S=2),
    Head(K=70, N=9000), Head(K=70, N=9000, S=2, B=2, share=0.5), Head(K=200, B=3, share=0.3), Head(share=0),
    Head(K=64, N=17000, spread=0.1), Head(left_out=0.6), Head(left_out=0.3, N=9000, B=2), Head(S=0), Head(spread=1e4),
]  # fmt: skip


# ---------------------------------------------------------------- the op
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_logits_that_may_be_chosen_are_computed_to_the_end_and_others_stay(name):
    use(name)
    for seed, head in enumerate(HEADS):
        call = refine(head, seed)
        library.reset()
        y = run(call)
        call.check(y)
        assert library.counts() == (call.read, call.dense), "the others are not read"
        np.testing.assert_array_equal(run(call, threads=2), y)


@pytest.mark.parametrize(("size", "spread", "least", "most"), [(0.002, 1, 0.3, 2), (0.02, 6, 3, 15)])
def test_margins_grow_with_what_is_left_out(size, spread, least, most):
    """So that nothing is refined for nothing where all logits lie close together, and enough where they are far apart."""
    call = refine(Head(left_out=size, spread=spread, N=5000), 11)
    logits = call.inputs["logits"].ravel()
    changed = run(call).ravel() != logits
    assert least < logits.max() - logits[changed].min() < most
    assert 0 < changed.sum() < 2500 and not changed[logits < logits.max() - most].any()


def test_a_row_has_the_same_logits_alone_and_among_others():
    call = refine(Head(K=200, B=3, S=2, share=0.5, left_out=0.3))
    together = run(call)
    for request in range(3):
        one = {n: call.inputs[n][request : request + 1] for n in ("logits", "x", "threshold")}
        np.testing.assert_array_equal(run(replace(call, inputs=call.inputs | one))[0], together[request])


def test_a_number_that_is_none_shows_in_its_own_row():
    call = refine(Head(S=2))
    call.inputs["x"][0, 1, 7] = np.nan
    call.inputs["logits"][0, 0, 5] = np.nan
    y = run(call)
    assert np.isnan(y[0, 0]).sum() == 1 and np.isnan(y[0, 1]).any()
    assert np.nanargmax(y[0, 0]) == np.nanargmax(call.expected[0, 0])


def test_infinite_logits_end():
    call = refine(Head(S=3))
    call.inputs["logits"][0, 0, 5], call.inputs["logits"][0, 1], call.inputs["logits"][0, 2] = np.inf, -np.inf, np.nan
    y = run(call)
    assert y[0, 0, 5] == np.inf and np.isnan(y[0, 2]).all() and (y[0, 1] == -np.inf).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": np.zeros((1, 1, 299), np.float32)}, r"the logits are \[1,1,299\], expected \[1,1,300\]"),
        ({"x": np.zeros((1, 1, 10), np.float32)}, r"the remainder is \[300,72\] for x \[1,1,10\]"),
        ({"norm": np.ones(3, np.float32)}, r"input 3 \(norm\) is \[3\], expected \[100\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    call = refine(Head())
    with pytest.raises(Exception, match=f"RefineLogits: {message}"):
        run(replace(call, inputs=call.inputs | changed))


# ---------------------------------------------------------------- what is stored
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 31), (7, 64), (3, 100)])
def test_bytes_are_what_they_say_they_are(outputs, inputs, monkeypatch):
    """Read back by hand; rounded in pieces."""
    monkeypatch.setattr(remainder, "_PIECE", 3 * inputs)
    left_out = np.random.default_rng(inputs).standard_normal((outputs, inputs)).astype(np.float32)
    stored = remainder.pack_remainder(left_out)
    groups = -(-inputs // 32)
    assert stored.shape == (outputs, remainder.row_bytes(inputs)) == (outputs, 18 * groups)
    found = remainder.numbers(stored)
    for n in range(outputs):
        scales = stored[n, 16 * groups :].copy().view("<f2")
        for k in range(inputs):
            byte = stored[n, k // 32 * 16 + k % 16]
            code = int(byte >> 4 if k % 32 >= 16 else byte & 15)
            assert found[n, k] == np.float32(code - 8) * np.float32(scales[k // 32])
            assert abs(found[n, k] - left_out[n, k]) <= 0.51 * abs(np.float32(scales[k // 32]))
    assert not found[:, inputs:].any(), "inputs that fill the last group weigh nothing"


@pytest.mark.parametrize("wrong", [np.zeros((2, 17), np.uint8), np.zeros((2, 18), np.int8), np.zeros(18, np.uint8)])
def test_bytes_of_another_shape_are_refused(wrong):
    with pytest.raises(InputError, match="remainder"):
        remainder.unpack_remainder(wrong)


def test_both_halves_are_as_near_as_eight_bits():
    weight = np.random.default_rng(3).standard_normal((64, 200)).astype(np.float32)
    four, eight = (nearest(weight, by_inputs(bits, 32, symmetric=True)).numbers() for bits in (4, 8))
    both = four + remainder.numbers(remainder.pack_remainder((weight - four).T)).T
    errors = [float(np.abs(found - weight).mean()) for found in (four, eight, both)]
    assert errors[2] < 1.3 * errors[1] < errors[0] / 8


def test_numbers_of_packed_rows_hold_the_remainder():
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((96, 300)).astype(np.float32)
    made = nearest(weight, by_inputs(4, 32, symmetric=True))
    packed = rows.pack(made.unsigned()[0], made.scale, None, 4, 32)
    packed = replace(packed, remainder=remainder.pack_remainder((weight - made.numbers()).T))
    whole = made.numbers() + remainder.numbers(packed.remainder).T
    np.testing.assert_array_equal(rows.numbers(packed), whole)
    np.testing.assert_array_equal(rows.numbers_between(packed, (33, 90), (130, 299)), whole[33:90, 130:299])
    some = np.array([299, 0, 130, 130])
    np.testing.assert_array_equal(rows.numbers_of(packed, some), whole[:, some].T)
