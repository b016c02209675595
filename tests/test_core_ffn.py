"""CoreFFN: its body in ONNX Runtime equals the masked dense FFN, and the laws of a neuron index hold."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import agrees
from transformers.activations import ACT2FN

from cm_export.base.errors import InputError, SurgeryError
from cm_export.base.onnx_text import DOMAIN
from cm_export.plugins.contract import model, node_attributes
from cm_export.plugins.core_ffn.body import SCALES, WEIGHTS
from cm_export.plugins.core_ffn.op import ACTIVATIONS, MEANINGS, OP, Case, function
from cm_export.plugins.core_ffn.pack import quantize, unpack

REQUEST = Case("request", B=3, S=4, D=19, F=31, K=12)
TOKEN = replace(REQUEST, index="token")
LAWS = settings(max_examples=100, deadline=None)  # no deadline: the first example of a form builds the session


@functools.cache
def session(index, activation, dtype, block=1, bits=0, group=0):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    form = Case(index, activation=activation, dtype=dtype, F=4 * block, K=2, block=block, bits=bits, group=group)
    proto = model(OP, replace(form, D=2 * group if bits else 16))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case, feeds):
    own = session(case.index, case.activation, case.dtype, case.block, case.bits, case.group)
    y, z = own.run(["y", "z"], feeds)
    assert y.dtype == z.dtype == case.dtype
    return y, z


def equals_oracle(case):
    feeds = case.feeds()
    expected = OP.oracle(feeds, case.attributes)
    for got, name in zip(run(case, feeds), ("y", "z"), strict=True):
        agrees(f"op {case.dtype}", got, expected[name])


@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_body_equals_masked_dense_ffn(case):
    equals_oracle(case)


@st.composite
def generated(draw, forms=("none", "request", "token")):
    neurons = draw(st.integers(1, 40))
    return Case(
        draw(st.sampled_from(forms)),
        B=draw(st.integers(1, 3)),
        S=draw(st.integers(1, 5)),
        D=draw(st.integers(1, 40)),
        F=neurons,
        K=draw(st.integers(1, neurons)),
        activation=draw(st.sampled_from(["silu", "gelu_pytorch_tanh", "relu2"])),
        ascending=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@LAWS
@given(generated())
def test_law_e_body_equals_masked_dense_ffn_at_generated_sizes(case):
    equals_oracle(case)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_transformers(name):
    gate = np.linspace(-8, 8, 4801, dtype=np.float32)
    x = np.stack([gate, np.ones_like(gate)], axis=-1)[None]  # gate reads the first column, up the second: z = act(gate)
    feeds = {"x": x} | dict(zip(WEIGHTS, np.array([[[1, 0]], [[0, 1]], [[1, 1]]], np.float32), strict=True))
    expected = ACT2FN[name](torch.from_numpy(gate.astype(np.float64))).numpy()
    agrees("activation float32", run(Case("none", activation=name), feeds)[1][0, :, 0], expected)
    agrees("activation float64", MEANINGS[name](gate.astype(np.float64)), expected)


def test_every_activation_has_a_meaning_and_back():
    assert list(ACTIVATIONS) == list(MEANINGS)


def test_all_neurons_listed_is_the_dense_form():
    case = replace(REQUEST, K=REQUEST.F)
    feeds = case.feeds()
    dense = run(replace(case, index="none"), {n: a for n, a in feeds.items() if n != "core_neurons"})
    for got, expected in zip(run(case, feeds), dense, strict=True):
        agrees("same numbers", got, expected)


@pytest.mark.parametrize("case", [REQUEST, TOKEN], ids=["request", "token"])
def test_order_of_the_ids_orders_z_and_leaves_y(case):
    feeds = case.feeds()
    y, z = run(case, feeds)
    order = np.random.default_rng(1).permutation(case.K)
    y2, z2 = run(case, feeds | {"core_neurons": feeds["core_neurons"][..., order]})
    agrees("same numbers", y2, y)
    agrees("same numbers", z2, z[..., order])


@LAWS
@given(generated(("request", "token")), st.integers(0, 2**32 - 1))
def test_law_b_permuting_neurons_permutes_only_their_ids(case, seed):
    feeds = case.feeds()
    order = np.random.default_rng(seed).permutation(case.F)
    moved = {n: feeds[n][order] for n in WEIGHTS} | {
        "core_neurons": np.argsort(order)[feeds["core_neurons"]].astype(np.int32)
    }
    for got, expected in zip(run(case, feeds | moved), run(case, feeds), strict=True):
        agrees("same numbers", got, expected)


def test_each_request_reads_its_own_row():
    feeds = REQUEST.feeds()
    assert len({tuple(row) for row in feeds["core_neurons"]}) == REQUEST.B
    y, z = run(REQUEST, feeds)
    for b in range(REQUEST.B):
        alone = run(REQUEST, feeds | {n: feeds[n][b : b + 1] for n in ("x", "core_neurons")})
        agrees("same numbers", alone[0], y[b : b + 1])
        agrees("same numbers", alone[1], z[b : b + 1])


def test_one_set_for_every_token_is_the_request_form():
    feeds = REQUEST.feeds()
    per_token = np.repeat(feeds["core_neurons"][:, None], REQUEST.S, axis=1)
    for got, expected in zip(run(TOKEN, feeds | {"core_neurons": per_token}), run(REQUEST, feeds), strict=True):
        agrees("same numbers", got, expected)


@LAWS
@given(generated(("request", "token")), st.sampled_from(WEIGHTS), st.data())
def test_law_h_dropping_a_dead_neuron_changes_nothing(case, dead, data):
    case = replace(case, B=1, S=1, F=case.F + 1, K=case.K + 1)
    feeds = case.feeds()
    ids, place = feeds["core_neurons"], data.draw(st.integers(0, case.K - 1))
    feeds[dead][ids[..., place]] = 0  # act(0) = 0, so a zero row in any matrix silences the neuron
    y, _ = run(case, feeds)
    without, _ = run(case, feeds | {"core_neurons": np.delete(ids, place, axis=-1)})
    agrees("same numbers", without, y)


@pytest.mark.parametrize("case", [REQUEST, TOKEN], ids=["request", "token"])
def test_neurons_that_nobody_lists_are_not_read(case):
    feeds = case.feeds()
    feeds["core_neurons"] %= case.F - 1  # nobody lists the last one now
    expected = run(case, feeds)
    for name in WEIGHTS:
        feeds[name][-1] = np.nan
    for got, same in zip(run(case, feeds), expected, strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("index", ["request", "token"])
@pytest.mark.parametrize("block", [2, 8, 32])
def test_a_block_is_its_neurons_in_their_order(index, block):
    blocks = Case(index, B=2, S=3, D=19, F=96, K=2, block=block, ascending=False)
    feeds = blocks.feeds()
    neurons = feeds["core_neurons"][..., None] * block + np.arange(block, dtype=np.int32)
    alone = feeds | {"core_neurons": neurons.reshape(*feeds["core_neurons"].shape[:-1], -1)}
    for got, expected in zip(run(blocks, feeds), run(replace(blocks, block=1), alone), strict=True):
        agrees("same numbers", got, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_words_mean_the_numbers_that_unpack_gives(bits):
    packed = Case("request", B=2, S=3, D=64, F=31, K=12, bits=bits, group=16)
    feeds = packed.feeds()
    plain = {n: a for n, a in feeds.items() if n not in SCALES}
    for weight, scales in zip(WEIGHTS, SCALES, strict=True):
        plain[weight] = unpack(feeds[weight], feeds[scales], bits)
    for got, expected in zip(run(packed, feeds), run(replace(packed, bits=0, group=0), plain), strict=True):
        agrees("same numbers", got, expected)


@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_packing_rounds_to_the_nearest_and_each_row_stands_alone(bits, rows, groups, seed):
    weights = np.random.default_rng(seed).standard_normal((rows, groups * 8)).astype(np.float32)
    weights[0, :8] = 0  # a group of zeros
    words, scales = quantize(weights, bits, 8)
    assert words.dtype == np.int32 and words.shape == (rows, groups * 8 * bits // 32)
    back = unpack(words, scales, bits)
    assert np.all(np.abs(back - weights).reshape(rows, groups, 8) <= scales[..., None] * (0.5 + 1e-5))
    pieces = [quantize(weights[i : i + 2], bits, 8) for i in range(0, rows, 2)]
    np.testing.assert_array_equal(np.concatenate([w for w, _ in pieces]), words)
    np.testing.assert_array_equal(np.concatenate([s for _, s in pieces]), scales)


def test_unpacking_reads_every_code_as_twos_complement():
    for bits in (4, 8):
        codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        words = np.array([[sum(int(c) % 2**bits << j * bits for j, c in enumerate(codes[i : i + 32 // bits]))]
                          for i in range(0, len(codes), 32 // bits)], np.uint32).view(np.int32)  # fmt: skip
        np.testing.assert_array_equal(unpack(words, np.ones((len(words), 1), np.float32), bits).ravel(), codes)


def test_rows_that_do_not_fill_words_or_groups_are_refused():
    weights = np.ones((2, 20), np.float32)
    for bits, group, match in ((4, 10, "whole 8s"), (8, 16, "whole groups"), (3, 4, "4 or 8")):
        with pytest.raises(InputError, match=match):
            quantize(weights, bits, group)
    with pytest.raises(InputError, match="not finite"):
        quantize(np.full((1, 8), np.nan, np.float32), 4, 8)


def test_node_carries_the_plugin_attributes_and_the_function_declares_them():
    proto = model(OP, REQUEST)
    given_ = {a.name: onnx.helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}
    own = {"activation": b"silu", "block": 1, "bits": 0, "group": 0}
    assert given_ == own | {"layer": 0, "plugin_namespace": DOMAIN.encode(), "plugin_version": b"1"}
    assert sorted(proto.functions[0].attribute) == sorted(given_)
    with pytest.raises(SurgeryError, match="activation"):
        node_attributes(OP, layer=0)


def test_z_that_nobody_reads_is_named_by_the_empty_string():
    proto = model(OP, REQUEST)
    proto.graph.node[0].output[1] = ""
    del proto.graph.output[1]
    onnx.checker.check_model(proto, full_check=True)
    made = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(made.run(None, REQUEST.feeds())[0], run(REQUEST, REQUEST.feeds())[0])


def test_unknown_activation_or_form_is_refused_with_what_exists():
    with pytest.raises(InputError, match=r"did you mean 'silu'.*quick_gelu"):
        function("none", "silo")
    with pytest.raises(SurgeryError, match="none, request, token"):
        function("layer", "silu")
    with pytest.raises(SurgeryError, match="0, 4, 8"):
        function("none", "silu", bits=3)
