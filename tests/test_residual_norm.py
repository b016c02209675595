"""ResidualNorm: sums and norms as near to float64 as float32 allows; which nodes of a step it takes the place of."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from cpu_cases import residual_norm
from test_cpu_ops import INSTRUCTIONS, best_instructions, compiled, session, use  # noqa: F401 (fixtures)

from cm_export.backends.onnxruntime.pack import NATIVE
from cm_export.backends.onnxruntime.residual_norm import normalise_sums


def run(call):
    feeds = {n: a for n, a in call.inputs.items() if n not in call.constants}
    return session(call).run(None, feeds)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_sums_and_their_norms_are_as_near_as_float32_allows(name):
    use(name)
    for seed, (rows, width) in enumerate([(1, 1), (1, 7), (2, 16), (5, 33), (3, 576), (16, 1536), (1, 8960), (0, 8)]):
        call = residual_norm(rows, width, seed)
        y, total = run(call)
        call.check(np.concatenate([y.ravel(), total.ravel()]))
        np.testing.assert_array_equal(total, call.inputs["x"] + call.inputs["added"])


def test_a_row_has_the_same_norm_alone_and_among_others():
    call = residual_norm(5, 100)
    together = run(call)
    for row in range(5):
        alone = {n: call.inputs[n][:, row : row + 1] for n in ("x", "added")}
        for one, all_of_them in zip(run(replace(call, inputs=call.inputs | alone)), together, strict=True):
            np.testing.assert_array_equal(one[:, 0], all_of_them[:, row])


def test_a_number_that_is_none_shows_in_its_own_row():
    call = residual_norm(2, 20)
    call.inputs["added"][0, 1, 19] = np.nan
    y, total = run(call)
    assert np.isfinite(y[0, 0]).all() and np.isfinite(total[0, 0]).all()
    assert np.isnan(y[0, 1]).all() and np.isnan(total[0, 1]).sum() == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"added": np.zeros((1, 1, 20), np.float32)}, r"\[1,1,20\] is added to \[1,2,20\]"),
        ({"weight": np.zeros(1, np.float32)}, r"the weight is \[1\], expected \[20\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    call = residual_norm(2, 20)
    with pytest.raises(Exception, match=f"ResidualNorm: {message}"):
        run(replace(call, inputs=call.inputs | changed))


PRODUCT = "com.cm_export.native.PackedMatMul <N: int = {}> (z)"
SUM, NORM = "sum = Add (inputs_embeds, p)", "y = RMSNormalization <axis: int = -1, epsilon: float = 0.25> (sum, w)"


def rewritten(*lines: str, outputs: str = "float[1,N,8] y, float[1,N,8] sum") -> list[onnx.NodeProto]:
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23, "com.cm_export.native" : 1]>
        g (float[1,N,8] inputs_embeds, float[1,N,8] z, float[1,1,8] other) => ({outputs})
        <float[8] w = {{1,1,1,1,1,1,1,1}}, float[1] one = {{1}}> {{ {" ".join(lines)} }}""")
    before = {o for n in model.graph.node for o in n.output}
    normalise_sums(model)
    assert {o for n in model.graph.node for o in n.output} == before
    return list(model.graph.node)


def test_a_sum_and_its_norm_become_one_node_where_the_sum_was():
    _, node = rewritten(f"p = {PRODUCT.format(8)}", SUM, NORM)
    assert (node.op_type, node.domain) == ("ResidualNorm", NATIVE)
    assert list(node.input) == ["inputs_embeds", "p", "w"] and list(node.output) == ["y", "sum"]
    assert [a.f for a in node.attribute] == [0.25]
    # the other way round, behind a copy, and with a later sum of the same stream
    nodes = rewritten(
        f"p0 = {PRODUCT.format(8)}", "p = Identity (p0)", "sum = Add (p, inputs_embeds)", "early = Relu (sum)", NORM,
        "q = com.cm_export.native.PackedFFN <D: int = 8> (y)", "next = Add (sum, q)", "u = RMSNormalization (next, w)",
        outputs="float[1,N,8] u, float[1,N,8] early",
    )  # fmt: skip
    made = [n for n in nodes if n.op_type == "ResidualNorm"]
    assert [list(n.input) for n in made] == [["inputs_embeds", "p0", "w"], ["sum", "q", "w"]]
    assert [n.op_type for n in nodes].index("Relu") > nodes.index(made[0]), "what reads the sum comes after it"
    assert made[1].attribute[0].f == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "lines",
    [
        ("p = Relu (z)", SUM, NORM),  # nothing says that z has the shape of the embeddings
        (f"p = {PRODUCT.format(8)}", "sum = Add (p, other)", NORM),
        (f"p = {PRODUCT.format(1)}", SUM, NORM),
        (f"p = {PRODUCT.format(8)}", SUM, "y = RMSNormalization <axis: int = 1> (sum, w)"),
        (f"p = {PRODUCT.format(8)}", SUM, "y = RMSNormalization (sum, one)"),
        (f"p = {PRODUCT.format(8)}", SUM, "y = LayerNormalization (sum, w)"),
    ],
)
def test_other_sums_and_norms_stay(lines):
    assert [n.op_type for n in rewritten(*lines)][1:] == ["Add", lines[-1].split()[2]]


def test_a_second_norm_of_a_sum_reads_what_the_first_one_gives():
    nodes = rewritten(f"p = {PRODUCT.format(8)}", SUM, NORM, "v = RMSNormalization (sum, w)")
    assert [n.op_type for n in nodes][1:] == ["ResidualNorm", "RMSNormalization"]
