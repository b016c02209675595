"""Weights by inputs: zeros, importance and compensation against textbook forms, and what `choose` makes of any weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_export.base.errors import InputError
from cm_export.quant.choose import STORED, Inputs, by_inputs, quantise
from cm_export.quant.compensate import DAMP, compensated
from cm_export.quant.error import distance, output_error
from cm_export.quant.rounding import least_squares, nearest, weighted
from cm_export.quant.scheme import Scheme

CASES = settings(max_examples=40, deadline=None)
HALF = np.dtype(np.float16)
SCHEMES = st.builds(by_inputs, st.sampled_from([4, 8]), st.sampled_from([8, 32, 64]), st.booleans())
SEEDS = st.integers(0, 2**32 - 1)


def problem(seed, inputs=64, outputs=24, tokens=200, rank=20):
    """(weight [K,N], X^T X [K,K]) of inputs that go together and differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, inputs)) + rng.standard_normal(
        (tokens, inputs)
    )
    x *= np.exp(rng.standard_normal(inputs))
    weight = rng.standard_t(5, (inputs, outputs)) * 0.02 + rng.standard_normal(outputs) * 0.01
    return weight.astype(np.float32), (x.T @ x).astype(np.float32)


def all_ways(gram):
    return {
        "nearest": nearest,
        "search": least_squares,
        "weighted": weighted(np.diagonal(gram)),
        "compensated": compensated(gram),
    }


@CASES
@given(SCHEMES, SEEDS)
def test_unsigned_codes_zeros_and_scales_are_the_numbers(scheme, seed):
    weight, gram = problem(seed)
    for make in all_ways(gram).values():
        found = make(weight, scheme, "w")
        codes, zero = found.unsigned()
        middle = 2 ** (scheme.bits - 1)
        assert codes.dtype == np.uint8 and codes.max() < 2**scheme.bits and found.scale.dtype == HALF
        assert (zero is None) == scheme.symmetric and (zero is None or zero.max() < 2**scheme.bits)
        for k in (0, len(weight) - 1):
            row = k // scheme.group
            less = middle if zero is None else zero[row].astype(np.float32)
            expected = found.scale[row].astype(np.float32) * (codes[k].astype(np.float32) - less)
            np.testing.assert_array_equal(found.numbers()[k], expected)


@CASES
@given(st.sampled_from([4, 8]), st.sampled_from([1, 8, 32]), st.sampled_from([0, 1]), SEEDS)
def test_with_a_zero_nearest_is_off_by_half_a_step_and_keeps_zeros(bits, group, axis, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((64, 32)) + rng.standard_normal() * 2).astype(np.float32)
    weight[rng.random(weight.shape) < 0.1] = 0
    scheme = Scheme(bits, group, axis, symmetric=False)
    found = nearest(weight, scheme)
    step = np.repeat(found.scale, group, axis=axis)
    assert (np.abs(found.numbers() - weight) <= step * 0.5001).all()
    assert (found.numbers()[weight == 0] == 0).all()
    spread = np.maximum(weight.max(), 0) - np.minimum(weight.min(), 0)
    steps = found.scale[found.scale != 1]  # of groups that are not zero
    assert (steps <= spread / (2**bits - 1) * 1.0001).all()


@CASES
@given(SCHEMES, SEEDS)
def test_weights_that_can_be_stored_exactly_are(scheme, seed):
    rng = np.random.default_rng(seed)
    low, high = scheme.lowest, -scheme.lowest - 1
    codes = rng.integers(low, high + 1, (2 * scheme.group, 16))
    codes[:: scheme.group], codes[1 :: scheme.group] = low, high
    scale = 2.0 ** rng.integers(-8, 3, (2, 16)) * (1 + rng.integers(0, 16, (2, 16)) / 16)
    zero = np.zeros((2, 16), int) if scheme.symmetric else rng.integers(low, high + 1, (2, 16))
    each = [np.repeat(v, scheme.group, axis=0) for v in (scale, zero)]
    weight = ((codes - each[1]) * each[0]).astype(np.float32)
    _, gram = problem(seed, inputs=len(weight))
    for name, make in all_ways(gram).items():
        if not (name == "nearest" and scheme.symmetric):  # which does without the lowest code
            np.testing.assert_array_equal(make(weight, scheme, "w").numbers(), weight, err_msg=name)


@CASES
@given(st.sampled_from([8, 32]), st.booleans(), SEEDS)
def test_compensation_beats_rounding_in_the_outputs(group, symmetric, seed):
    weight, gram = problem(seed)
    scheme = by_inputs(4, group, symmetric)
    errors = {
        name: output_error(weight, make(weight, scheme, "w").numbers(), gram) for name, make in all_ways(gram).items()
    }
    assert errors["compensated"] < min(errors["nearest"], errors["search"], errors["weighted"])


