"""TensorRT for RTX builds real engines without a GPU: every graph of a model, and a decoder of Qwen2-VL-2B's widths."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from conftest import ONE_THREAD, here
from random_models import END, IMAGE, START, VIDEO, Exported, copy, random_checkpoint

from cm_export.backends.tensorrt.export import Source, write_graphs
from cm_export.backends.tensorrt.targets import target
from cm_export.base.errors import CmExportError, InputError
from cm_export.build import build as builds
from cm_export.build import engines
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.recipe.recipe import Recipe
from cm_export.source.probe import probe

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 and for Windows only")
CARD = {"engine__architecture": "sm_86", "engine__capacity": 512, "engine__max_prompt": 256, "engine__max_patches": 256}


@pytest.fixture(scope="module")
def killed(bare_checkpoint, bare_bundle, tmp_path_factory):
    """A small model with engines, by the real command, which was killed twice: its folder, and what each run told and returned.

    Stages are taken over from the portable build.
    """
    folder = tmp_path_factory.mktemp("rtx")
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(bare_bundle.with_name(name), folder / name)
    words = ["build", "--model", bare_checkpoint, "--out", folder / "x.plan", "--prune-layer", "1"]
    words += ["--backend", "tensorrt-rtx", "--architecture", "sm_86", "--capacity", "512", "--max-patches", "256"]
    words += ["--max-prompt", "256", "--optimization-level", "0"]
    command = [str(Path(sys.executable).parent / "cm-export"), *map(str, words)]
    graphs = list(json.loads((folder / ".x.plan.stages" / "graphs" / "key.json").read_text())["state"]["graphs"])
    runs: list[tuple[int, list[str]]] = []
    for kill in (f"build the {graphs[2]} engine", "assemble the bundle"):
        build = subprocess.Popen(command, start_new_session=True, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
        told = []
        for line in build.stderr:
            told.append(_step(line))
            if kill in line:
                os.killpg(build.pid, signal.SIGKILL)
                break
        runs.append((build.wait(), told))
        build.stderr.close()
    last = here(*words)  # what ends by itself needs no process of its own
    runs.append((last.returncode, [_step(line) for line in last.stderr.splitlines()]))
    return folder, graphs, runs


def _step(line: str) -> str:
    """What a line of a build's progress names."""
    return line.split("] ")[-1].strip()


@pytest.fixture(scope="module")
def rtx_bundle(killed):
    return Bundle(killed[0] / "x.plan")


def test_every_graph_becomes_an_engine(rtx_bundle):
    told = rtx_bundle.manifest["engines"]
    assert set(told["graphs"]) == {"vision", "prefill", "decode", "prefill_dense", "decode_dense"}
    assert told["backend"] == "tensorrt-rtx" and told["architecture"] == "sm_86" and told["plugins"] is None
    for name, graph in told["graphs"].items():
        assert (rtx_bundle.path / "engines" / f"{name}.plan").stat().st_size == graph["bytes"] > 100_000
        assert f"engines/{name}.plan" in rtx_bundle.manifest["files"]
    assert {g["name"] for g in rtx_bundle.manifest["gates"]} >= {"lowered decode", "half decode"}
    rtx_bundle.wait_verified()


def test_decode_takes_the_gathered_rows_and_a_fixed_cache(rtx_bundle):
    graph = rtx_bundle.manifest["engines"]["graphs"]["decode"]
    shape = rtx_bundle.shape
    rows = [f"ffn.{i}.{part}" for i in range(shape.layers) for part in ("gate", "up", "down")]
    assert set(rows) == set(graph["index_inputs"])
    least, likely, most = graph["profile"]["ffn.0.gate"]
    assert (least, most) == ([1, 1, shape.hidden], [1, shape.ffn, shape.hidden]) and least < likely <= most
    assert graph["profile"]["past.0.key"] == [[1, shape.kv_heads, 512, shape.head_dim]] * 3


def test_a_killed_build_goes_on_with_the_engines_that_it_has_not_built(killed):
    folder, graphs, runs = killed
    codes, told = zip(*runs, strict=True)
    assert codes == (-signal.SIGKILL, -signal.SIGKILL, 0), told
    built = [[line.split()[2] for line in lines if re.fullmatch(r"build the \w+ engine", line)] for lines in told]
    # Each build begins with the engine at which the one before was killed.
    assert len(graphs) == 5 and built == [graphs[:3], graphs[2:], []]
    assert [any("lower the graphs" in line for line in lines) for lines in told] == [True, False, False]
    Bundle(folder / "x.plan").wait_verified()
    assert sorted(os.listdir(folder)) == [".x.plan.stages", "x.plan"]
    assert sorted(os.listdir(folder / ".x.plan.stages")) == ["engines", "gates", "graphs", "lock", "trace", "weights"]


