"""The kernels as ops of ONNX Runtime: emulated, in real sessions of its CPU provider, where nvcc makes those of CUDA's.

What is shown: types, shapes, attributes, refusals, the graph that gets them and its answers. What only a GPU can show is not.
"""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import plugin_builds
import pytest
from conftest import active_bundle
from random_models import copy, request
from test_device import APART, HALF, deciding
from tolerances import agrees

from cm_export.backends.onnxruntime.backend import Backend
from cm_export.backends.onnxruntime.kernels import held_by_inputs
from cm_export.backends.onnxruntime.place import Place
from cm_export.bundle.bundle import Bundle
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Row, teacher_forced
from cm_export.host.request import prefill_feeds
from cm_export.plugins import places
from cm_export.plugins.core_linear.op import BY_INPUTS
from cm_export.plugins.harness.cases import OPS, Call, calls, has_kernel
from cm_export.plugins.harness.limits import LIMITS
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

FFN, ATTENTION, LINEAR = OPS


def session_of(call, feeds=None, library=None, **attributes):
    """One node with the inputs of a call, or with these, and what it makes besides memory to work in."""
    feeds, outputs = feeds or call.feeds, list(call.expected)
    own = call.case.attributes | attributes
    node = onnx.helper.make_node(call.op.name, list(feeds), [*outputs, "workspace"], domain=places.DOMAIN, **own)
    given = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for n, a in feeds.items()
    ]
    graph = onnx.helper.make_graph([node], "one", given, [onnx.ValueInfoProto(name=n) for n in outputs])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(places.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1  # errors are what some tests are after
    options.register_custom_ops_library(str(library or plugin_builds.emulated()))
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answered(call, feeds=None, library=None, **attributes):
    return session_of(call, feeds, library, **attributes).run(list(call.expected), feeds or call.feeds)


def wrong(call, library=None):
    """Names of outputs that are further from the op's function than its type explains."""
    found = zip(answered(call, library=library), call.expected.items(), strict=True)
    off = {n: np.abs(y.astype(np.float64) - e) / np.maximum(1, np.abs(e)) for y, (n, e) in found}
    return [n for n, by in off.items() if not np.max(by) <= LIMITS[call.dtype][0]]


def of_onnxruntime():
    """The calls of a plugin library but those in types that graphs for ONNX Runtime do not have."""
    return [c for c in calls() if c.dtype != "bfloat16" and not c.case.attributes.get("bits") and not c.shifted]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_call_in_a_session_equals_the_function_of_its_op(op):
    chosen = [call for call in of_onnxruntime() if call.op is op]
    assert {c.dtype for c in chosen} == {"float32", "float16"} and len(chosen) > 20
    assert [str(call) for call in chosen if wrong(call)] == []


def test_an_attribute_that_gets_lost_is_seen():
    lost = {"ort/ops.cpp": [("number(info, kName, field.name)", "1.0f")]}
    library = plugin_builds.changed("attribute_lost", lost, ["ort/ops.cpp"])
    call = next(c for c in of_onnxruntime() if c.op is ATTENTION)
    assert wrong(call, library) == ["y"]


def short(name, axis=-1):
    return lambda feeds: feeds | {name: np.take(feeds[name], range(feeds[name].shape[axis] - 1), axis)}


REFUSED = {
    "x of another rank": (LINEAR, lambda f: f | {"x": f["x"][0]}, {}, r"CoreLinear: x is \[1,16\], not \[B,S,D\]"),
    "rows of w": (LINEAR, short("w", 0), {}, r"w is \[15,24\], not \[D,N\]"),
    "a norm": (LINEAR, short("norm"), {}, r"norm is \[15\], not \[D\] for w"),
    "a threshold": (LINEAR, short("threshold", 0), {}, r"threshold is \[0,1\], not \[B,1\] for x"),
    "the weight as stored": (LINEAR, None, {"by_inputs": 0}, "by_inputs = 0.*give by_inputs 1"),
    "words": (LINEAR, None, {"bits": 4, "group": 8}, "CoreLinear: bits = 4: .*weights of its numbers' type"),
    "norms in another type": (LINEAR, lambda f: f | {"norm": f["norm"].astype(np.float16)}, {}, "norm"),
    "two types": (FFN, lambda f: f | {"w_up": f["w_up"].astype(np.float16)}, {}, "w_up"),
    "one weight": (FFN, short("w_up", 0), {}, r"input 2 is \[23,16\], not \[F,16\]"),
    "a list of another batch": (FFN, short("core_neurons", 0), {}, r"core_neurons is \[0,6\], not \[B,K\]"),
    "an activation": (FFN, None, {"activation": "silo"}, 'unknown activation "silo"; known: silu'),
    "a block": (FFN, None, {"block": 0}, "give block >= 1"),
    "a mask": (ATTENTION, short("mask"), {}, r"mask is \[1,1,1,8\], not \[B|1,1,S,P\]"),
    "no scale": (ATTENTION, None, {"scale": None}, r"the attribute scale \(a float\) is missing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kernel_does_not_take_is_refused_in_one_line(what, capfd):
    op, change, attributes, words = REFUSED[what]
    listed = {FFN: {"index": "request"}, ATTENTION: {"index": True}}.get(op, {}).items()
    case = next(c for c in op.cases if has_kernel(c) and c.dtype == "float32" and listed <= c.form.items())
    call = Call(op, case, "float32")
    with pytest.raises(Exception, match=words) as raised:
        answered(call, change(call.feeds) if change else None, **attributes)
    assert "\n" not in str(raised.value).strip()
    assert capfd.readouterr().err == "", "said once, by ONNX Runtime"


# ---------------------------------------------------------------------------------------------------- graphs
def with_kernels(place):
    return Place(place.device, place.number, True, place.products, plugin_builds.emulated())


def kernels_of(backend, name="decode"):
    model, _ = backend._prepared(backend._graph(name), (name, True, False, name.startswith("decode")))
    return Counter(n.op_type for n in model.graph.node if n.domain == places.DOMAIN)


@pytest.mark.parametrize("place", [APART, HALF], ids=["float32", "float16"])
def test_active_decode_runs_on_the_kernels_and_says_what_it_said_without(demo_bundle, place):
    bundle = Bundle(active_bundle(demo_bundle, "fp32"))
    layers, said = bundle.shape.layers, []
    rng = np.random.default_rng(0)
    thresholds = np.full(4 * layers + 1, 0.3, np.float32)
    feeds = {
        "inputs_embeds": rng.standard_normal((1, 5, bundle.shape.hidden)).astype(np.float32),
        "position_ids": np.broadcast_to(np.arange(5), (3, 1, 5)).copy(),
        "attention_mask": np.ones((1, 5), np.int64),
    }
    for at in (place, with_kernels(place)):
        backend = Backend(bundle.graph, bundle.weights, 1, heads=bundle.shape.heads, place=at)
        assert said or not kernels_of(backend)
        print(feeds.keys(), [(i.name, i.shape, i.type) for i in backend.session("prefill_dense").get_inputs()][:4])
        break
    assert False
