"""The rule that chooses tokens: its scores are those of transformers' processors, its draws follow them.

transformers builds the list of processors itself (`_get_logits_processor`), so their order is judged, too.
"""

import copy
import itertools
import secrets

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from cm_export.base.errors import CmExportError, InputError
from cm_export.cli import sampling_options
from cm_export.host.decode import decode
from cm_export.host.sampling import PLAIN, Chooser, Rule, Sampling, drawn, settle

VOCAB = 97
SETTINGS = {
    "repetition_penalty": (1.0, 1.05, 1.3, 0.8),
    "temperature": (1.0, 0.01, 0.7, 1.8),
    "top_k": (0, 1, 7, 500),
    "top_p": (1.0, 0.001, 0.5, 0.93, 0.0),
    "min_p": (0.0, 0.05, 0.4, 1.0),
    "min_new_tokens": (0, 3),
}


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def theirs(model, rule: Rule, logits, prompt, answer, stop):
    """[V]: what transformers makes of logits [V]."""
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "min_new_tokens")
    config = GenerationConfig(do_sample=rule.sample, **{n: getattr(rule, n) for n in names}, eos_token_id=sorted(stop))
    config = copy.deepcopy(config)
    model._prepare_special_tokens(config, device="cpu")
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=len(prompt),
        device="cpu",
        model_kwargs={"attention_mask": torch.ones(1, len(prompt), dtype=torch.long)},
    )
    ids = torch.tensor([[*prompt, *answer]])
    return processors(ids, torch.from_numpy(logits)[None].clone())[0].numpy()


def ours(rule: Rule, logits, prompt, answer, stop):
    early = sorted(stop) if len(answer) < rule.min_new_tokens else ()
    return rule.scores(logits, np.array([*prompt, *answer]), early)


def softmax(scores):
    return torch.softmax(torch.from_numpy(np.asarray(scores, np.float64)), -1).numpy()


def cases(seed, count):
    """Random rules with logits, prompts and answers; every third has logits on a grid, so that many are equal."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        settings = {name: values[rng.integers(len(values))] for name, values in SETTINGS.items()}
        rule = Rule(sample=bool(rng.integers(4)), **settings)
        logits = (rng.standard_normal(VOCAB) * rng.choice([0.3, 3, 12])).astype(np.float32)
        if i % 3 == 0:
            logits = np.round(2 * logits) / 2
        prompt = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
        answer = rng.integers(0, VOCAB, rng.integers(0, 6)).tolist()
        stop = set(rng.integers(0, VOCAB, rng.integers(1, 4)).tolist())
        yield rule, logits, prompt, answer, stop


@pytest.mark.parametrize("seed", range(8))
def test_scores_keep_the_same_tokens_as_transformers_processors_with_the_same_probabilities(model, seed):
    cut, tied = 0, 0
    for case in cases(seed, 250):
        found, expected = ours(case[0], *case[1:]), theirs(model, case[0], *case[1:])
        if np.array_equal(found > -np.inf, expected > -np.inf):
            np.testing.assert_array_equal(found, expected)  # to the bit: the arithmetic is theirs
            np.testing.assert_allclose(softmax(found), softmax(expected), atol=1e-6)
            assert found.argmax() == expected.argmax()
        else:  # torch sorts equal logits in no order that it promises: which of them top-p keeps is open
            np.testing.assert_array_equal(np.sort(found), np.sort(expected), str(case[0]))
            least = found[found > -np.inf].min()
            assert np.array_equal(found > least, expected > least) and (case[1] == np.round(2 * case[1]) / 2).all()
            tied += 1
        cut += np.isinf(found).sum()
    assert cut > 1000 and tied < 40, "these rules must forbid tokens for this test to say anything"


def test_a_vocabulary_of_real_size_keeps_the_same_tokens(model):
    rng = np.random.default_rng(0)
    for top_p, top_k in itertools.product((0.5, 0.9, 0.999), (0, 50)):
        logits = (3 * rng.standard_normal(151_936)).astype(np.float32)
        rule = Rule(True, 0.7, top_k, top_p, 0.01, 1.05)
        found, expected = (f(rule, logits, [1, 2], [3], {5}) for f in (ours, lambda *a: theirs(model, *a)))
        assert np.array_equal(found > -np.inf, expected > -np.inf)
        np.testing.assert_allclose(softmax(found), softmax(expected), atol=1e-6)


def test_draws_come_as_often_as_their_probabilities():
    rng = np.random.default_rng(3)
    scores = (2 * rng.standard_normal(40)).astype(np.float32)
    scores[[4, 9]] = -np.inf
    n = 20_000
    counts = np.bincount([drawn(scores, seed=5, place=i) for i in range(n)], minlength=40)
    expected = softmax(scores) * n
    kept = expected > 5
    chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert counts[[4, 9]].sum() == 0
    assert chi < kept.sum() + 4 * np.sqrt(2 * kept.sum()), f"chi square {chi:.1f} over {kept.sum()} tokens"
    other = np.bincount([drawn(scores, seed=i, place=7) for i in range(n)], minlength=40)
    chi = ((other - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi < kept.sum() + 4 * np.sqrt(2 * kept.sum()), "seeds are as random as places"


def test_a_draw_is_repeated_by_its_seed_and_place_and_depends_on_both():
    logits = np.zeros(5000, np.float32)
    assert drawn(logits, 1, 1) == drawn(logits, 1, 1)
    assert len({drawn(logits, s, p) for s in range(5) for p in range(5)}) > 20


def test_similar_scores_mostly_draw_the_same_token():
    """So that the guard keeps drafts: with independent draws of these two only every 30th token would agree."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal(200).astype(np.float32)
    other = one + 0.1 * rng.standard_normal(200).astype(np.float32)
    assert np.mean([drawn(one, 1, i) == drawn(other, 1, i) for i in range(500)]) > 0.85