def test_what_no_engine_of_it_reads_is_refused_before_any_work(bare_checkpoint, tmp_path):
    for option, value in (("engine__plugins", "libcm_plugins.so"), ("engine__strip_weights", True)):
        recipe = Recipe().replace(backend="tensorrt-rtx", tokens__prune_layer=1, **CARD, **{option: value})
        with pytest.raises(InputError, match=option.replace("__", ".")):
            builds.build(str(bare_checkpoint), tmp_path / "x.plan", recipe)
    assert os.listdir(tmp_path) == []


def test_an_edited_engine_is_noticed(rtx_bundle, tmp_path):
    other = tmp_path / "x.plan"
    shutil.copytree(rtx_bundle.path, other)
    plan = other / "engines" / "decode.plan"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    from cm_export.base.errors import BundleError

    with pytest.raises(BundleError, match=r"engines/decode\.plan.*sha256"):
        Bundle(other).wait_verified()


WIDE = {
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": True,
}


@pytest.mark.wide
def test_two_layers_of_qwen2_vl_2b_build(tmp_path):
    x = Exported(random_checkpoint(WIDE, tmp_path / "checkpoint"), tmp_path)
    recipe = Recipe().replace(backend="onnxruntime", tokens__prune_layer=1, engine__dense=False, **CARD)
    graphs = x.graphs(recipe)
    source = Source(lambda n: copy(graphs[n]), tuple(graphs), x.weights, x.shape, recipe, x.tower)
    version = engines.installed("tensorrt-rtx")
    aim = engines.Aim("tensorrt-rtx", version, target(f"rtx-{version}"), ("sm_86",), True, None, recipe.engine)
    asked = probe(x.shape, x.tower, x.config)
    told = engines.build_engines(source, x.family, asked, tmp_path, aim, lambda *_: None)
    assert {"vision", "prefill", "decode"} == set(told["graphs"])
    decode = {v["name"]: v["shape"] for v in told["graphs"]["decode"]["inputs"]}
    assert decode["ffn.1.down"] == ["batch", "core_neurons", 1536] and decode["past.1.value"][1:] == [2, 512, 128]
    assert all(g["passed"] for g in told["gates"])


def test_decode_for_several_requests_builds_and_prefill_stays_for_one(bare_bundle, tmp_path):
    bundle = Bundle(bare_bundle)
    recipe = bundle.recipe.replace(
        backend="tensorrt-rtx", engine__max_batch=4, engine__dense=False, engine__optimization_level=0, **CARD
    )
    aim = engines.aim(recipe)
    source = replace(Source.of(bundle), recipe=recipe)
    asked = probe(bundle.shape, bundle.tower, bundle.config)
    told = engines.build_engines(source, bundle.family, asked, tmp_path, aim, lambda *_: None)["graphs"]
    heads, width = bundle.shape.kv_heads, bundle.shape.head_dim
    least, likely, most = told["decode"]["profile"]["ffn.0.gate"]
    assert 1 == least[1] < likely[1] < most[1] == bundle.shape.ffn, "of the small model above every neuron is likely"
    assert told["decode"]["profile"]["past.0.key"] == [[n, heads, 512, width] for n in (1, 4, 4)]
    assert told["prefill"]["profile"]["attention_mask"] == [[1, n] for n in (2, 128, 256)]
    assert (tmp_path / "decode.plan").stat().st_size == told["decode"]["bytes"]


@pytest.fixture(scope="module")
def chooser(exported):
    from test_lowered_choices import packable

    return packable(exported)


@pytest.mark.parametrize("policy", ["active", "predicted"])
def test_decode_that_decides_itself_what_it_reads_builds(chooser, tmp_path, policy):
    """And passes the checks of its contract: every input reaches an output, names, types, shapes."""
    from test_lowered_choices import source_of

    source = source_of(chooser, policy, "fp16")
    told = write_graphs(source, tmp_path, target("rtx-1.7"), ["decode"])["graphs"]["decode"]
    assert any(name.startswith(("core_thresholds", "core_slots")) for name in told["profile"])
    job = _job(tmp_path, onnx.load(tmp_path / "decode.onnx", load_external_data=False), told)
    assert engines.run_builder(job, lambda *_: None)["bytes"] > 10_000


@pytest.mark.parametrize("kv", ["in_place", "copy"])
def test_dense_decode_of_several_tokens_builds_with_its_profiles(chooser, tmp_path, kv):
    """Also in the form of older versions, whose cache is copied: RTX stands in for their parser."""
    from test_lowered_choices import source_of

    what, source = replace(target("rtx-1.7"), kv=kv), source_of(chooser, "active", "fp16")
    graphs = {"decode_dense": chooser[0].dense["decode"]}
    source = replace(source, graph=lambda n: copy(graphs[n]), graphs=tuple(graphs))
    told = write_graphs(source, tmp_path, what)["graphs"]["decode_dense"]
    assert [p["inputs_embeds"][2][1] for p in told["profiles"]] == [1, 17]
    job = _job(tmp_path, onnx.load(tmp_path / "decode_dense.onnx", load_external_data=False), told)
    assert engines.run_builder(job, lambda *_: None)["bytes"] > 10_000


