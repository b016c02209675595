"""Decode of the policy `active` as engines have it: what a real builder and every version's contract say of its graph.

The demo model's, whose engines also answer, and one layer of Qwen2-VL-2B's widths, since a layer is all that a network repeats.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import shared
from conftest import active_bundle, wide
from fake_engines import machine
from random_models import END, IMAGE, START, VIDEO, copy
from safetensors.numpy import save_file
from traces import traced_once

from cm_export import families
from cm_export.backends.tensorrt import builder
from cm_export.backends.tensorrt.export import Source, write_graphs
from cm_export.backends.tensorrt.targets import target
from cm_export.base.errors import CmExportError
from cm_export.build import engines
from cm_export.bundle import weights
from cm_export.bundle.bundle import Bundle
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf
from cm_export.source import trace
from cm_export.surgery import pipeline

ENGINE = {"engine__capacity": 512, "engine__max_prompt": 256, "engine__optimization_level": 0}
VERSIONS = ("10.3", "10.13", "10.16", "11.4")
WIDTHS = {
    "model_type": "qwen2_vl",
    "text_config": {
        "vocab_size": 512, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 1, "num_attention_heads": 12,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    },
    "vision_config": {
        "depth": 1, "embed_dim": 64, "hidden_size": 1536, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    },
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def two_b() -> Source:
    """Decode alone, by the surgery from a trace; of the checkpoint only the configuration is read."""
    family, folder = families.find("qwen2_vl"), shared.own("two_b")
    policies = {"neurons__policy": "active", "tokens__policy": "dense"}
    recipe = Recipe().replace(backend="tensorrt-rtx", **policies, **ENGINE)
    (folder / "config.json").write_text(json.dumps(WIDTHS))
    save_file({"nothing": np.zeros(1)}, folder / "model.safetensors")
    skeleton, config = hf.skeleton(folder, family), hf.read_config(folder)
    rng = np.random.default_rng(0)  # each weight has a block of its own: a builder keeps equal ones once

    def numbers(shape):
        yield np.resize(rng.standard_normal(1 << 18, dtype=np.float32) / 64, shape)

    planned = (
        hf.planned(name, p, family) for name, p in skeleton.named_parameters() if not name.startswith("model.visual")
    )
    made = [replace(plan, read=partial(numbers, plan.shape)) for plan in planned]
    weights.write(folder / weights.FILE, made)
    file, shape = weights.WeightFile(folder / weights.FILE), family.shape(config)
    with traced_once():
        traced = trace.trace(next(s for s in trace.specs(skeleton, family, config) if s.name == "decode"))
    dense, _ = pipeline.dense("decode", traced, file.tensors, family)
    decode, _ = pipeline.sparse_decode(dense, family, shape, recipe, file=file)
    return Source(lambda _: copy(decode), ("decode",), file, shape, recipe, family.tower(config))


@pytest.fixture(scope="module")
def demo(demo_bundle) -> Source:
    bundle = Bundle(active_bundle(demo_bundle, "fp32"))
    return replace(Source.of(bundle), recipe=bundle.recipe.replace(backend="tensorrt-rtx", **ENGINE))


def in_precision(source, precision):
    return replace(source, recipe=source.recipe.replace(engine__precision=precision))


def job(folder, version, told, **more):
    """What the build asks its builder for."""
    what = target(version)
    return {
        "module": what.module,
        "onnx": str(folder / "decode.onnx"),
        "plan": str(folder / "decode.plan"),
        "expected": told,
        "typed_flag": what.typed_flag,
        "plugin_library": None,
        "timing_cache": None,
        "architectures": [],
        "inspect": True,
        "workspace_mb": 0,
        "optimization_level": 0,
        "weight_streaming": False,
        "strip_weights": False,
    } | more


@pytest.mark.parametrize(
    ("name", "precision"), [("two_b", "fp16"), wide("demo", "int4"), wide("demo", "fp16"), wide("two_b", "int4")]
)
def test_a_real_builder_takes_the_graph_where_no_plugin_is_needed(request, tmp_path, name, precision):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 and for Windows only")
    source = in_precision(request.getfixturevalue(name), precision)
    told = write_graphs(source, tmp_path, target("rtx-1.7"), ["decode"])["graphs"]["decode"]
    assert told["index_inputs"] == ["core_thresholds"] and not told["plugins"]
    built = engines.run_builder(job(tmp_path, "rtx-1.7", told, architectures=["sm_86"], inspect=False), lambda *_: None)
    assert built["bytes"] > told["weight_bytes"], "the plan holds every weight"


PACKED = {"fp16": 0, "int8": 8, "int4": 4}
QUICK = [("demo", "10.3", "int4"), ("demo", "11.4", "fp16"), ("two_b", "10.16", "fp16")]
EVERY = [(name, version, precision) for name in ("demo", "two_b") for version in VERSIONS for precision in PACKED]
CHECKED = [*QUICK, *(wide(*of) for of in EVERY if of not in QUICK)]


@pytest.mark.parametrize(("name", "version", "precision"), CHECKED)
def test_every_version_finds_in_the_graph_what_it_was_asked_for(request, tmp_path, name, version, precision):
    """Parsed by its rules: the border, every plugin layer, every input that reaches an output, profiles that fit."""
    source, at = in_precision(request.getfixturevalue(name), precision), machine(f"{version}.0")
    told = write_graphs(source, tmp_path, target(version), ["decode"])["graphs"]["decode"]
    layers = source.shape.layers
    packed = {"fp16": 7 * layers + 1, "int8": 3 * layers, "int4": 7 * layers}[precision]  # the others are written out
    assert told["plugins"] == {"CoreAttention": layers, "CoreLinear": packed}
    (library := tmp_path / "libcm_plugins.so").write_text("not a library")
    asked = job(tmp_path, version, told, plugin_library=str(library))
    assert builder.build(at.trt, asked, lambda _: None)["inspected"]
    decode = onnx.load(tmp_path / "decode.onnx", load_external_data=False)
    rows = {n.name: n.input[1] for n in decode.graph.node if n.op_type == "CoreLinear"}
    shapes = {t.name: list(t.dims) for t in decode.graph.initializer}
    down = next(w for n, w in rows.items() if n.endswith(".down"))
    columns = source.shape.hidden * PACKED[precision] // 32 or source.shape.hidden
    assert shapes[down] == [source.shape.ffn, columns], "held by inputs, in words where packed"


@pytest.mark.parametrize(
    ("lowered_for", "plugins", "words"),
    [
        ("11.4", True, "the parser refuses it .*No importer"),
        ("10.3", False, "No importer"),
        ("10.16", False, "no plugin layer for"),
    ],
    ids=["an op of a later version", "stripped functions, no plugin", "functions, no plugin"],
)
def test_what_a_version_does_not_find_is_named(demo, tmp_path, lowered_for, plugins, words):
    at = machine("10.3.0" if plugins else f"{lowered_for}.0")
    told = write_graphs(demo, tmp_path, target(lowered_for), ["decode"])["graphs"]["decode"]
    (library := tmp_path / "libcm_plugins.so").write_text("not a library")
    asked = job(tmp_path, "10.3", told, plugin_library=str(library) if plugins else None)
    with pytest.raises(CmExportError, match=words):
        builder.build(at.trt, asked, lambda _: None)