# ---------------------------------------------------------------- what is asked, and what the checkpoint says

QWEN = {"repetition_penalty": 1.05, "temperature": 0.01, "top_p": 0.001, "top_k": 1}


def test_answers_are_greedy_with_the_checkpoints_penalty_unless_sampling_is_asked_for():
    assert settle(None, {}) == PLAIN == Rule()
    assert settle(None, QWEN) == settle(Sampling(seed=3), QWEN) == Rule(repetition_penalty=1.05)
    assert settle(Sampling(temperature=0.0), QWEN) == Rule(repetition_penalty=1.05)
    assert settle(Sampling(repetition_penalty=1.0), QWEN) == PLAIN


def test_the_checkpoints_settings_are_the_defaults_of_sampling_and_transformers_top_k_where_it_has_none():
    assert settle(Sampling(sample=True, seed=4), QWEN) == Rule(True, 0.01, 1, 0.001, 0.0, 1.05, 4)
    assert settle(Sampling(temperature=0.7, seed=4), QWEN) == Rule(True, 0.7, 1, 0.001, 0.0, 1.05, 4)
    assert settle(Sampling(top_p=0.9, seed=4), {}) == Rule(True, 1.0, 50, 0.9, seed=4)
    assert settle(Sampling(top_k=0, seed=4), QWEN).top_k == 0
    assert GenerationConfig()._get_default_generation_params()["top_k"] == 50


