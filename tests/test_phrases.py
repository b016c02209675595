"""What the model usually writes: kept answers, drafts from them, and how often these are said to be right."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import active_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cm_export.base.errors import BundleError, InputError
from cm_export.bundle import bundle as bundles
from cm_export.bundle import calibration, phrases
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.phrases import LEAD, Phrases
from cm_export.evals.tasks import easy_vqa
from cm_export.host import guard
from cm_export.host.drafting import Habits
from cm_export.host.images import open_image
from cm_export.host.phrases import RUNS, Table
from cm_export.host.runner import Budget, Runner
from cm_export.host.sampling import PLAIN, Chooser

STOP = 99
TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9)), max_size=8
)


def grammar(rng, answers):
    """(prompt, answer) pairs: colour c, a noun that mostly follows from it, "." and the end; for one colour a clause before."""
    out = []
    for _ in range(answers):
        colour = int(rng.choice(5, p=(0.2, 0.1, 0.1, 0.5, 0.1)))
        noun = 10 + colour if rng.random() < 0.8 else 15
        clause = [30, 31, int(rng.integers(40, 60))] if colour == 0 else []
        out.append(([7, 8, 9], [20, colour, noun, *clause, 21, STOP]))
    return out


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_kept_answers_are_the_prompts_last_tokens_and_the_answers(texts):
    found = Phrases.of(texts).texts()
    assert found == [([*prompt[-LEAD:], *answer], len(prompt[-LEAD:])) for prompt, answer in texts]


def test_a_file_of_phrases_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path):
    written = Phrases.of(grammar(np.random.default_rng(0), 5))
    phrases.write(tmp_path / "p", written)
    assert phrases.read(tmp_path / "p").texts() == written.texts()
    ends = written.answer_ends
    for bad in (ends[::-1].copy(), ends + 1, ends[:, :1].copy(), ends.astype(np.int64), -ends):
        with pytest.raises(BundleError, match="phrases cannot be"):
            Phrases(written.answers, bad)
    with pytest.raises(BundleError, match="phrases cannot be"):
        Phrases(-written.answers, ends)


def test_no_more_than_can_be_looked_up_in_a_moment_is_kept(monkeypatch):
    monkeypatch.setattr(phrases, "MOST", 25)
    assert len(Phrases.of([([1, 2], [3] * 10)] * 9).texts()) == 2


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 4), max_size=9), st.integers(1, 6))
def test_a_draft_is_what_followed_its_longest_known_end_most_often(texts, end, most):
    kept = Phrases.of(texts).texts()
    guess = Table(Phrases.of(texts)).guess(end, most, frozenset())
    assert len(guess.tokens) == len(guess.kinds) == len(guess.chances) <= most
    text = list(end)
    for token, kind in zip(guess.tokens, guess.kinds, strict=True):
        for length in (n for n in RUNS if n <= len(text)):
            after = [
                t[i]
                for t, lead in kept
                for i in range(max(lead, length), len(t))
                if t[i - length : i] == text[-length:]
            ]
            if after:
                break
        assert kind[0] == min(length, 3) and after.count(token) == max(map(after.count, after))
        text.append(token)
    assert all(a >= b > 0 for a, b in zip(guess.chances, guess.chances[1:], strict=False))


def test_a_draft_ends_with_a_stop_id_and_where_it_is_hardly_ever_right():
    table = Table(Phrases.of(grammar(np.random.default_rng(1), 200)))
    assert table.guess([9, 20, 3], 16, frozenset([STOP])).tokens == [13, 21, STOP]
    assert table.guess([9, 20, 3], 2, frozenset([STOP])).tokens == [13, 21]
    assert table.guess([9, 20, 0], 16, frozenset([STOP])).tokens[:3] == [10, 30, 31]
    assert len(table.guess([9, 20, 0], 16, frozenset([STOP])).tokens) <= 4  # one of twenty follows 31
    assert (
        not table.guess([77, 78], 16, frozenset()).tokens
        and not Table(Phrases.of([])).guess([1, 2], 4, frozenset()).tokens
    )


def test_chances_are_how_often_drafts_are_right_in_answers_that_were_not_kept():
    """Counted with each answer left out, or what was seen once would count as certain."""
    rng = np.random.default_rng(2)
    table = Table(Phrases.of(grammar(rng, 150)))
    expected, right, drafted = 0.0, 0, 0
    for prompt, answer in grammar(rng, 300):
        for i in range(1, len(answer)):
            guess = table.guess([*prompt, *answer[:i]], 1, frozenset())
            expected += sum(guess.chances)
            right += guess.tokens == [answer[i]]
            drafted += len(guess.tokens)
    assert abs(expected - right) < 0.05 * drafted and 0.5 < right / drafted < 0.95


def test_text_that_says_nothing_twice_is_not_drafted():
    """What was seen once is right only in the answer where it was seen."""
    rng = np.random.default_rng(4)
    texts = [([1], rng.integers(0, 60, 12).tolist()) for _ in range(40)]
    table = Table(Phrases.of(texts))
    chances = [
        table.guess([*prompt, *text[:i]], 1, frozenset()).chances for prompt, text in texts for i in range(2, 12)
    ]
    assert all(chance <= 0.2 for found in chances for chance in found)


def test_what_is_wrong_is_soon_expected_to_be_and_no_longer_drafted():
    table, end = Table(Phrases.of(grammar(np.random.default_rng(3), 100))), [9, 20, 3]
    before = table.guess(end, 3, frozenset())
    assert Habits().likely_length(before.chances)[0] == 3
    for _ in range(100):
        table.learn(before.kinds, 0)
    after = table.guess(end, 3, frozenset())
    assert after.chances == [] or after.chances[0] < before.chances[0] / 2
    assert Habits().likely_length(after.chances)[0] == 0


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return Bundle(active_bundle(demo_bundle, "int8"))


def test_a_build_keeps_the_answers_by_which_it_measured(bundle):
    """Of the demo model; the first answers again are those that are kept."""
    runner, kept = Runner(bundle, 1), bundle.phrases.texts()
    assert len(kept) > 50 and all(text[lead:] for text, lead in kept)
    assert sum(text[-1] in runner.chat.stop_ids for text, _ in kept) > len(kept) / 2


@pytest.mark.parametrize("wrong", [False, True], ids=["its own answers", "other answers"])
def test_the_answer_is_the_dense_models_own_whatever_is_drafted(bundle, wrong, monkeypatch):
    runner = Runner(bundle, 1)
    monkeypatch.setattr(guard._Draft, "wanted", lambda *a: 1)
    monkeypatch.setattr(type(runner.habits.costs), "known", True)
    if wrong:
        texts = [(text[:lead], [(t + 1) % 90 for t in text[lead:]]) for text, lead in bundle.phrases.texts()]
        monkeypatch.setitem(vars(bundle), "phrases", Phrases.of(texts))
        monkeypatch.setattr(Habits, "likely_length", lambda self, chances: (len(chances), 9.0))
    kept = drafted = 0
    for question in easy_vqa.questions("sentence")[:120:20]:
        asked, stop = runner.ask(question.text, runner.see([open_image(question.pictures[0])])), runner.chat.stop_ids
        dense = list(runner.tokens(runner.prefill(asked, Budget(dense=True)), 40, stop))
        report, prefilled = guard.Report(8), runner.prefill(asked, Budget())
        assert list(guard.guarded(runner, prefilled, 40, Chooser(PLAIN, asked.ids, stop), report)) == dense
        kept, drafted = kept + report.phrases_kept, drafted + report.phrases
    assert drafted > 10 and (kept < 0.2 * drafted if wrong else kept > 0.3 * drafted)


def test_a_calibration_may_have_them_and_may_not(tmp_path):
    one = np.ones((1, 2), np.float32)
    made = calibration.Calibration(one, one, np.ones((1, 3)), np.ones((1, 1)), np.ones(1), np.array([[0, 1]]), {})
    calibration.write(tmp_path / "without", made)
    assert calibration.read(tmp_path / "without").phrases is None
    kept = Phrases.of([([1, 2], [3, 4])])
    calibration.write(tmp_path / "with", dataclasses.replace(made, phrases=kept))
    assert calibration.read(tmp_path / "with").phrases.texts() == kept.texts()
    arrays = load_file(tmp_path / "with") | {"answer_ends": np.array([[1, 9]], np.int32)}
    save_file(arrays, tmp_path / "bad", {"cm_export": json.dumps({"format": calibration.FORMAT})})
    with pytest.raises(InputError, match="bad: its phrases cannot be"):
        calibration.read(tmp_path / "bad")


def test_tokens_that_the_model_has_not_are_refused(bundle, tmp_path, monkeypatch):
    """Or a draft of them would be looked up behind the end of the embedding."""
    texts = [([1, 2], [3, bundle.shape.vocab])]
    monkeypatch.setattr(bundles, "read_phrases", lambda path: Phrases.of(texts))
    with pytest.raises(BundleError, match="tokens that the model has not"):
        _ = Bundle(bundle.path).phrases
