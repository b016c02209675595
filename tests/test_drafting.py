"""What a draft is worth, and that a guard of thresholds drafts as sparsely and as far as what it measures allows."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm_export.host.drafting import SHARES, Acceptance, Costs, Habits, best_length, steady
from cm_export.host.repeats import Repeats

CHECK = 1.15


def best(most, rate, cost):
    return best_length(steady(rate, most), cost, lambda rows: CHECK)


def looked_up(text, most):
    return Repeats.of(text).own(most)[1]


@pytest.mark.parametrize(("length", "rate", "cost"), [(16, 0.97, 0.7), (4, 0.8, 0.65), (8, 0.5, 0.3), (2, 1.0, 0.5)])
def test_the_gain_is_that_of_rounds_played_with_dice(length, rate, cost):
    rng = np.random.default_rng(0)
    right = rng.random((200_000, length)) < rate
    tokens = 1 + np.where(right.all(1), length, right.argmin(1))
    found, gain = best_length(steady(rate, 16), cost, lambda rows: CHECK if rows == length + 1 else 1e9)
    assert found == length and gain == pytest.approx(tokens.mean() / (length * cost + CHECK), rel=5e-3)


def test_drafts_that_cost_as_much_as_what_they_draft_for_never_pay():
    for rate in (0.3, 0.8, 0.999):
        assert best(16, rate, 1.0)[1] < 1
    assert best(16, 0.8, 0.65)[1] < 1.05  # nothing is gained at a .8
    assert best(16, 0.97, 0.4)[1] > 1.4
    lengths = [best(16, rate, 0.4)[0] for rate in (0.5, 0.8, 0.9, 0.99)]
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


def test_a_table_of_repetitions_finds_what_a_search_of_the_text_finds():
    rng = np.random.default_rng(3)
    text = rng.integers(0, 4, 300).tolist()
    for end in range(2, len(text)):
        expected = (0, [])
        for length in range(5, 1, -1):
            starts = [i for i in range(end - length) if text[i : i + length] == text[end - length : end]]
            if starts and length < end:
                expected = length, text[starts[-1] + length : end][:7]
                break
        assert Repeats.of(text[:end]).own(7) == expected


def test_the_price_of_a_look_does_not_grow_with_the_text():
    small, large = (Repeats.of(np.random.default_rng(0).integers(0, 8, n).tolist()) for n in (2500, 100_000))
    spent = []
    for text in (small, large):
        started = time.process_time()
        for _ in range(2000):
            text.own(16)
        spent.append(time.process_time() - started)
    assert spent[1] < 5 * spent[0]


def habits(step=1.0, row=0.05, sparse=None):
    """Habits after a few reads that took so long."""
    found = Habits()
    for _ in range(8):
        found.costs.read(1, step)
    for _ in range(2):
        found.costs.read(5, step * (1 + 4 * row))
        if sparse:
            found.costs.drafted(found.share, step * sparse)
    return found


def test_costs_are_what_was_measured_and_one_disturbed_measurement_changes_nothing():
    costs = habits(2.0, 0.05, 0.6).costs
    assert costs.check(1) == 1 and costs.check(5) == pytest.approx(1.2) and costs.check(17) == pytest.approx(1.8)
    assert costs.sparse(0.5, lambda: 0.9) == pytest.approx(0.6) == costs.sparse(0.3, lambda: 0.1)
    for seconds in (2.0, 200.0, 2.0):
        costs.read(1, seconds)
    costs.read(0, 5.0)
    assert costs.check(5) == pytest.approx(1.2)
    assert Costs().check(2) > 1 and Costs().sparse(0.5, lambda: 0.55) == 0.55 and not Costs().known


def test_checks_cost_what_passes_of_that_length_took_and_never_more_than_longer_ones():
    """The second row costs more than the third; beyond what was measured each row costs a tenth of a step, until it was."""
    costs = habits(row=0.1).costs  # 5 rows: 1.4
    for _ in range(2):
        costs.read(2, 1.3)
        costs.read(3, 9.0)
    assert costs.check(2) == pytest.approx(1.3) and costs.check(3) == pytest.approx(1.4)
    assert costs.check(4) == pytest.approx(1.4) and costs.check(7) == pytest.approx(1.6)


def test_what_a_pass_took_long_ago_counts_no_more():
    costs = habits(row=0.1).costs
    for _ in range(2):
        costs.read(7, 60.0)
    assert costs.check(7) == pytest.approx(60.0) and costs.check(6) > 20
    for _ in range(600):
        costs.read(1, 1.0)
        costs.read(5, 1.4)
    assert costs.check(7) == pytest.approx(1.6)


def test_the_first_pass_over_so_many_rows_and_the_first_sparse_step_say_nothing_of_later_ones():
    """As measured: the first pass over several rows of a process took 11.6 steps, later ones 1.4."""
    found = habits()
    for rows in (2, 3, 9, 16):
        found.costs.read(rows, 11.6)
    found.costs.drafted(found.share, 30.0)
    assert found.costs.check(5) == pytest.approx(1.2) and found.costs.check(3) < 1.2
    assert found.costs.sparse(found.share, lambda: 0.5) == 0.5 and found.sparse_length(16, lambda: 0.5)[1] > 1
    assert found.found_length(2, 16, 0.0) > 0


def tried(found, steps, right=0, read=0.5):
    """Steps in which there was a sparse draft, of which `right` tokens were kept."""
    out = []
    for step in range(steps):
        length, _ = found.sparse_length(16, lambda: read)
        if length:
            out.append(step)
            found.learn(min(right, length), length)
    return out


def test_a_bundle_whose_sparse_steps_cost_as_much_as_dense_ones_drafts_next_to_nothing():
    found = habits(sparse=1.0)
    assert not tried(found, 300) and found.sparse_length(16, lambda: 0.6)[1] < 1
    assert 1 <= len(tried(found, 5000)) < 8


def test_drafts_that_are_seldom_right_are_tried_less_and_less():
    steps = tried(habits(sparse=0.5), 2000)
    assert 5 < len(steps) < 20 and np.diff(steps)[-1] > 400


def test_a_pause_ends_where_what_was_measured_was_wrong():
    """Twice a check took 40 steps, as on a machine that was busy just then. A later trial sees what it takes now."""
    found = Habits()
    for _ in range(8):
        found.costs.read(1, 1.0)
    for _ in range(2):
        found.costs.drafted(found.share, 0.4)
        found.costs.read(5, 40.0)
    first = found.sparse_length(16, lambda: 0.5)
    assert first[0] == 0 and first[1] < 1
    step = 0
    while not found.sparse_length(16, lambda: 0.5)[0]:
        step += 1
        assert step < 1500, "it is never tried again"
    for _ in range(9):
        found.costs.read(5, 1.2)
    found.learn(4, 4)
    assert sum(length > 0 for length in (found.sparse_length(16, lambda: 0.5)[0] for _ in range(50))) > 10


def test_sparser_drafts_are_tried_at_once_while_they_are_right():
    """At half of the weights nothing is gained; what a step costs at fewer is not known before it was tried."""
    found, price = habits(row=0.05), {0.5: 0.9, 0.4: 0.7, 0.3: 0.4}
    for _ in range(3):
        found.costs.drafted(0.5, price[0.5])
    found.accepted.rate = 0.9
    for _ in range(20):
        share = found.share
        length, expected = found.sparse_length(16, lambda: 0.5)
        for _ in range(length):
            found.costs.drafted(share, price[share])
        if length:
            found.learn(length, length)
    assert found.share == 0.3 and expected > 1.4


def test_cheap_drafts_that_are_right_become_long_and_sparse():
    found = habits(sparse=0.4)
    for _ in range(10):
        length, expected = found.sparse_length(16, lambda: 0.5)
        found.learn(length, length)
    assert length == 16 and expected > 1.4 and found.share == SHARES[-1]


def test_what_is_found_in_vain_is_tried_less_and_less_and_as_soon_as_it_is_right_again_always():
    found, steps = habits(row=0.4), []
    for step in range(1000):
        if length := found.found_length(3, 16, 0.0):
            steps.append(step)
            found.learn_found(3, 0, length)
    assert 5 < len(steps) < 40 and np.diff(steps)[-1] > 100
    waited = 0
    while not (length := found.found_length(3, 16, 0.0)):
        waited += 1
        assert waited < 200, "it is never tried again"
    for _ in range(12):
        found.learn_found(3, length, length)
        length = found.found_length(3, 16, 0.0)
        assert length
    assert found.found_length(3, 16, 9.0) == 0, "a sparse draft that gains more goes first"
