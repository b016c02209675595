"""The guard gives the dense model's answer whatever the sparse model says, and costs little when that is right."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import cm_export, wide
from random_models import request
from stepping import Decoder, outputs, step_feeds
from tolerances import agrees

from cm_export.backends.onnxruntime.backend import Rows
from cm_export.bundle.bundle import Bundle
from cm_export.evals.other_policies import with_policies
from cm_export.evals.tasks import easy_vqa
from cm_export.host import guard
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row
from cm_export.host.images import open_image
from cm_export.host.request import prefill_feeds
from cm_export.host.runner import Budget, Runner
from cm_export.host.sampling import PLAIN, Chooser
from cm_export.recipe.recipe import Recipe
from cm_export.source import checkpoint

PICTURE = Path(checkpoint.__file__).parent.parent / "demo" / "images" / "teal-circle.png"


@pytest.fixture(scope="module")
def runner(demo_bundle):
    whole = Runner(Bundle(demo_bundle), 1)
    return with_policies(whole, whole.recipe.replace(tokens__cache="index"))


def asked_of(runner, question):
    return runner.ask(question.text, runner.see([open_image(question.pictures[0])]))


_known: dict = {}


def unguarded(runner, question, **budget):
    """Token ids under a budget; each is asked for once, whatever guards it afterwards."""
    key = (question.text, question.pictures[0], *budget.items())
    if key not in _known:
        prefilled = runner.prefill(asked_of(runner, question), Budget(**budget))
        _known[key] = list(runner.tokens(prefilled, 20, runner.chat.stop_ids))
    return _known[key]


def answers(runner, question, every, **budget):
    """Token ids: dense, sparse, guarded; and the guard's report."""
    asked, stop, report = asked_of(runner, question), runner.chat.stop_ids, guard.Report(every)
    dense, sparse = unguarded(runner, question, dense=True), unguarded(runner, question, **budget)
    choose = Chooser(PLAIN, asked.ids, stop)
    guarded = list(guard.guarded(runner, runner.prefill(asked, Budget(**budget)), 20, choose, report))
    return dense, sparse, guarded, report


@pytest.mark.parametrize("every", [2, wide(5), 16])
def test_a_failing_case_becomes_the_dense_answer(runner, every):
    """At 10 % of the neurons and 11 % of the tokens hardly an answer is right without the guard."""
    questions, failed = easy_vqa.questions("sentence")[:240:40], 0
    for question in questions:
        dense, sparse, guarded, report = answers(runner, question, every, neuron_share=0.1, token_share=0.11)
        assert guarded == dense
        failed += sparse != dense
        assert report.kept <= report.drafted and (sparse == dense or report.kept < report.drafted)
    assert failed >= len(questions) // 2, "these budgets must break answers for this test to say anything"


def test_where_nothing_is_wrong_the_guard_only_checks(runner):
    """One dense pass for every 16 tokens, each reading the weights once: at most 1 / 16 dense reads a token, and one more."""
    for question in easy_vqa.questions("sentence")[:100:20]:
        dense, sparse, guarded, report = answers(runner, question, 16, neuron_share=0.9, token_share=0.9)
        assert dense == sparse == guarded
        assert (report.drifts, report.dense_steps, report.actions) == (0, 0, [])
        assert report.checks <= len(dense) / 16 + 1 and report.kept == report.drafted


def test_it_climbs_from_more_neurons_over_tokens_to_dense(runner):
    question = easy_vqa.questions("sentence")[0]
    _, _, _, report = answers(runner, question, 3, neuron_share=0.001, token_share=0.02)
    what = [a.split(" after")[0] for a in report.actions]
    assert what == sorted(what, key=guard.LADDER.index) and what.count("more neurons") >= 1
    assert report.drifts == len(report.actions)


def test_bringing_the_tokens_back_mends_an_answer_that_only_lacks_them(runner):
    """With every neuron, tokens are the only thing missing: after the step back every draft is kept."""
    back = 0
    for question in easy_vqa.questions("sentence")[:240:20]:
        dense, sparse, guarded, report = answers(runner, question, 4, neuron_share=1.0, token_share=0.02)
        assert guarded == dense
        if report.actions:
            assert sparse != dense and report.actions[0].startswith("tokens back") and len(report.actions) == 1
            back += 1
        if back == 3:
            break
    assert back >= 3, "this budget must break answers for this test to say anything"