@CASES
@given(st.integers(1, 60), SEEDS, st.booleans())
def test_compensation_is_no_worse_than_rounding_where_there_is_little_to_gain(tokens, seed, symmetric):
    weight, gram = problem(seed, tokens=tokens, rank=1)
    scheme = by_inputs(4, 32, symmetric)
    plain, found = (
        output_error(weight, make(weight, scheme, "w").numbers(), gram) for make in (nearest, compensated(gram))
    )
    assert found <= plain


def textbook(weight, gram, scheme):
    """GPTQ as its paper has it: the Cholesky factor of the inverse, errors spread over all rows that follow."""
    gram = gram.astype(np.float64)
    gram = gram + np.eye(len(gram)) * DAMP * np.diagonal(gram).mean()
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    left, out = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for start in range(0, len(weight), scheme.group):
        rows = slice(start, start + scheme.group)
        group = nearest(left[rows], scheme, "w")
        step = group.scale[0].astype(np.float64)
        zero = 0 if group.zero is None else group.zero[0].astype(np.float64)
        for k in range(start, start + scheme.group):
            code = np.clip(np.rint(left[k] / step) + zero, scheme.lowest, -scheme.lowest - 1)
            out[k] = (code - zero) * step
            left[k + 1 :] -= np.outer(upper[k, k + 1 :], (left[k] - out[k]) / upper[k, k])
    return out


