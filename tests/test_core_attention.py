"""CoreAttention: its body in ONNX Runtime equals attention over the listed rows, and the laws of a token index hold."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import agrees

from cm_export.base.errors import SurgeryError
from cm_export.base.onnx_text import DOMAIN
from cm_export.plugins.contract import model, node_attributes
from cm_export.plugins.core_attention.op import OP, Case

LISTED = Case(True, B=3, H=6, Hk=2, S=4, P=15, M=7)
DENSE = replace(LISTED, index=False)


@functools.cache
def session(index, mask_rows, dtype, d):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = model(OP, Case(index, mask_rows=mask_rows, dtype=dtype, d=d))  # d: the scale is an attribute of the node
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case, feeds):
    wanted = [n for n in case.axes if n != "y"]
    y = session(case.index, case.mask_rows, case.dtype, case.d).run(["y"], {n: feeds[n] for n in wanted})[0]
    assert y.dtype == case.dtype
    return y


def equals_oracle(case):
    feeds = case.feeds()
    agrees(f"op {case.dtype}", run(case, feeds), OP.oracle(feeds, case.attributes)["y"])


@pytest.mark.parametrize("case", OP.cases, ids=str)
def test_body_equals_attention_over_the_listed_rows(case):
    equals_oracle(case)


@st.composite
def generated(draw):
    kv_heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows = draw(st.integers(queries, 30))
    return Case(
        draw(st.booleans()),
        B=draw(st.integers(1, 3)),
        H=kv_heads * draw(st.sampled_from([1, 2, 6, 7])),
        Hk=kv_heads,
        S=queries,
        P=rows,
        M=draw(st.integers(1, rows)),
        d=draw(st.sampled_from([1, 7, 16])),
        mask_rows=draw(st.sampled_from(["1", "B"])),
        ascending=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=100, deadline=None)  # no deadline: the first example of a form builds the session
@given(generated())
def test_body_equals_attention_over_the_listed_rows_at_generated_sizes(case):
    equals_oracle(case)


def test_core_tokens_equal_dense_attention_with_the_dropped_rows_masked():
    feeds = LISTED.feeds()
    dropped = np.ones((LISTED.B, 1, 1, LISTED.P), bool)
    for b, ids in enumerate(feeds["core_tokens"]):
        dropped[b, 0, 0, ids] = False
    masked = np.where(dropped, np.float32(-np.inf), feeds["mask"])
    agrees("same numbers", run(LISTED, feeds), run(DENSE, feeds | {"mask": masked}))


@pytest.mark.parametrize("mask_rows", ["1", "B"])
def test_all_rows_listed_is_the_dense_form(mask_rows):
    case = replace(LISTED, M=LISTED.P, mask_rows=mask_rows)
    feeds = case.feeds()
    agrees("same numbers", run(case, feeds), run(replace(case, index=False), feeds))


def test_order_of_the_rows_does_not_matter():
    feeds = LISTED.feeds()
    order = np.random.default_rng(1).permutation(LISTED.M)
    agrees("same numbers", run(LISTED, feeds | {"core_tokens": feeds["core_tokens"][:, order]}), run(LISTED, feeds))


def test_each_request_reads_its_own_rows():
    feeds = LISTED.feeds()
    assert len({tuple(row) for row in feeds["core_tokens"]}) == LISTED.B
    y = run(LISTED, feeds)
    for b in range(LISTED.B):
        agrees("same numbers", run(LISTED, {n: a[b : b + 1] for n, a in feeds.items()}), y[b : b + 1])


def test_rows_that_are_not_listed_are_not_read():
    feeds = LISTED.feeds()
    y = run(LISTED, feeds)
    for b, ids in enumerate(feeds["core_tokens"]):
        rest = np.setdiff1d(np.arange(LISTED.P), ids)
        feeds["k"][b, :, rest] = feeds["v"][b, :, rest] = feeds["mask"][b, :, :, rest] = np.nan
    np.testing.assert_array_equal(run(LISTED, feeds), y)


def test_a_shorter_list_may_be_padded_with_a_masked_row():
    feeds = LISTED.feeds()
    unlisted = np.array([[np.setdiff1d(np.arange(LISTED.P), ids)[0]] for ids in feeds["core_tokens"]], np.int32)
    for b, row in enumerate(unlisted):
        feeds["mask"][b, :, :, row] = -np.inf
    padded = np.concatenate([feeds["core_tokens"], unlisted, unlisted], axis=1)
    agrees("same numbers", run(LISTED, feeds | {"core_tokens": padded}), run(LISTED, feeds))


def test_shared_heads_equal_repeated_heads():
    feeds = LISTED.feeds()
    repeated = {n: np.repeat(feeds[n], LISTED.H // LISTED.Hk, axis=1) for n in ("k", "v")}
    agrees("same numbers", run(LISTED, feeds | repeated), run(LISTED, feeds))


def test_node_carries_the_plugin_attributes_and_the_function_declares_them():
    proto = model(OP, LISTED)
    given_ = {a.name: onnx.helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}
    assert given_.pop("scale") == pytest.approx(LISTED.attributes["scale"])
    assert given_ == {"layer": 0, "plugin_namespace": DOMAIN.encode(), "plugin_version": b"1"}
    assert sorted(proto.functions[0].attribute) == sorted([*given_, "scale"])
    with pytest.raises(SurgeryError, match="scale"):
        node_attributes(OP, layer=0, activation="silu")
