"""Every law of the method can fail: a bug is planted in the code, and the law's own test must see it.

(a) all neurons + all tokens = dense    (b) permuting neurons permutes ids    (c) constant z: ids 0..K-1    (d) the knee
(e) index-gather FFN = masked FFN       (g) pictures of different sizes       (h) a dead neuron             (i) own row

Laws (f) and the quotas of (g) have theirs in test_token_cuts.py.
"""

import dataclasses
import inspect

import numpy as np
import onnx
import pytest
import test_core_ffn
import test_export
import test_policies
import test_qwen2_vl_host
import test_surgery

from cm_export.base import core_index
from cm_export.families import qwen2_vl
from cm_export.host.core_rows import CoreRows
from cm_export.plugins.core_ffn import body


def fails(test, *args):
    """The test sees the bug. A property is tried on one fixed example, so that nothing is left to chance."""
    inner = getattr(test, "hypothesis", None)
    with pytest.raises(AssertionError):
        (inner.inner_test if inner else test)(*args)


def holds(test, *args):
    inner = getattr(test, "hypothesis", None)
    (inner.inner_test if inner else test)(*args)


class Draws:
    """Stands in for hypothesis' data() where a test draws a number: always the same one."""

    def __init__(self, value):
        self.value = value

    def draw(self, strategy):
        return self.value


CASE = test_core_ffn.Case("request", B=2, S=3, D=12, F=20, K=7, ascending=False, seed=3)
UP = "up_BDN = Transpose <perm = [0, 2, 1]> (up_rows)"
# The up projection takes the first K rows, whatever is listed.
UP_BY_PLACE = """
        bug_first = Constant <value_int = 0> ()
        bug_step = Constant <value_int = 1> ()
        bug_K = Shape <start = 1> (neurons)
        bug_size = Squeeze (bug_K)
        bug_place = Range (bug_first, bug_size, bug_step)
        bug_place_BK = Add (bug_place, bug_zeros)
        bug_rows = Gather <axis = 0> (w_up, bug_place_BK)
        up_BDN = Transpose <perm = [0, 2, 1]> (bug_rows)"""


@pytest.fixture
def up_by_place(monkeypatch):
    project, combine = body.FORMS["request"]
    assert UP in project
    zeros = "bug_zeros = Sub (neurons, neurons)"
    bugged = project.replace(UP, zeros + UP_BY_PLACE)
    monkeypatch.setitem(body.FORMS, "request", (bugged, combine))
    test_core_ffn.session.cache_clear()
    yield
    test_core_ffn.session.cache_clear()


def test_law_b_sees_an_ffn_that_reads_places_instead_of_ids(up_by_place):
    fails(test_core_ffn.test_law_b_permuting_neurons_permutes_only_their_ids, CASE, 1)


def test_law_e_sees_an_ffn_that_reads_places_instead_of_ids(up_by_place):
    fails(test_core_ffn.test_law_e_body_equals_masked_dense_ffn_at_generated_sizes, CASE)


def test_law_h_sees_an_ffn_that_reads_places_instead_of_ids(up_by_place):
    fails(test_core_ffn.test_law_h_dropping_a_dead_neuron_changes_nothing, CASE, "w_gate", Draws(0))


def test_the_same_examples_hold_without_the_bug():
    holds(test_core_ffn.test_law_b_permuting_neurons_permutes_only_their_ids, CASE, 1)
    holds(test_core_ffn.test_law_e_body_equals_masked_dense_ffn_at_generated_sizes, CASE)
    holds(test_core_ffn.test_law_h_dropping_a_dead_neuron_changes_nothing, CASE, "w_gate", Draws(0))


def test_law_a_sees_a_layer_that_gets_another_layers_rows(exported, monkeypatch):
    real = CoreRows.gather

    def shifted(self, cores):
        found, layers = real(self, cores), len(self.sources)
        rows = found.rows.items()
        found.rows = {n.replace(f".{i}.", f".{(i + 1) % layers}."): v for n, v in rows for i in [int(n.split(".")[1])]}
        return found

    monkeypatch.setattr(CoreRows, "gather", shifted)
    fails(test_export.test_answers_equal_stock_generate, exported, 1)


