"""Decode graphs that decide by themselves what they read, lowered for every TensorRT version: the portable graphs' logits.

ONNX Runtime runs the lowered graphs over the weights that were written for the builder, plugin nodes as their functions.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from random_models import copy, request
from stepping import step_feeds as portable_feeds

from cm_export.backends.onnxruntime.backend import Backend
from cm_export.backends.tensorrt.export import Source, axis_ranges, describe, lowered, write_graphs
from cm_export.backends.tensorrt.rehearsal import LoweredGraphs, static_rows, step_feeds
from cm_export.backends.tensorrt.targets import target
from cm_export.bundle import predictor
from cm_export.bundle.weights import WeightFile
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Row, teacher_forced
from cm_export.host.request import prefill_feeds
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

VERSIONS = ("10.3", "10.13", "10.16", "11.4", "rtx-1.7")
TOKENS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(exported):
    return packable(exported)


def packable(exported):
    """A random model whose hidden size packs, and the file of its low-bit copies."""
    x = next(m for seed in range(12) if (m := exported(seed)).shape.hidden % 16 == 0)
    file = x.folder / predictor.FILE
    if not file.exists():
        predictor.write(file, x.weights, x.family, x.shape)
    return x, WeightFile(file)


def source_of(model, policy, precision="fp32"):
    x, copies = model
    recipe = Recipe().replace(
        neurons__policy=policy, tokens__policy="dense", engine__capacity=96, engine__max_prompt=64,
        engine__precision=precision,
    )  # fmt: skip
    decode, _ = pipeline.sparse_decode(copy(x.dense["decode"]), x.family, x.shape, recipe, copies.tensors, x.weights)
    graphs = {"decode": decode, "prefill_dense": x.dense["prefill"]}
    return Source(lambda n: copy(graphs[n]), tuple(graphs), x.weights, x.shape, recipe, x.tower, copies)


def core_of(x, policy):
    counts = np.full(x.shape.layers, x.shape.ffn // 3)
    rng = np.random.default_rng(0)
    thresholds = rng.uniform(0.2, 1.2, 4 * x.shape.layers + 1).astype(np.float32)  # each product has its own
    return CoreSet(None, counts, x.shape.ffn, thresholds=thresholds if policy == "active" else None)


def portable(model, source, core):
    """Logits after each token, the cache of the prompt, and the request."""
    x, copies = model
    backend = Backend(source.graph, x.weights, 1, copies, heads=x.shape.heads)
    asked = request(x, 1)
    found, cache = backend.prefill(prefill_feeds(asked), "prefill_dense")
    past = {n: v.copy() for n, v in cache.arrays().items()}
    if core.thresholds is not None:
        return teacher_forced(backend, Row(asked, core, cache, found["logits"][0]), TOKENS)[1:], past, asked
    # The backend chooses by x in 8 bits, which names another neuron now and then: here, the portable graph as it stands.
    onnx.save(source.graph("decode"), x.folder / "portable.onnx")
    plain = ort.InferenceSession(x.folder / "portable.onnx", providers=["CPUExecutionProvider"])
    feeds = portable_feeds(asked, TOKENS, 0) | past | {"core_counts": core.counts}
    return plain.run(["logits"], {i.name: feeds[i.name] for i in plain.get_inputs()})[0][0], past, asked


def through_the_lowered(source, version, folder, core, past, asked):
    write_graphs(source, folder, target(version), ["decode"])
    graphs, capacity = LoweredGraphs(source, target(version), folder, threads=1), source.recipe.engine.capacity
    past = {n: static_rows(rows, capacity, fill=7) for n, rows in past.items()}
    given = {f"core_slots.{i}": np.zeros(n, np.int32) for i, n in enumerate(core.counts)}
    if core.thresholds is not None:
        given["core_thresholds"] = core.thresholds[None]
    out = []
    for step, token in enumerate(TOKENS):
        found = graphs.run("decode", step_feeds(asked, token, step, capacity) | given | past)
        out.append(found["logits"][0, 0])
        past = {n.replace("present", "past"): v for n, v in found.items() if n.startswith("present.")}
    return np.stack(out)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("policy", ["active", "predicted"])
def test_every_version_answers_as_the_portable_graph(model, tmp_path, policy, version):
    source, core = source_of(model, policy), core_of(model[0], policy)
    expected, past, asked = portable(model, source, core)
    found = through_the_lowered(source, version, tmp_path, core, past, asked)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    other = CoreSet(
        None, core.counts // 2, core.ffn, thresholds=None if core.thresholds is None else core.thresholds * 2
    )
    apart = np.abs(portable(model, source, other)[0] - expected).max()
    assert apart > 1e-2 * np.abs(expected).max(), "the sets must matter for this to say anything"


@pytest.mark.parametrize("version", ["10.13", "rtx-1.7"])
def test_active_engines_hold_what_their_kernels_read(model, version):
    source, what = source_of(model, "active", "fp16"), target(version)
    decode = lowered(source, "decode", what)
    told = describe(decode, axis_ranges(source.recipe, source.shape, source.tower), what)
    layers = source.shape.layers
    # q, k, v, o, gate, up and down of every layer, and the head
    assert told["plugins"].get("CoreLinear", 0) == (7 * layers + 1 if what.plugins else 0)
    assert "CoreFFN" not in {n.op_type for n in decode.graph.node} and "core_thresholds" in told["index_inputs"]


def test_a_threshold_of_another_product_is_noticed(model, tmp_path, monkeypatch):
    source, core = source_of(model, "active"), core_of(model[0], "active")
    expected, past, asked = portable(model, source, core)
    turned = CoreSet(None, core.counts, core.ffn, thresholds=np.roll(core.thresholds, 1))
    found = through_the_lowered(source, "10.13", tmp_path, turned, past, asked)
    assert np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()
