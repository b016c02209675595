"""The tower of one picture runs without a mask and sees what it saw with one; several segments keep their borders."""

import numpy as np
import onnx
import pytest

from cm_export.backends.onnxruntime.backend import WHOLE
from cm_export.backends.onnxruntime.whole_picture import attend_to_all
from cm_export.bundle.bundle import Bundle
from cm_export.evals.tasks import easy_vqa
from cm_export.host.images import open_image
from cm_export.host.runner import Runner


@pytest.fixture(scope="module")
def runner(demo_bundle):
    return Runner(Bundle(demo_bundle), 1)


def feeds(runner, count):
    """Of so many pictures at once."""
    shown = [open_image(q.pictures[0]) for q in easy_vqa.questions("sentence")[: 40 * count : 40]]
    return runner.tower.feeds([runner.tower.picture(image, runner.picture_rule) for image in shown])


def run(backend, name, fed):
    return {n: v.numpy() for n, v in backend.outputs(name, fed, {}).items()}


def test_a_picture_alone_needs_no_mask(runner):
    backend, fed = runner.backend, feeds(runner, 1)
    masked, whole = run(backend, "vision", fed), run(backend, WHOLE, fed)
    for name, found in backend.vision(fed).items():
        np.testing.assert_array_equal(found, whole[name])
        np.testing.assert_allclose(found, masked[name], atol=2e-5)


def test_pictures_together_do_not_see_each_other(runner):
    backend, both = runner.backend, feeds(runner, 2)
    together, wrong = backend.vision(both), run(backend, WHOLE, both)
    alone = backend.vision(feeds(runner, 1))
    for name, found in together.items():
        first = found[: len(alone[name])]
        np.testing.assert_allclose(first, alone[name], atol=2e-5)
        assert not np.allclose(wrong[name][: len(first)], alone[name], atol=1e-3)  # so a mask is needed here


def test_only_masks_that_say_where_segments_end_are_left_out(runner):
    graph = onnx.load(runner.bundle.graph("vision"), load_external_data=False)
    attentions = [n for n in graph.graph.node if n.op_type == "Attention"]
    other = onnx.helper.make_tensor_value_info("window", onnx.TensorProto.FLOAT, [1])
    graph.graph.input.append(other)
    first = attentions[0]
    add = onnx.helper.make_node("Add", [first.input[3], "window"], ["windowed"])
    graph.graph.node.insert(list(graph.graph.node).index(first), add)
    first.input[3] = "windowed"
    attend_to_all(graph)
    assert sum(n.op_type == "Attention" for n in graph.graph.node) == 1
    assert sum(n.op_type == "WholePicture" for n in graph.graph.node) == len(attentions) - 1