# ------------------------------------------------------------------------------------------ what must not pass
def _job(tmp_path, model, expected):
    onnx.save(model, tmp_path / "x.onnx")
    return {
        "module": "tensorrt_rtx",
        "onnx": str(tmp_path / "x.onnx"),
        "plan": str(tmp_path / "x.plan"),
        "expected": {"plugin_nodes": [], "index_inputs": []} | expected,
        "typed_flag": True,
        "plugin_library": None,
        "timing_cache": None,
        "architectures": ["sm_86"],
        "inspect": False,
        "workspace_mb": 0,
        "optimization_level": 0,
        "weight_streaming": False,
        "strip_weights": False,
    }


def _attention(with_length: bool):
    """One attention over a padded cache; `with_length` names its valid rows by an input that the parser does not know."""
    from onnx import TensorProto as T
    from onnx import helper as h

    values = {"q": [1, 4, 1, 64], "k": [1, 4, 96, 64], "v": [1, 4, 96, 64]}
    inputs = [h.make_tensor_value_info(n, T.FLOAT16, s) for n, s in values.items()]
    names = ["q", "k", "v"]
    if with_length:
        inputs.append(h.make_tensor_value_info("rows", T.INT64, [1]))
        names += ["", "", "", "rows"]
    node = h.make_node("Attention", names, ["y"], TRT_decomposable=1)
    graph = h.make_graph([node], "g", inputs, [h.make_tensor_value_info("y", T.FLOAT16, [1, 4, 1, 64])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 24)], ir_version=11)

    def told(values):
        return [
            {
                "name": v.name,
                "dtype": T.DataType.Name(v.type.tensor_type.elem_type).lower(),
                "shape": [d.dim_value for d in v.type.tensor_type.shape.dim],
            }
            for v in values
        ]

    profile = {v["name"]: [v["shape"]] * 3 for v in told(graph.input)}
    return model, {"inputs": told(graph.input), "outputs": told(graph.output), "profile": profile}


def test_an_input_that_the_parser_ignores_fails_the_build(tmp_path):
    assert engines.run_builder(_job(tmp_path, *_attention(False)), lambda *_: None)["bytes"]
    (tmp_path / "x.plan").unlink()
    with pytest.raises(CmExportError, match=r"input rows reaches no output"):
        engines.run_builder(_job(tmp_path, *_attention(True)), lambda *_: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e["inputs"][0].update(name="query"), "input query is missing"),
        (lambda e: e["inputs"][0].update(dtype="float"), "input q is HALF, not FLOAT"),
        (lambda e: e["outputs"][0].update(shape=[1, 4, 2, 64]), "output y is"),
        (lambda e: e["inputs"].pop(0), "input q was not asked for"),
        (lambda e: e.update(plugin_nodes=["ffn.0"]), "no plugin layer for ffn.0"),
        (lambda e: e.update(index_inputs=["core_neurons"]), "index core_neurons is no input"),
    ],
    ids=["renamed", "type", "shape", "extra", "no plugin", "no index"],
)
def test_a_network_that_is_not_what_was_asked_for_is_refused(tmp_path, change, words):
    model, expected = _attention(False)
    change(expected)
    with pytest.raises(CmExportError, match=words):
        engines.run_builder(_job(tmp_path, model, expected), lambda *_: None)
    assert not (tmp_path / "x.plan").exists()


def test_a_graph_that_does_not_parse_is_an_error_with_the_parsers_words(tmp_path):
    model, expected = _attention(False)
    model.graph.node[0].op_type, model.graph.node[0].domain = "CoreFFN", "cm_export"
    del model.graph.node[0].attribute[:]
    with pytest.raises(CmExportError, match=r"the parser refuses it \(.*CoreFFN"):
        engines.run_builder(_job(tmp_path, model, expected), lambda *_: None)


def test_a_builder_that_dies_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_CHILD", "this_is_no_module")
    with pytest.raises(CmExportError, match=r"the builder ended with code 1 \(.*this_is_no_module"):
        engines.run_builder(_job(tmp_path, *_attention(False)), lambda *_: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx"]


def test_a_builder_ends_with_its_parent():
    code = "import threading; from cm_export.backends.tensorrt import builder as b;"
    code += "threading.Thread(target=b._end_with_parent).start(); threading.Event().wait()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    child.stdin.close()
    assert child.wait(60) == 1


def test_a_card_that_nobody_builds_for_is_refused_before_any_work(tmp_path, capsys):
    out = tmp_path / "x.plan"
    for options, words in (
        (("--architecture", "sm_87"), "unknown architecture 'sm_87'; did you mean"),
        (("--architecture", "sm_86", "--capacity", "96", "--max-prompt", "96"), "engine.capacity = 96"),
        (("--architecture", "sm_86", "--precision", "int8"), "int8 rows need the plugin"),
        ((), "no GPU here"),
    ):
        code = main(["build", "--recipe", "demo", "--out", str(out), "--backend", "tensorrt-rtx", *options])
        said = capsys.readouterr().err
        assert code == 2 and words in said and "Traceback" not in said, said
        assert "trace" not in said
        assert not out.exists()