@pytest.mark.parametrize("symmetric", [True, False])
def test_compensation_is_gptq_of_the_paper(symmetric):
    weight, gram = problem(3)
    scheme = by_inputs(4, 16, symmetric)

    def fit(weight, scheme, name, importance):
        return nearest(weight, scheme, name)

    expected, found = textbook(weight, gram, scheme), compensated(gram, fit)(weight, scheme, "w").numbers()
    assert (np.abs(expected - found) > 1e-6).mean() < 0.02, "only ties may round the other way"
    assert output_error(weight, expected, gram) == pytest.approx(output_error(weight, found, gram), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_have_nothing_in_common_leave_nothing_to_compensate(symmetric):
    weight, _ = problem(4)
    scheme = by_inputs(4, 32, symmetric)
    found = compensated(np.eye(len(weight), dtype=np.float32))(weight, scheme, "w")
    np.testing.assert_array_equal(found.numbers(), least_squares(weight, scheme).numbers())


@CASES
@given(st.booleans(), st.sampled_from([0, 1]), SEEDS)
def test_importance_lowers_the_error_that_it_weighs(symmetric, axis, seed):
    rng = np.random.default_rng(seed)
    weight, importance = rng.standard_normal((64, 64)).astype(np.float32), np.exp(2 * rng.standard_normal(64))
    scheme = Scheme(4, 32, axis, symmetric=symmetric)
    along = importance[:, None] if axis == 0 else importance[None]

    def error(found):
        return float((np.square(found.numbers() - weight) * along).sum())

    assert error(weighted(importance)(weight, scheme, "w")) < error(least_squares(weight, scheme))


def test_a_scale_with_a_zero_is_fitted_to_the_input_that_counts():
    weight, _ = problem(10, inputs=32)
    importance = np.full(32, 1e-9)
    importance[7] = 1
    found = weighted(importance)(weight, by_inputs(4, 32), "w")
    kept = found.numbers()[7] != 0  # the weight is at least half a step
    assert kept.mean() > 0.7
    np.testing.assert_allclose(found.numbers()[7, kept], weight[7, kept], rtol=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_in_pieces_is_the_search_of_the_whole(symmetric, monkeypatch):
    weight, gram = problem(5, inputs=128, outputs=70)
    for axis, group in ((0, 32), (1, 14)):
        scheme = Scheme(4, group, axis, symmetric=symmetric)
        importance = np.diagonal(gram) if axis == 0 else np.arange(1, 71.0)
        whole = least_squares(weight, scheme, "w", importance)
        monkeypatch.setattr("cm_export.quant.rounding._PIECE", 200)
        np.testing.assert_array_equal(least_squares(weight, scheme, "w", importance).numbers(), whole.numbers())
        monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ any weight
@CASES
@given(SCHEMES, st.integers(1, 130), st.integers(0, 5), st.booleans(), st.booleans(), SEEDS)
def test_any_number_of_inputs_is_filled_up_with_exact_zeros(scheme, inputs, outputs, square, gram, seed):
    weight, seen = problem(seed, inputs, outputs)
    known = Inputs(np.diagonal(seen) if square else None, seen if gram else None)
    found = quantise(weight, scheme, "w", known)
    assert len(found.codes) % scheme.group == 0 and 0 <= len(found.codes) - inputs < scheme.group
    assert found.scale.shape == (len(found.codes) // scheme.group, outputs)
    assert (found.numbers()[inputs:] == 0).all()
    if outputs:
        assert output_error(weight, found.numbers()[:inputs], seen) < {4: 0.3, 8: 0.02}[scheme.bits]


@CASES
@given(SCHEMES, st.sampled_from([1e-30, 1e-9, 1e-6, 1e-3, 1.0, 1e4]), st.sampled_from([-1.0, 1.0]))
def test_constant_groups_keep_their_value_as_far_as_16_bit_scales_reach(scheme, size, sign):
    weight = np.full((scheme.group, 3), size * sign, np.float32)
    found = quantise(weight, scheme, "w").numbers()
    assert np.isfinite(found).all() and (found == found[0, 0]).all()
    np.testing.assert_allclose(found, weight, rtol=6e-3, atol=2.0**-24 * 2**scheme.bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("known", [Inputs(), Inputs(np.ones(32)), Inputs(gram=np.eye(32, dtype=np.float32))])
def test_weights_beyond_a_scale_of_16_bit_are_refused(symmetric, known):
    for size in (1e7, 1e30):
        with pytest.raises(InputError, match=r"^head: a weight is too large for a scale of float16"):
            quantise(np.full((32, 4), size, np.float32), by_inputs(4, 32, symmetric), "head", known)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_wherever_it_comes_from(wrong):
    weight, gram = problem(6)
    scheme = by_inputs(4, 32)
    spoilt, bad_gram, bad_square = weight.copy(), gram.copy(), np.diagonal(gram).copy()
    spoilt[5, 5] = bad_gram[3, 4] = bad_square[7] = wrong
    for known in (Inputs(), Inputs(np.diagonal(gram)), Inputs(gram=gram)):
        with pytest.raises(InputError, match=r"^w: a weight is not finite"):
            quantise(spoilt, scheme, "w", known)
    for known in (Inputs(bad_square), Inputs(gram=bad_gram)):
        with pytest.raises(InputError, match=r"^w: .*not finite; check the activations"):
            quantise(weight, scheme, "w", known)


def test_inputs_of_another_shape_and_sign_and_groups_along_outputs_are_refused():
    weight, gram = problem(7)
    for known, match in (
        (Inputs(np.ones(63)), "importance of shape"),
        (Inputs(-np.ones(64)), "negative"),
        (Inputs(gram=gram[:32, :32]), "H of shape"),
        (Inputs(gram=-gram), "no matrix of squares"),
    ):
        with pytest.raises(InputError, match=match):
            quantise(weight, by_inputs(4, 32), "w", known)
    for make in (lambda s: quantise(weight, s, "w"), lambda s: compensated(np.eye(64))(weight, s, "w")):
        with pytest.raises(InputError, match="groups along axis 1"):
            make(Scheme(4, 8, 1))
    with pytest.raises(InputError, match=r"^w: a weight of shape \[64\]"):
        quantise(weight[:, 0], by_inputs(4, 32), "w")


def test_inputs_are_known_from_activations_of_any_number_of_axes():
    x = np.random.default_rng(11).standard_normal((2, 30, 16)).astype(np.float32)
    seen = Inputs.of(x)
    np.testing.assert_allclose(seen.square, np.square(x).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(seen.gram, np.einsum("btk,btl->kl", x, x) / 60, rtol=1e-4, atol=1e-5)


def test_inputs_that_were_never_seen_or_always_the_same_are_compensated_all_the_same():
    weight, gram = problem(8)
    scheme = by_inputs(4, 32)
    dead, one = gram.copy(), np.outer(np.arange(64.0), np.arange(64.0)).astype(np.float32)
    dead[10:20], dead[:, 10:20] = 0, 0
    for seen in (dead, one, np.zeros_like(gram), gram * 1e-30, gram * 1e30):
        found = quantise(weight, scheme, "w", Inputs(gram=seen)).numbers()
        assert np.isfinite(found).all() and np.abs(found - weight).max() < 1
    rows = slice(10, 20)
    found = quantise(weight, scheme, "w", Inputs(gram=dead)).numbers()
    assert np.linalg.norm(found[rows] - weight[rows]) < 0.3 * np.linalg.norm(weight[rows])


def test_the_distance_tells_a_wrong_zero_from_rounding():
    weight, _ = problem(9, inputs=256, outputs=128)
    scheme = by_inputs(4, 32)
    found = nearest(weight, scheme)
    assert 0 < distance(weight, found.numbers(), scheme) < 0.13
    found.zero[1, 1] += 3
    assert distance(weight, found.numbers(), scheme) == np.inf


@pytest.mark.parametrize(("precision", "part"), [(p, part) for p, parts in STORED.items() for part in parts])
def test_what_a_build_stores_is_within_its_bits_and_better_where_inputs_are_known(precision, part):
    weight, gram = problem(12, inputs=100)
    scheme = STORED[precision][part]
    errors = [
        output_error(weight, quantise(weight, scheme, part, known).numbers()[:100], gram)
        for known in (Inputs(), Inputs(gram=gram))
    ]
    assert errors[1] < errors[0] < {4: 0.15, 8: 0.008}[scheme.bits]
    assert scheme.axis == 0 and scheme.scale == HALF and scheme.group in (32, 64, 128)


def test_bits_per_weight_count_scales_and_zeros():
    assert by_inputs(4, 32, symmetric=True).bits_per_weight == 4.5
    assert by_inputs(4, 32).bits_per_weight == 4.75 and by_inputs(8, 128).bits_per_weight == 8 + 24 / 128
