"""What a draft is worth, and that a guard of thresholds drafts as sparsely and as far as what it measures allows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm_export.host.drafting import CHECK, Acceptance, best_length, gain, looked_up


@pytest.mark.parametrize(("length", "rate", "cost"), [(16, 0.97, 0.7), (4, 0.8, 0.65), (8, 0.5, 0.3), (2, 1.0, 0.5)])
def test_the_gain_is_that_of_rounds_played_with_dice(length, rate, cost):
    rng = np.random.default_rng(0)
    right = rng.random((200_000, length)) < rate
    tokens = 1 + np.where(right.all(1), length, right.argmin(1))
    assert gain(length, rate, cost) == pytest.approx(tokens.mean() / (length * cost + CHECK), rel=5e-3)


def test_drafts_that_cost_as_much_as_what_they_draft_for_never_pay():
    for rate in (0.3, 0.8, 0.999):
        assert best_length(16, rate, 1.0)[1] < 1
    assert best_length(16, 0.8, 0.65)[1] < 1.05  # nothing is gained at a .8
    assert best_length(16, 0.97, 0.4)[1] > 1.4
    lengths = [best_length(16, rate, 0.4)[0] for rate in (0.5, 0.8, 0.9, 0.99)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_acceptance_follows_what_is_seen_and_forgets():
    found = Acceptance(0.9)
    for _ in range(20):
        found.add(0, 4)  # the first of four was wrong: the others say nothing
    assert found.rate < 0.25  # and 40 of them: below .15
    for _ in range(20):
        found.add(0, 4)
    assert found.rate < 0.15
    for _ in range(20):
        found.add(4, 4)
    assert found.rate > 0.85
    before = found.rate
    found.add(0, 0)
    assert found.rate == before


def test_what_followed_the_same_words_before_is_looked_up():
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], 9) == [4, 5, 1, 2, 3]
    assert looked_up([7, 1, 2, 8, 5, 1, 2, 9, 1, 2], 1) == [9]  # of several places the latest
    assert looked_up([0, 1, 2, 8, 5, 1, 2, 9, 0, 1, 2], 1) == [8]  # a longer repetition first
    assert looked_up([1, 2, 3], 4) == looked_up([5, 5], 4) == looked_up([], 4) == looked_up([1, 9, 1], 4) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_a_looked_up_draft_stands_in_the_text_after_its_last_two_tokens(text, most):
    found = looked_up(text, most)
    assert len(found) <= most
    if found:
        places = range(len(text) - len(found) - 1)
        assert any(text[i : i + 2] == text[-2:] and text[i + 2 : i + 2 + len(found)] == found for i in places)
