"""Policy active: every product of decode reads what is above the request's thresholds, in every runtime form the same."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import active_bundle
from tolerances import agrees

from cm_export.base.errors import BundleError, InputError
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.thresholds import FFN_OUT, SIDES, Thresholds
from cm_export.calibrating.thresholds import Watched, measure
from cm_export.evals.tasks import easy_vqa
from cm_export.evals.weights_read import Steps, of_dense
from cm_export.host import guard
from cm_export.host.decode import Reader, decode
from cm_export.host.drafting import Costs, Habits
from cm_export.host.images import open_image
from cm_export.host.runner import Budget, Runner
from cm_export.host.sampling import PLAIN, Chooser
from cm_export.plugins.contract import model
from cm_export.plugins.core_ffn import op as ffn
from cm_export.plugins.core_linear.op import OP, Case
from cm_export.plugins.cpu import library
from cm_export.policies.neurons.active import keeps
from cm_export.recipe.recipe import from_dict


def session(case):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model(OP, case).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_the_body_of_core_linear_is_the_product_over_kept_channels(case):
    feeds = case.feeds()
    agrees(f"op {case.dtype}", session(case).run(None, feeds)[0], OP.oracle(feeds, case.attributes)["y"])


@pytest.mark.parametrize("seed", range(20))
def test_torch_and_onnx_keep_the_same_channels(seed):
    """Read off a product with the unit matrix, and off the z of CoreFFN."""
    rng = np.random.default_rng(seed)
    case = Case(B=int(rng.integers(1, 4)), S=int(rng.integers(1, 5)), D=int(rng.integers(1, 60)), kept=0.5, seed=seed)
    feeds = case.feeds() | {"w": np.eye(case.D, dtype=np.float32)}
    kept = keeps(*(torch.from_numpy(feeds[n]) for n in ("x", "norm")), torch.from_numpy(feeds["threshold"][:, 0]))
    assert np.array_equal(session(case).run(None, feeds)[0] != 0, kept.numpy())
    assert 0 < kept.sum() < kept.numel() or case.D < 4

    of_ffn = ffn.Case("active", B=2, S=3, D=20, F=40, K=15, seed=seed)
    feeds = of_ffn.feeds()
    run = ort.InferenceSession(model(ffn.OP, of_ffn).SerializeToString(), providers=["CPUExecutionProvider"])
    z = torch.from_numpy(run.run(["z"], feeds | {"z_threshold": np.zeros((2, 1), np.float32)})[0])
    kept = keeps(z, torch.from_numpy(feeds["z_norm"]), torch.from_numpy(feeds["z_threshold"][:, 0]))
    assert np.array_equal(run.run(["z"], feeds)[0] != 0, kept.numpy())


def test_a_channel_that_is_no_number_is_seen_in_the_result():
    case = Case(D=8, kept=0.5)
    feeds = case.feeds()
    feeds["x"][0, 0, 3] = np.nan
    assert np.isnan(session(case).run(None, feeds)[0]).all()


# ---------------------------------------------------------------------------------------------------- thresholds
def table(layers=3, seed=0):
    rng = np.random.default_rng(seed)
    sites, levels = SIDES * layers + 1, np.array([0.2, 0.5, 0.8, 1.0], np.float32)
    falling = -np.sort(-rng.uniform(0.1, 3, (sites, 3)), axis=1)
    thresholds = np.concatenate([falling, np.zeros((sites, 1))], 1).astype(np.float32)
    sensitivity, sizes = rng.uniform(1e-5, 1, sites), rng.integers(100, 9000, sites)
    return Thresholds(levels, thresholds, sensitivity.astype(np.float32), sizes.astype(np.float32))


@pytest.mark.parametrize("ffn_share", [0.35, 0.6, 0.73, 1.0])
@pytest.mark.parametrize("rest", [0.5, 0.9, 1.0])
def test_allotted_shares_read_what_was_asked_for_and_spare_the_sensitive(ffn_share, rest):
    found = table()
    shares = found.shares(ffn_share, rest)
    for sites, target in ((found.of_ffn, ffn_share), (~found.of_ffn, rest)):
        assert np.average(shares[sites], weights=found.sizes[sites]) == pytest.approx(target, abs=1e-3)
        assert (np.diff(shares[sites][np.argsort(found.sensitivity[sites])]) >= -1e-9).all()
    thresholds = found.at(shares)
    assert ((thresholds == 0) == (shares == 1)).all()
    assert (found.at(np.minimum(1, shares + 0.05)) <= thresholds).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: replace(t, levels=t.levels[::-1]),
        lambda t: replace(t, levels=t.levels - 0.1),
        lambda t: replace(t, thresholds=t.thresholds[:, ::-1]),
        lambda t: replace(t, thresholds=t.thresholds + 1),
        lambda t: replace(t, sensitivity=t.sensitivity[:-1]),
        lambda t: replace(t, sizes=t.sizes * np.nan),
        lambda t: Thresholds(t.levels, t.thresholds[:-1], t.sensitivity[:-1], t.sizes[:-1]),
    ],
)
def test_arrays_that_cannot_be_thresholds_are_refused(spoil):
    with pytest.raises(BundleError, match="thresholds cannot be"):
        spoil(table())


# ---------------------------------------------------------------------------------------------------- a bundle
@pytest.fixture(scope="module", params=["fp32", "int8"])
def active(request, demo_bundle):
    return Bundle(active_bundle(demo_bundle, request.param))


@pytest.fixture(scope="module")
def runner(active):
    return Runner(active, 1)


@pytest.fixture(scope="module")
def asked(runner):
    questions = easy_vqa.questions("sentence")[:240:40]
    return [runner.ask(q.text, runner.see([open_image(q.pictures[0])])) for q in questions]


def logits_along(runner, prefilled, ids, **row):
    one = prefilled.row(**row)
    Reader(runner.backend).read([one], [ids])
    return np.atleast_2d(one.logits)


def test_a_share_of_one_is_the_dense_model(runner, asked):
    ids = [5, 9, 12, 4]
    for request in asked[:3]:
        dense = logits_along(runner, runner.prefill(request, Budget(dense=True)), ids)
        whole = logits_along(runner, runner.prefill(request, Budget(neuron_share=1.0)), ids)
        agrees("same numbers", whole, dense)
        fewer = logits_along(runner, runner.prefill(request, Budget(neuron_share=0.3)), ids)
        assert np.abs(fewer - dense).max() > 1e-3


def test_the_functions_of_the_graph_say_the_same_as_what_runs(active, runner, asked):
    """Another runtime inlines the bodies that the graph brings along; here they run without any lowering."""
    if active.packed is not None:
        pytest.skip("its graphs are those of the float32 bundle, with other weights")
    own = onnx.load(active.graph("decode"), load_external_data=False)
    assert {n.op_type for n in own.graph.node} >= {"CoreFFN", "CoreLinear"}
    run = ort.InferenceSession(str(active.graph("decode")), providers=["CPUExecutionProvider"])
    prefilled = runner.prefill(asked[0], Budget())
    row, ids = prefilled.row(), [5, 9]
    feeds = {"inputs_embeds": asked[0].embedded(ids)[None], "position_ids": asked[0].positions_after(0, 2)[:, None]}
    feeds |= {"attention_mask": row.mask(2)[None], "core_thresholds": prefilled.core_set.thresholds[None]}
    feeds |= prefilled.cache.arrays()
    agrees("same numbers", run.run(["logits"], feeds)[0][0], logits_along(runner, prefilled, ids))


def test_requests_of_unequal_shares_decode_together_as_alone(runner, asked):
    shares = (0.3, 0.6, 1.0, None)
    alone = []
    for request, share in zip(asked, shares, strict=False):
        alone.append(list(runner.tokens(runner.prefill(request, Budget(neuron_share=share)), 16, runner.chat.stop_ids)))
    rows = [runner.prefill(r, Budget(neuron_share=s)).row(limit=16) for r, s in zip(asked, shares, strict=False)]
    for row, request in zip(rows, asked, strict=False):
        row.choose = Chooser(PLAIN, request.ids, runner.chat.stop_ids)
    for _ in decode(runner.backend, rows):
        pass
    assert [row.ids for row in rows] == alone


@pytest.fixture
def cheap(runner, monkeypatch):
    """Sparse steps cost what they read and a check one step, as in a model of real size; nothing is known of drafts yet."""
    monkeypatch.setattr(Costs, "known", True)
    monkeypatch.setattr(Costs, "check", lambda self, rows: 1.15)
    monkeypatch.setattr(Costs, "sparse", lambda self, share, read: read())
    monkeypatch.setattr(runner, "habits", Habits())


def test_the_guard_gives_the_dense_answer_and_drafts_with_thresholds(runner, asked, cheap):
    for request in asked:
        stop, report = runner.chat.stop_ids, guard.Report(4)
        dense = list(runner.tokens(runner.prefill(request, Budget(dense=True)), 16, stop))
        prefilled = runner.prefill(request, Budget(neuron_share=0.25))
        assert list(guard.guarded(runner, prefilled, 16, Chooser(PLAIN, request.ids, stop), report)) == dense
        assert report.drafted


def test_drafts_become_sparser_while_they_are_right_and_stop_where_they_do_not_pay(runner, asked, cheap, monkeypatch):
    """Answers of the trained model as far as they go, then drafts of which every one is wrong."""
    monkeypatch.setattr(guard, "_known", lambda *a: None)
    drafted = guard._drafted

    def guarded(request, stop, limit):
        dense = list(runner.tokens(runner.prefill(request, Budget(dense=True)), limit, stop))
        report, prefilled = guard.Report(4), runner.prefill(request, Budget(neuron_share=0.6))
        assert list(guard.guarded(runner, prefilled, limit, Chooser(PLAIN, request.ids, stop), report)) == dense
        return report

    for request in asked[:3]:
        good = guarded(request, runner.chat.stop_ids, 20)
        assert good.share < 0.6 and good.gain > 1 and good.kept == good.drafted and not good.dense_steps

    def wrong(*how):
        (first, *others), took = drafted(*how)
        return [first, *((t + 1) % 90 for t in others)], took

    monkeypatch.setattr(guard, "_drafted", wrong)
    bad = guarded(asked[0], frozenset(), 60)
    assert bad.gain < 1 and bad.dense_steps > 30 and bad.share > 0.6


def test_what_was_written_before_is_drafted_for_nothing(runner, asked, cheap):
    """An answer that goes on without an end repeats itself."""
    request, report = asked[0], guard.Report(8)
    dense = list(runner.tokens(runner.prefill(request, Budget(dense=True)), 60, frozenset()))
    prefilled = runner.prefill(request, Budget())
    assert list(guard.guarded(runner, prefilled, 60, Chooser(PLAIN, request.ids, frozenset()), report)) == dense
    assert report.looked_up_kept > 0 and report.looked_up_kept <= report.looked_up


def test_a_later_question_is_read_densely_and_answered_by_thresholds(runner, asked):
    prefilled = runner.prefill(asked[0], Budget())
    answer = list(runner.tokens(prefilled, 16, runner.chat.stop_ids))
    later = prefilled.then([*answer, 5, 9])
    assert later.core_set.thresholds is not None and list(runner.tokens(later, 4, frozenset()))


def test_fewer_bytes_are_read_as_the_share_says(active, runner, asked):
    if active.packed is None or library.find() is None:
        pytest.skip("float32 products read every row")
    read = {}
    for share in (1.0, 0.6, 0.3):
        prefilled = runner.prefill(asked[0], Budget(neuron_share=share))
        row = prefilled.row()
        Reader(runner.backend).read([row], [[5]])
        library.reset()
        for token in (9, 12, 4, 20):
            Reader(runner.backend).read([row], [[token]])
        was_read, dense = library.counts()
        read[share] = was_read / dense
    assert read[1.0] == 1
    left_out = (1 - 0.95) * (1 - 0.3) / (1 - 0.6)  # of the products besides the FFNs, recipe's rest_share being .95
    assert 0.15 < read[0.3] < read[0.6] - 0.15 < 0.7 and read[0.3] < 1 - left_out + 0.1


def test_bits_read_are_counted_where_the_library_runs_and_else_what_thresholds_let_expect(active, runner, asked):
    def read(budget):
        prefilled, steps = runner.prefill(asked[0], budget), Steps(runner)
        row = prefilled.row()
        Reader(runner.backend).read([row], [[5]])
        with steps.counted():
            for token in (9, 12, 4, 20):
                Reader(runner.backend).read([row], [[token]])
        return steps.per_step(prefilled, 4), steps.per_step(prefilled, 0), prefilled.core_set

    dense, same, _ = read(Budget(dense=True))
    assert dense.bytes == same.bytes == of_dense(runner).bytes, "what is read of everything is known beforehand"
    for share in (0.6, 0.3):
        counted, expected, core = read(Budget(neuron_share=share))
        shape = active.shape
        if active.packed is None:  # every masked weight is multiplied all the same: not what was read
            needed = (32 * shape.weights * core.read + 32 * shape.hidden) / (shape.weights + shape.hidden)
            assert counted.bits == pytest.approx(needed, rel=1e-6) and not counted.exact
        elif library.find() is not None:
            assert counted.exact and not expected.exact and counted.bytes != expected.bytes
            assert counted.bits == pytest.approx(expected.bits, rel=0.15) and counted.bits < 0.95 * dense.bits
            of_neurons = float(core.counts.mean()) / shape.ffn  # of z alone: not what the other products read
            assert counted.bits > 1.15 * of_neurons * dense.bits


def test_shares_below_what_was_measured_are_refused(runner, asked):
    with pytest.raises(InputError, match=r"a share of 0.1.*give 0.2 or more"):
        runner.prefill(asked[0], Budget(neuron_share=0.1))


def test_the_manifest_says_where_thresholds_come_from(active, runner, asked):
    assert active.manifest["measured"].endswith("in the build")
    found = active.thresholds
    assert found.layers == active.shape.layers and (found.sensitivity > 0).all()
    shares = found.shares(active.recipe.neurons.share, active.recipe.neurons.rest_share)
    of_z = shares[FFN_OUT : SIDES * found.layers : SIDES]  # neurons are counted as thresholds were allotted
    assert (
        runner.prefill(asked[0], Budget()).core_set.counts == np.rint(of_z * active.shape.ffn)
    ).all() and of_z.min() < 1


def test_products_that_cannot_be_tried_in_time_count_the_same(active, runner, asked):
    sizes = active.thresholds.sizes
    watched = Watched([np.linspace(0, 1, 50, dtype=np.float32) for _ in sizes], [], sizes)
    answers = [(asked[0], np.array([5, 6]))]
    tried, untried = (measure(runner, answers, watched, 64, lambda *a: None, seconds) for seconds in (60, 0))
    assert (tried.sensitivity != 1).any() and (untried.sensitivity == 1).all()


@pytest.mark.parametrize(
    ("neurons", "words"),
    [
        ({"share": 0.1}, r"neurons.share = 0.1 with active; give 0.2 or more"),
        ({"rest_share": 0.1}, r"neurons.rest_share = 0.1 with active"),
        ({"block": 8}, r"neurons.block with active"),
        ({"layers": "calibrated"}, r"neurons.layers with active"),
        ({"fill": "prompt"}, r"neurons.fill with active"),
    ],
)
def test_what_thresholds_cannot_be_combined_with_is_refused(neurons, words):
    with pytest.raises(InputError, match=words):
        from_dict({"neurons": {"policy": "active", **neurons}, "calibration": "x.safetensors"})


def test_thresholds_that_differ_change_what_is_chosen(runner, asked, monkeypatch):
    """Were the input not read, every share would give the same."""
    found = {}
    for share in (0.25, 1.0):
        prefilled = runner.prefill(asked[1], Budget(neuron_share=share))
        found[share] = logits_along(runner, prefilled, [5, 9])
    assert not np.array_equal(found[0.25], found[1.0])