@pytest.mark.parametrize(
    "bug",
    [lambda self, lengths: self, lambda self, lengths: _last(self, lengths)],
    ids=["nothing is forgotten", "the first rows are forgotten"],
)
def test_a_cache_that_is_not_truncated_rightly_is_noticed(runner, bug, monkeypatch):
    """The tests above can fail: with this bug planted they would."""
    monkeypatch.setattr(Rows, "truncated", bug)
    assert any(_answers_wrongly(runner, question) for question in easy_vqa.questions("sentence")[:240:40])


def _answers_wrongly(runner, question):
    try:
        dense, _, guarded, _ = answers(runner, question, 5, neuron_share=0.1, token_share=0.11)
    except RuntimeError as e:  # ONNX Runtime refuses a mask that is shorter than the cache
        assert "total_sequence_length" in str(e)
        return True
    return guarded != dense


def _last(cache, lengths):
    return Rows.of({n: np.ascontiguousarray(v[:, :, -lengths[0] :]) for n, v in cache.arrays().items()})


def test_several_tokens_at_once_are_the_same_numbers_in_the_session_made_for_it(exported):
    for seed in (1, 5):
        x = exported(seed)
        backend = x.backend(Recipe().replace(tokens__prune_layer=1))
        asked = request(x, seed)
        out = outputs(backend, "prefill_dense", prefill_feeds(asked))
        for tokens in ([3], [3, 4], list(range(7, 24))):
            one, other = (Decoder(backend, "decode_dense", out, {}, few_rows=f) for f in (False, True))
            feeds = step_feeds(asked, tokens, 0)
            agrees("same numbers", other.read(feeds), one.read(feeds))
            for name, value in one.cache.items():
                agrees("same numbers", other.cache[name].numpy(), value.numpy())


def test_the_report_tells_what_the_same_answer_costs_without_checks():
    """Ten drafted, eight kept, two more tokens came free with the checks: ten sparse steps, two in vain."""
    report = guard.Report(16, checks=3, drafted=10, kept=8, free=2, draft_s=1.0, check_s=0.25)
    assert report.to_dict()["sparse_s"] == 1.0 and report.to_dict()["overhead"] == 0.25
    assert guard.Report(16).to_dict()["overhead"] is None


@pytest.mark.parametrize("seed", [1, 5])
def test_a_truncated_cache_is_the_cache_before(exported, seed):
    x = exported(seed)
    backend = x.backend(Recipe().replace(tokens__prune_layer=1))
    asked = request(x, seed)
    found, cache = backend.prefill(prefill_feeds(asked), "prefill_dense")
    core, reader = CoreSet.whole(x.shape), Reader(backend)
    one, other = (Row(asked, core, cache, found["logits"][0], graph="decode_dense") for _ in range(2))
    reader.read([one], [[3, 4]])
    reader.read([other], [[3, 4, 5, 6]])
    other.back_to(2)
    for row in (one, other):
        reader.read([row], [[7]])
    agrees("same numbers", other.last, one.last)
    before = one.last
    reader.read([one], [[7]])
    assert not np.array_equal(before, one.last)


def test_run_reports_what_the_guard_did_and_refuses_a_bundle_that_cannot_be_checked(demo_bundle, whole_bundle):
    run = ["run", demo_bundle, "--image", PICTURE, "--prompt", "describe : what shape is in the image?", "--guard"]
    done = cm_export(*run, "--quiet")
    assert done.returncode == 2 and "--token-cache index" in done.stderr and done.stderr.count("\n") == 1
    run[1] = whole_bundle
    found = json.loads(cm_export(*run, "--neuron-share", "0.05", "--guard-every", "4", "--json").stdout)
    dense = json.loads(cm_export(*[w for w in run if w != "--guard"], "--dense", "--json").stdout)
    assert found["token_ids"] == dense["token_ids"] and "guard" not in dense
    assert found["guard"]["checks"] >= 2 and found["guard"]["regenerated"] >= 1 and found["guard"]["every"] == 4
    assert found["tokens_per_s"] == len(found["token_ids"]) / (found["guard"]["draft_s"] + found["guard"]["check_s"])
    told = cm_export(*run).stderr
    assert "guard: 1 checks, 10 of 10 drafted tokens kept" in told  # nine and the stop token