def test_without_a_seed_every_answer_has_another_one(monkeypatch):
    assert len({settle(Sampling(sample=True), {}).seed for _ in range(5)}) == 5
    monkeypatch.setattr(secrets, "randbelow", lambda n: n - 1)
    assert settle(Sampling(sample=True), {}).seed == 2**31 - 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": 1e-40}, "too small"),
        ({"temperature": True}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"min_new_tokens": -2}, "min_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "at least 9"),
        ({"temperature": 0, "top_p": 0.9}, "leave top_p out"),
        ({"temperature": 0, "sample": True}, "leave sample out"),
        ({"sample": False, "temperature": 0.7}, "sample = False"),
        ({"sample": "yes"}, "sample"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(asked, words):
    with pytest.raises(InputError, match=words):
        Sampling(**asked)


def test_every_option_of_run_reaches_the_rule_also_where_its_value_is_0():
    left_out = dict.fromkeys(sampling_options.NAMES) | {"sample": False, "stop": ()}
    assert sampling_options.asked(left_out, None) == Sampling()
    zeros = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "min_new_tokens": 0}
    for name, value in zeros.items():
        assert sampling_options.asked(left_out | {name: value}, 5) == Sampling(seed=5, **{name: value})
    given = {"sample": True, "temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    given |= {"stop": ("a", "b"), "min_new_tokens": 2}
    assert set(given) == set(sampling_options.NAMES) and sampling_options.asked(given, 0) == Sampling(seed=0, **given)


def test_one_stop_string_may_be_given_as_text():
    assert Sampling(stop="\n").stop == ("\n",) and Sampling(stop=["a", "b"]).stop == ("a", "b")


# ---------------------------------------------------------------- choosing, token by token


def test_a_chooser_ends_at_any_of_its_stop_ids_and_not_before_the_minimum():
    logits = np.zeros(9, np.float32)
    logits[[2, 5, 7]] = 3, 2, 1
    choose = Chooser(Rule(min_new_tokens=2), np.array([0]), frozenset({2, 5}))
    assert [choose(logits, n) for n in range(3)] == [7, 7, None]


def test_a_stop_id_beyond_the_head_forbids_nothing():
    choose = Chooser(Rule(min_new_tokens=2, repetition_penalty=1.1), np.array([0, 40]), frozenset({40}))
    assert choose(np.arange(9, dtype=np.float32), 0) == 8


def test_the_penalty_counts_the_prompt_and_what_was_chosen():
    logits = np.array([1.0, 0.95, 0.9, -1.0], np.float32)
    choose = Chooser(Rule(repetition_penalty=1.2), np.array([0, 0]), frozenset())
    assert [choose(logits, n) for n in range(3)] == [1, 2, 0], "0 is in the prompt, then 1 and 2 were said"


@pytest.mark.parametrize("rule", [PLAIN, Rule(repetition_penalty=1.1), Rule(True, top_k=5, top_p=0.9)])
def test_logits_that_are_no_numbers_end_in_an_error_and_not_in_an_answer(rule):
    logits = np.zeros(9, np.float32)
    logits[3] = np.nan
    with pytest.raises(CmExportError, match="not numbers"), np.errstate(invalid="ignore"):
        Chooser(rule, np.array([1]), frozenset())(logits, 0)


def test_rows_of_one_batch_have_each_their_own_rule_seed_and_stop_string():
    """What each writes in company is what it writes alone."""
    from test_decode_loop import Backend, asked

    from cm_export.host.writing import Writing

    whos = [asked(seed, kind) for seed, kind in enumerate(("sparse", "dense", "listed", "sparse", "sparse"))]
    rules = [
        PLAIN,
        Rule(repetition_penalty=1.3),
        Rule(True, 0.8, top_k=6, seed=1),
        Rule(True, 1.5, seed=1),
        Rule(True, 1.5, seed=2),
    ]

    def rows():
        made = []
        for i, (who, rule) in enumerate(zip(whos, rules, strict=True)):
            prompt = np.arange(3 + i)
            writing = Writing(lambda ids: "".join(chr(97 + n) for n in ids), lambda _: True, ("b", "cd")[: i % 3])
            made.append(who.row(choose=Chooser(rule, prompt, frozenset({4})), writing=writing, limit=9 + i))
        return made

    alone, together = rows(), rows()
    for row in alone:
        list(decode(Backend(), [row]))
    list(decode(Backend(), together))
    assert [(r.ids, r.ended, r.writing.text) for r in alone] == [(r.ids, r.ended, r.writing.text) for r in together]
    assert len({tuple(r.ids) for r in alone}) == 5 and len({r.ended for r in alone}) > 1
