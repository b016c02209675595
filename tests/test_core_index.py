"""Core indices: the selection against a sort, the counts, and that the check refuses every kind of damage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_export.base.core_index import (
    check_core_neurons,
    check_core_tokens,
    image_token_count,
    neuron_count,
    select_core_neurons,
)
from cm_export.base.errors import InputError

CASES = settings(max_examples=60, deadline=None)


@st.composite
def scores_and_count(draw):
    layers, batch, ffn = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties
    scores = rng.integers(-levels, levels, (layers, batch, ffn)).astype(np.float32) / 3
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.1] = rng.choice([np.inf, -np.inf, -0.0])
    return scores, draw(st.integers(1, ffn))


@CASES
@given(scores_and_count())
def test_selection_equals_a_stable_descending_sort_in_torch(case):
    scores, count = case
    order = torch.sort(torch.from_numpy(scores), dim=-1, descending=True, stable=True).indices
    expected = order[..., :count].sort(dim=-1).values.numpy()
    index = select_core_neurons(scores, count)
    np.testing.assert_array_equal(index, expected)
    check_core_neurons(index, *scores.shape)


@CASES
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 300))
def test_whole_number_scores_select_what_the_unique_integer_key_selects(ffn, levels, count):
    count = min(count, ffn)
    votes = np.random.default_rng(ffn * 41 + levels).integers(0, levels, ffn)
    key = votes * ffn + (ffn - 1 - np.arange(ffn))
    expected = sorted(sorted(range(ffn), key=lambda n: -key[n])[:count])
    assert select_core_neurons(votes.astype(np.float32)[None, None], count)[0, 0].tolist() == expected


def test_each_layer_and_row_gets_its_own_neurons():
    scores = np.zeros((2, 2, 6), np.float32)
    for layer, row, neurons in ((0, 0, (5, 1)), (0, 1, (0, 2)), (1, 0, (4, 3)), (1, 1, (2, 1))):
        scores[layer, row, list(neurons)] = 2, 1
    assert select_core_neurons(scores, 2).tolist() == [[[1, 5], [0, 2]], [[3, 4], [1, 2]]]


def test_constant_scores_select_the_lowest_ids():
    index = select_core_neurons(np.full((2, 1, 9), 3.5, np.float32), 4)
    assert index.dtype == np.int32
    assert index.tolist() == [[[0, 1, 2, 3]]] * 2


@pytest.mark.parametrize(
    ("scores", "count", "says"),
    [
        (np.zeros((1, 1, 4), np.float64), 2, "float64"),
        (np.zeros((1, 4), np.float32), 2, r"\[1, 4\]"),
        (np.zeros((1, 1, 4), np.float32), 0, "0 of 4"),
        (np.zeros((1, 1, 4), np.float32), 5, "5 of 4"),
    ],
)
def test_selection_refuses_wrong_scores_and_counts(scores, count, says):
    with pytest.raises(InputError, match=says):
        select_core_neurons(scores, count)


def test_nan_scores_are_refused_and_located():
    scores = np.zeros((3, 2, 5), np.float32)
    scores[2, 1, 4] = np.nan
    with pytest.raises(InputError, match=r"layer 2, row 1.*neuron 4"):
        select_core_neurons(scores, 1)


@pytest.mark.parametrize(
    ("share", "ffn", "count"), [(1.0, 7, 7), (0.5, 7, 4), (0.4, 8960, 3584), (0.001, 10, 1), (0.25, 10, 3)]
)
def test_neuron_count_rounds_half_up_and_is_at_least_one(share, ffn, count):
    assert neuron_count(share, ffn) == count
    assert image_token_count(share, ffn) == count


def test_no_image_keeps_no_image_token():
    assert image_token_count(0.5, 0) == 0
    assert image_token_count(0.01, 3) == 1


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share):
    for count in (neuron_count, image_token_count):
        with pytest.raises(InputError, match="share"):
            count(share, 10)


def good_neurons():
    return np.array([[[0, 2, 5], [1, 2, 3]], [[0, 1, 2], [3, 4, 5]]], np.int32)


def test_good_indices_pass():
    check_core_neurons(good_neurons(), 2, 2, 6)
    check_core_tokens(np.array([[0, 3], [1, 2]], np.int32), 2, 4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([3, 5, 4], "5 is followed by 4 at place 2"),  # unsorted
        ([3, 3, 4], "3 is followed by 3 at place 1"),  # repeated
        ([3, 4, 6], "id 6 at place 2"),  # too high
        ([-1, 4, 5], "id -1 at place 0"),
    ],
)
def test_a_damaged_row_is_refused_and_named(row, says):
    neurons = good_neurons()
    neurons[1, 1] = row
    with pytest.raises(InputError, match=rf"layer 1, row 1.*{says}"):
        check_core_neurons(neurons, 2, 2, 6)
    with pytest.raises(InputError, match=rf"core_tokens\[row 1\].*{says}"):
        check_core_tokens(neurons[1], 2, 6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float32])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(InputError, match=np.dtype(dtype).name):
        check_core_neurons(good_neurons().astype(dtype), 2, 2, 6)
    with pytest.raises(InputError, match=np.dtype(dtype).name):
        check_core_tokens(good_neurons()[0].astype(dtype), 2, 6)


@pytest.mark.parametrize("shape", [(2, 2, 0), (2, 3, 3), (1, 2, 3), (2, 3), (3,), ()])
def test_another_shape_is_refused(shape):
    with pytest.raises(InputError, match="shape"):
        check_core_neurons(np.zeros(shape, np.int32), 2, 2, 6)


@CASES
@given(st.integers(1, 3), st.integers(1, 30), st.data())
def test_check_core_tokens_agrees_with_python_sets(batch, context, data):
    width = data.draw(st.integers(1, 4))
    rows = data.draw(
        st.lists(st.lists(st.integers(-1, context), min_size=width, max_size=width), min_size=batch, max_size=batch)
    )
    valid = all(row == sorted(set(row)) and set(row) <= set(range(context)) for row in rows)
    index = np.array(rows, np.int32)
    if valid:
        check_core_tokens(index, batch, context)
    else:
        with pytest.raises(InputError, match="core_tokens"):
            check_core_tokens(index, batch, context)
