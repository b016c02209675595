"""PromptAttention: as near to its meaning in float64 as float32 allows; which attentions of a graph it takes the place of."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from cpu_prompt_cases import CASES, Sizes, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_ops import INSTRUCTIONS, best_instructions, compiled, session, use  # noqa: F401 (fixtures)

from cm_export.backends.onnxruntime.pack import NATIVE
from cm_export.backends.onnxruntime.prompt_attention import attend_together
from cm_export.plugins.cpu import library


def run(call, threads=1):
    return session(call, threads).run(None, call.inputs)[0]


def check(call, y):
    """Of a query that sees nothing no more is asked than numbers."""
    assert y.shape == call.expected.shape
    assert np.isfinite(y).all()
    sees = np.abs(call.expected).sum(-1) > 0
    of_those = replace(call, expected=call.expected[sees], bound=call.bound[sees], in_tiles=call.in_tiles[sees])
    of_those.check(y[sees], library.info()["instructions"])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_it_is_attention(name):
    use(name)
    for seed, sizes in enumerate(CASES):
        call = prompt(sizes, seed)
        y = run(call)
        check(call, y)
        np.testing.assert_array_equal(y, run(call, threads=2))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.builds(
        Sizes,
        B=st.integers(1, 3),
        heads=st.sampled_from([6, 12]),
        kv_heads=st.sampled_from([1, 2, 3, 6]),
        N=st.integers(1, 40),
        M=st.integers(40, 90),
        d=st.integers(1, 100),
        seen=st.sampled_from(["all", "causal", "pieces", "holes"]),
        mask=st.sampled_from(["float", "infinite", "bool"]),
        shape=st.sampled_from(["BHNM", "BNM", "NM"]),
        pad=st.integers(0, 20),
    ),
    seed=st.integers(0, 1000),
)
def test_any_sizes(sizes, seed):
    call = prompt(sizes, seed)
    check(call, run(call))


def test_a_number_that_is_none_shows_in_the_rows_that_read_it():
    call = prompt(Sizes(N=70, M=70, seen="causal"))
    k = call.inputs["k"].copy()
    k[0, 0, 69] = np.nan  # which the last query alone sees, of heads 0 and 1
    y = run(replace(call, inputs=call.inputs | {"k": k}))
    assert np.isnan(y[0, :2, 69]).all()
    assert np.isfinite(y[0, :2, :32]).all(), "a block of queries that do not see it"
    assert np.isfinite(y[0, 2:]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": np.zeros((1, 3, 9, 24), np.float32), "v": np.zeros((1, 3, 9, 24), np.float32)}, "4 heads of queries, 3 of keys"),
        ({"v": np.zeros((1, 2, 8, 24), np.float32)}, r"keys are \[1,2,9,24\] and values \[1,2,8,24\]"),
        ({"q": np.zeros((4, 9, 24), np.float32)}, r"expected \[B,heads,tokens,d\]"),
        ({"mask": np.zeros((1, 1, 9, 8), np.float32)}, r"the mask is \[1,1,9,8\], expected \[1,4,9,9\]"),
        ({"mask": np.zeros((9, 9), np.int32)}, "the mask is of element type 6, expected float32 or bool"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed, message):
    call = prompt(Sizes())
    with pytest.raises(Exception, match=message):
        run(replace(call, inputs=call.inputs | changed))


def graph(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23, "cm_export" : 1]>
        g (float[1,4,N,8] q, float[1,2,N,8] k, float[1,2,N,8] v, float[1,1,N,N] mask{text}""")


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (") => (float[1,4,N,8] y) { y = Attention <scale: float = 0.5> (q, k, v, mask) }", True),
        (") => (float[1,4,N,8] y) { y = cm_export.CoreAttention <scale: float = 0.5> (q, k, v, mask) }", True),
        (") => (float[1,4,N,8] y) { y = cm_export.WholePicture <scale: float = 0.5> (q, k, v) }", True),
        (") => (float[1,4,N,8] y) { y = Attention <scale: float = 0.5, softcap: float = 2> (q, k, v, mask) }", False),
        (", int32[1,M] ids) => (float[1,4,N,8] y) { y = cm_export.CoreAttention <scale: float = 0.5> (q,k,v,mask,ids) }", False),
        (', float[1,2,P,8] "past.0.key") => (float[1,4,N,8] y) { y = Attention <scale: float = 0.5> (q, k, v, mask) }', False),
    ],
)  # fmt: skip
def test_what_hides_keys_by_a_mask_alone_is_taken_and_nothing_else(text, taken):
    model = graph(text)
    attend_together(model)
    (node,) = model.graph.node
    assert ((node.op_type, node.domain) == ("PromptAttention", NATIVE)) == taken
    assert any(o.domain == NATIVE for o in model.opset_import) == taken
    assert [a.f for a in node.attribute if a.name == "scale"] == [0.5]