def test_law_b_sees_scores_that_depend_on_the_place(monkeypatch):
    real = test_policies.neuron_score

    def by_place(name, z, *args, **more):
        score = real(name, z, *args, **more)
        return score + np.arange(score.shape[-1], dtype=np.float32)

    monkeypatch.setattr(test_policies, "neuron_score", by_place)
    case = np.random.default_rng(0).standard_normal((1, 4, 9)).astype(np.float32), np.ones((1, 4), np.float32)
    fails(test_policies.test_law_b_permuting_neurons_permutes_only_the_ids, "griffin", case, 5)


def test_law_c_sees_ties_that_go_to_the_higher_id(monkeypatch):
    def last_first(scores, count):
        return (scores.shape[-1] - 1 - real(scores[..., ::-1], count))[..., ::-1].astype(np.int32)

    real = core_index._select
    monkeypatch.setattr(core_index, "_select", last_first)
    fails(test_policies.test_law_c_constant_z_selects_the_first_ids, "griffin", 1, 3, 12, 0.3, Draws(5))


@pytest.mark.parametrize(
    ("curve", "count"), [([10, 10, 9, 7, 0], test_policies.FALLBACK), ([100, 60, 30, 20, 15, 12, 10], 2)]
)
def test_law_d_sees_a_knee_on_either_side_of_the_chord(monkeypatch, curve, count):
    """Both meanings take the largest deviation without its sign, so they agree; only the known answers tell."""
    unsigned = onnx.FunctionProto()
    unsigned.CopyFrom(test_policies.KNEE_COUNT)
    node = next(n for n in unsigned.node if "deviation" in n.output)
    node.output[0] = "signed"
    sign = onnx.helper.make_node("Abs" if count == test_policies.FALLBACK else "Neg", ["signed"], ["deviation"])
    unsigned.node.insert(list(unsigned.node).index(node) + 1, sign)
    monkeypatch.setitem(test_policies.FUNCTIONS, "KneeCount", unsigned)
    monkeypatch.setattr(test_policies, "KNEE_COUNT", unsigned)
    source = inspect.getsource(test_policies.knee_count)
    turned = "below.abs()" if count == test_policies.FALLBACK else "-below"
    line = "below = (first - curve) * (size - 1) + (last - first) * rank"
    assert line in source
    space = dict(vars(inspect.getmodule(test_policies.knee_count)))
    exec(source.replace(line, f"{line}\n    below = {turned}"), space)
    monkeypatch.setattr(test_policies, "knee_count", space["knee_count"])
    test_policies.session.cache_clear()
    try:
        fails(test_policies.test_law_d_knee_of_known_curves, curve, count)
    finally:
        test_policies.session.cache_clear()


def test_law_g_sees_positions_that_count_every_image_token(monkeypatch):
    """After a picture, text goes on behind its longer side, not behind all of its tokens."""
    real = qwen2_vl.Qwen2VL.positions

    def by_tokens(self, picture, pictures):
        positions, nxt = real(self, picture, pictures)
        every = np.broadcast_to(np.arange(len(picture)), positions.shape), len(picture)
        return every if pictures.layouts else (positions, nxt)

    monkeypatch.setattr(qwen2_vl.Qwen2VL, "positions", by_tokens)
    fails(test_qwen2_vl_host.test_positions_equal_transformers, [(2, 3, 4), (1, 2, 5)], 3)


def test_law_i_sees_every_layer_reading_the_first_layers_neurons(exported, monkeypatch):
    def first(core):
        return dataclasses.replace(core, neurons=np.repeat(core.neurons[:1], len(core.neurons), 0))

    real = CoreRows.gather
    monkeypatch.setattr(CoreRows, "gather", lambda self, cores: real(self, [first(core) for core in cores]))
    fails(test_surgery.test_decode_computes_exactly_the_chosen_neurons_of_its_own_layer, exported, 1, "griffin")


def test_a_planted_bug_would_not_pass_unseen():
    """`fails` itself can fail: a law that holds is reported as a bug that nobody saw."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        fails(lambda: None)
