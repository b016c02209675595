"""The kernels as ops of ONNX Runtime: emulated, in real sessions of its CPU provider, where nvcc makes those of CUDA's.

What is shown: types, shapes, attributes, refusals, the graph that gets them and its answers. What only a GPU can show is not.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import plugin_builds
import pytest
from click.testing import CliRunner
from conftest import active_bundle
from random_models import copy, request
from test_device import APART, HALF, deciding
from tolerances import agrees

from cm_export.backends.onnxruntime import backend as backends
from cm_export.backends.onnxruntime.backend import Backend
from cm_export.backends.onnxruntime.kernels import held_by_inputs, use_kernels
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.evals.tasks import easy_vqa
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row
from cm_export.host.images import open_image
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.host.runner import Budget, Runner
from cm_export.plugins import places
from cm_export.plugins.core_linear.op import BY_INPUTS
from cm_export.plugins.harness import in_onnxruntime
from cm_export.plugins.harness.cases import OPS, Call, has_kernel
from cm_export.plugins.harness.in_onnxruntime import chosen, session, wrong
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

FFN, ATTENTION, LINEAR = OPS


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_call_in_a_session_equals_the_function_of_its_op(op):
    those = [call for call in chosen() if call.op is op]
    assert {c.dtype for c in those} == {"float32", "float16"} and len(those) > 20
    assert [str(call) for call in those if wrong(call, plugin_builds.emulated())] == []


def test_the_proof_runs_them_where_the_provider_is_and_says_where_it_is_not(monkeypatch):
    monkeypatch.setattr(in_onnxruntime, "chosen", lambda: [c for c in chosen() if c.op is LINEAR][:2])
    told = CliRunner().invoke(in_onnxruntime.main, ["--library", str(plugin_builds.emulated())])
    assert told.exit_code == 0 and told.output.endswith("CPUExecutionProvider: 0 of 2 wrong\n")
    monkeypatch.setattr(in_onnxruntime, "wrong", lambda *_: ["y"])
    told = CliRunner().invoke(in_onnxruntime.main, ["--library", str(plugin_builds.emulated())])
    assert told.exit_code == 1 and "float32" in told.output and told.output.endswith("2 of 2 wrong\n")
    monkeypatch.setattr(in_onnxruntime.ctypes, "CDLL", lambda _: None)  # as nvcc made it
    told = CliRunner().invoke(in_onnxruntime.main, ["--library", str(plugin_builds.emulated())])
    assert told.exit_code == 0 and told.output.startswith("NOT RUN: the installed ONNX Runtime ")


def test_an_attribute_that_gets_lost_is_seen():
    lost = {"ort/ops.cpp": [("number(info, kName, field.name)", "1.0f")]}
    library = plugin_builds.changed("attribute_lost", lost, ["ort/ops.cpp"])
    call = next(c for c in chosen() if c.op is ATTENTION)
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
    "norms in another type": (LINEAR, lambda f: f | {"norm": f["norm"].astype(np.float16)}, {}, r"float16.*\(norm\)"),
    "two types": (
        FFN,
        lambda f: f | {"w_up": f["w_up"].astype(np.float16)},
        {},
        "no kernel def matches",
    ),
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
    feeds = change(call.feeds) if change else call.feeds
    with pytest.raises(Exception, match=words) as raised:
        session(call, plugin_builds.emulated(), feeds=feeds, **attributes).run(None, feeds)
    assert "\n" not in str(raised.value).strip()
    assert capfd.readouterr().err == "", "said once, by ONNX Runtime"


# ---------------------------------------------------------------------------------------------------- graphs
def with_kernels(place):
    return replace(place, kernels=plugin_builds.emulated())


def ops(backend, name="decode"):
    """What kernels compute in a graph: op -> number of nodes."""
    model, _ = backend._prepared(backend._graph(name), (name, True, False, name.startswith("decode")))
    return Counter(n.op_type for n in model.graph.node if n.domain == places.DOMAIN)


@pytest.mark.parametrize(
    ("place", "weights"), [(APART, "fp32"), (HALF, "fp32"), (APART, "int8")], ids=["float32", "float16", "int8"]
)
def test_an_active_bundle_runs_on_the_kernels_and_says_what_it_said_without(demo_bundle, monkeypatch, place, weights):
    bundle, said, read = Bundle(active_bundle(demo_bundle, weights)), {}, []
    question, layers = easy_vqa.questions("sentence")[0], bundle.shape.layers
    for at in (place, with_kernels(place)):
        monkeypatch.setattr(backends, "place_for", lambda *_, at=at: (at, []))
        runner = Runner(bundle, 1, device="cuda")
        asked = runner.ask(question.text, runner.see([open_image(question.pictures[0])]))
        row = runner.prefill(asked, Budget(neuron_share=0.5)).row()
        reader, said[at] = Reader(runner.backend), []
        for ids in ([5], [9, 12, 4], [7]):
            reader.read([row], [ids])
            said[at].append(np.atleast_2d(row.logits))
        dense = runner.prefill(asked, Budget(dense=True)).row()
        reader.read([dense], [[5, 9]])
        said[at].append(np.atleast_2d(dense.logits))
        linear = 7 * layers + 1 if at.kernels and weights == "fp32" else 0  # packed products are ONNX Runtime's
        expected = {"CoreLinear": linear, "CoreAttention": layers if at.kernels else 0}
        assert ops(runner.backend) == +Counter(expected) and not ops(runner.backend, "prefill")
        held = {name.removesuffix("/float16") for name in runner.backend._views}
        turned = {name for name in held if name.endswith(BY_INPUTS)}
        assert len(turned) == (linear and linear - layers), "down lies by inputs already"
        assert not held & {name.removesuffix(BY_INPUTS) for name in turned}, "a weight is on the device once"
        read.append(runner.backend.reads("decode"))
    assert read[0] == read[1], "what is verified before it is read"
    without, ours = (np.concatenate(logits) for logits in said.values())
    if place is APART:
        agrees("export", ours, without)
    assert np.abs(ours - without).max() < 2e-2 * np.abs(without).max()


@pytest.mark.parametrize("policy", ["predicted", "active"])
def test_requests_that_share_a_step_answer_on_the_kernels_as_without(exported, policy):
    """Each with thresholds of its own, or neurons listed anew for each token."""
    x = next(m for seed in range(12) if (m := exported(seed)).shape.hidden % 16 == 0)
    recipe = Recipe().replace(neurons__policy=policy, tokens__policy="dense")
    counts, said = np.full(x.shape.layers, x.shape.ffn // 3), []
    for place in (APART, with_kernels(APART)):
        backend, rows = deciding(x, recipe, place), []
        for seed, least in ((1, 0.8), (2, 0.2)):
            asked = request(x, seed)
            found, cache = backend.prefill(prefill_feeds(asked), "prefill_dense")
            thresholds = np.full(4 * x.shape.layers + 1, least, np.float32) if policy == "active" else None
            rows.append(
                Row(asked, CoreSet(None, counts, x.shape.ffn, thresholds=thresholds), cache, found["logits"][0])
            )
        Reader(backend).read(rows, [[5, 6, 7], [8, 9, 10]])
        said.append(np.concatenate([row.logits for row in rows]))
        if place.kernels:
            core = {"CoreFFN": x.shape.layers} if policy == "predicted" else {"CoreLinear": 7 * x.shape.layers + 1}
            assert ops(backend) == core | {"CoreAttention": x.shape.layers}
    agrees("export", said[1], said[0])


def test_graphs_that_read_every_neuron_take_weights_as_decode_has_them(exported):
    """A prefill that cuts tokens: its FFNs are nodes of ours, without thresholds."""
    x, said = exported(1), []
    recipe = Recipe().replace(neurons__policy="active", tokens__prune_layer=1)
    prefill, _ = pipeline.sparse_prefill(copy(x.dense["prefill"]), x.family, x.shape, recipe)
    decode, _ = pipeline.sparse_decode(copy(x.dense["decode"]), x.family, x.shape, recipe, file=x.weights)
    graphs, asked = {"prefill": prefill, "decode": decode}, request(x, 1)
    for place in (APART, with_kernels(APART)):
        backend = Backend(lambda n: copy(graphs[n]), x.weights, 1, heads=x.shape.heads, place=place)
        found, _ = backend.prefill(prefill_feeds(asked) | sparse_feeds(asked, recipe, None))
        said.append(found["logits"])
        names = {name.removesuffix(BY_INPUTS) for name in backend._views if name.endswith(BY_INPUTS)}
        assert names == (held_by_inputs(decode) if place.kernels else set())
    agrees("same numbers", said[1], said[0])


@pytest.mark.parametrize(("width", "is_step", "taken"), [(256, True, True), (264, True, False), (256, False, False)])
def test_wide_heads_and_prompts_are_left_to_the_products_of_onnxruntime(exported, width, is_step, taken):
    x, recipe = exported(1), Recipe().replace(tokens__prune_layer=1)
    decode, _ = pipeline.sparse_decode(copy(x.dense["decode"]), x.family, x.shape, recipe)
    for value in decode.graph.input:
        if value.name.startswith("past."):
            value.type.tensor_type.shape.dim[3].dim_value = width
    model = use_kernels(decode, set(), is_step)
    found = [n for n in model.graph.node if n.domain == places.DOMAIN]
    assert len(found) == (x.shape.layers if taken else 0)


# ---------------------------------------------------------------------------------------------------- where it is found
def test_a_machine_without_the_library_says_what_is_slow_and_how_to_build_it(
    demo_bundle, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "cache", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    for folder in (
        Path(),
        Path("artifacts/plugins"),
    ):  # where a build looks, and a run does not: they may be somebody else's
        folder.mkdir(parents=True, exist_ok=True)
        (folder / places.NAME).symlink_to(plugin_builds.emulated())
    assert places.find() == plugin_builds.emulated()
    assert places.trusted() is None and "`make plugins` builds it" in places.why_unusable()
    kept = tmp_path / "cache" / places.NAME
    kept.write_text("no library")
    assert f"{kept} does not load (" in places.why_unusable()
    kept.unlink()
    kept.symlink_to(plugin_builds.emulated())
    assert places.trusted() == plugin_builds.emulated() and places.why_unusable() is None
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == {"library": str(plugin_builds.emulated()), "missing": None}
    monkeypatch.setattr(backends, "place_for", lambda *_: (APART, []))
    kept.unlink()
    theirs = str(plugin_builds.emulated())  # a bundle's recipe is not asked either
    recipe = Recipe().replace(neurons__policy="active", engine__plugins=theirs, tokens__policy="dense")
    for asked, count in ((recipe, 1), (Recipe(), 0)):
        notes = backends.open(Bundle(demo_bundle), 1, asked, device="cuda").notes
        said = [n for n in notes if "every weight is read there" in n and f"there is no {kept}" in n]
        assert len(said) == count
