"""A convolution over patches as large as its kernel becomes a product, and one that slides stays what it is."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from cm_export.backends.onnxruntime.patches import multiply_patches
from cm_export.base.onnx_text import IR_VERSION, OPSET


def tower(rows: list[int], kernel: list[int], bias: bool = False, **attributes) -> onnx.ModelProto:
    """Reshape(x [N,any], [-1, *rows]) -> Conv with a random w [7, *kernel] -> y [N, any]."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((7, *kernel)).astype(np.float32), "rows": np.array([-1, *rows])}
    weights |= {"flat": np.array([0, -1])}
    weights |= {"b": rng.standard_normal(7).astype(np.float32)} if bias else {}
    sides = {"kernel_shape": kernel[1:], "strides": kernel[1:]} | attributes
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["patches"]),
        helper.make_node("Conv", ["patches", "w", *(["b"] if bias else [])], ["each"], **sides),
        helper.make_node("Reshape", ["each", "flat"], ["y"]),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", int(np.prod(rows))])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", None])]
    graph = helper.make_graph(nodes, "tower", given, out, [numpy_helper.from_array(a, n) for n, a in weights.items()])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def answer(model: onnx.ModelProto) -> np.ndarray:
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    x = np.random.default_rng(1).standard_normal((5, width)).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("rows", [[3, 2, 4, 4], [3, 4, 4]])
@pytest.mark.parametrize("bias", [False, True])
def test_patches_as_large_as_the_kernel_are_multiplied(rows, bias):
    model = tower(rows, rows, bias)
    expected = answer(model)
    multiply_patches(model)
    assert not [n for n in model.graph.node if n.op_type == "Conv"]
    np.testing.assert_allclose(answer(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows, kernel, attributes",
    [
        ([3, 8, 4], [3, 4, 4], {}),
        ([3, 4, 4], [3, 4, 4], {"pads": [1, 1, 1, 1]}),
        ([6, 4, 4], [3, 4, 4], {"group": 2}),
        ([3, 4, 4], [3, 4, 4], {"auto_pad": "SAME_UPPER"}),
    ],
)
def test_a_kernel_that_slides_stays(rows, kernel, attributes):
    model = tower(rows, kernel, **attributes)
    before = model.SerializeToString()
    multiply_patches(model)
    assert model.SerializeToString() == before
