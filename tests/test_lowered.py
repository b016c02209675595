"""Graphs lowered for TensorRT say what the portable graphs say: every version, every kind of recipe, random models."""

import dataclasses
import functools
import shutil

import numpy as np
import onnx
import pytest
import shared
from conftest import wide
from random_models import copy

from cm_export.backends.tensorrt import written_out
from cm_export.backends.tensorrt.export import Source, axis_ranges, describe, lowered, write_graphs
from cm_export.backends.tensorrt.targets import TARGETS, target
from cm_export.base.errors import GateFailed, InputError
from cm_export.build import gates_lowered
from cm_export.bundle import weights
from cm_export.bundle.bundle import Bundle
from cm_export.recipe.recipe import Recipe
from cm_export.source.probe import probe
from cm_export.surgery import halve as halving

SMALL = Recipe().replace(engine__capacity=96, engine__max_prompt=64, tokens__prune_layer=1)
VERSIONS = ("10.3", "10.7", "10.14", "10.15", "11.0", "rtx-1.7")
RECIPES = {
    "default": {},
    "paper": {"neurons__policy": "coreinfer", "tokens__policy": "overlap"},
    "index": {"tokens__policy": "attention", "tokens__cache": "index", "tokens__voters": "text"},
    "knee": {"tokens__policy": "value", "tokens__budget": "knee"},
    "each": {"tokens__policy": "diverse", "tokens__quota": "each"},
    "first": {"tokens__policy": "value", "tokens__first": "spread", "tokens__first_share": 0.75},
    "random": {"neurons__policy": "random", "tokens__policy": "random"},
    "filled": {"neurons__fill": "prompt", "neurons__row_norm": True, "tokens__policy": "anchor"},
    "counted": {"calibration": "x", "neurons__layers": "calibrated", "tokens__policy": "distinct"},
    "dense": {"neurons__policy": "dense", "tokens__policy": "dense"},
}


# Recipes that are lowered in another form each; the others differ in what the portable graph computes.
QUICK = ("index", "knee", "filled", "counted")


def source(x, recipe: Recipe) -> Source:
    graphs = x.graphs(recipe)
    return Source(lambda n: copy(graphs[n]), tuple(graphs), x.weights, x.shape, recipe, x.tower)


def gates(x, recipe, version, folder):
    s = source(x, recipe)
    write_graphs(s, folder, target(version))
    return prove(s, version, x.family, x.config, folder)


def check_all(x, recipe, version, folder):
    """Every gate of a model that sees is there and has passed."""
    found = {g.name: g for g in gates(x, recipe, version, folder)}
    assert all(g.passed for g in found.values())
    assert {"lowered vision", "lowered prefill", "lowered decode", "half vision", "half decode"} <= set(found)


def prove(s, version, family, config, folder):
    asked = probe(s.shape, s.tower, config)
    return gates_lowered.run_gates(s, target(version), family, s.tower, asked, folder, threads=1)


@pytest.mark.parametrize(
    ("seed", "version"),
    [
        *((0, v) for v in VERSIONS),
        (5, "10.3"),
        (5, "10.15"),
        *(wide(5, v) for v in VERSIONS if v not in ("10.3", "10.15")),
    ],
)
def test_for_every_version_the_lowered_graphs_equal_the_portable_ones(exported, tmp_path, seed, version):
    found = {g.name: g for g in gates(exported(seed), SMALL, version, tmp_path)}
    assert all(g.passed for g in found.values())
    assert {"lowered vision", "lowered prefill", "lowered decode", "half vision", "half decode"} <= set(found)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *((n, "10.3") for n in RECIPES if n != "default"),
        *((n, "rtx-1.7") if n in QUICK else wide(n, "rtx-1.7") for n in RECIPES if n != "default"),
    ],
)
def test_every_kind_of_recipe_is_lowered(exported, tmp_path, name, version):
    assert all(g.passed for g in gates(exported(0), SMALL.replace(**RECIPES[name]), version, tmp_path))


@pytest.mark.parametrize("name", [n if n in ("default", *QUICK) else wide(n) for n in RECIPES])
def test_the_same_tokens_stay_where_scores_are_not_nearly_equal(exported, tmp_path, name):
    found = {g.name: g.value for g in gates(exported(5), SMALL.replace(**RECIPES[name]), "10.3", tmp_path)}
    assert found["lowered choice"] == 1.0


# ------------------------------------------------------------------------------------------ planted bugs
def _unmasked(edit, weights, precision):
    for node in edit.graph.nodes:
        if node.op in ("Attention", "CoreAttention"):
            node.inputs[3] = edit.op("Mul", node.inputs[3], edit.constant(0, np.float32))
    return _REAL_HALVE(edit, weights, precision)


_REAL_HALVE = halving.halve


def _next_row() -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.CopyFrom(written_out.CACHE_COPY)
    at = next(n for n in function.node if n.op_type == "Equal")
    function.node.insert(list(function.node).index(at), onnx.helper.make_node("Add", ["at_B111", "one"], ["next"]))
    at.input[1] = "next"
    return function


def _without_scale() -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.CopyFrom(written_out.ATTENTION)
    next(n for n in function.node if list(n.output) == ["logits"]).input[0] = "q"
    return function


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (halving, "halve", _unmasked),
        (written_out, "CACHE_COPY", _next_row()),
        (written_out, "ATTENTION", _without_scale()),
    ],
    ids=["no mask", "a row too far", "no scale"],
)
def test_a_bug_in_the_lowering_fails_a_gate(exported, tmp_path, monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises(GateFailed, match="differs by"):
        gates(exported(0), SMALL, "10.3", tmp_path)


def test_a_prompt_that_is_padded_has_no_nan_in_16_bit(exported):
    x = exported(0)
    s = source(x, SMALL.replace(tokens__policy="dense"))
    model = lowered(s, "prefill", target("10.14"), "fp16")
    bounds = [n for n in model.graph.node if n.op_type == "Max"]
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    masks = {n.input[3] for n in model.graph.node if n.op_type == "Attention"}
    assert masks and all(any(casts[m] == b.output[0] for b in bounds) for m in masks)


def test_a_damaged_16_bit_weight_fails_a_gate(exported, tmp_path):
    x, recipe = exported(0), SMALL
    s = source(x, recipe)
    write_graphs(s, tmp_path, target("10.3"))
    file = tmp_path / "weights.fp16.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-(len(broken) // 3) :] = bytes(len(broken) // 3)
    file.write_bytes(broken)
    with pytest.raises(GateFailed, match="half"):
        prove(s, "10.3", x.family, x.config, tmp_path)


# ------------------------------------------------------------------------------------------ what is in a graph
def test_versions_get_what_they_know_and_nothing_else(exported):
    x = exported(0)
    s = source(x, SMALL)

    def ops(version, name="decode"):
        model = lowered(s, name, target(version))
        return {n.op_type for n in model.graph.node}, {f.name for f in model.functions}

    for version in VERSIONS:
        kinds, functions = ops(version)
        what = target(version)
        assert ("RMSNormalization" in kinds) == what.native_norm
        assert ("TensorScatter" in kinds) == (what.kv == "in_place")
        assert ("CoreFFN" in kinds) == what.plugins == ("CoreAttention" in kinds)
        assert functions == ({"CoreFFN", "CoreAttention"} if what.plugins else set())
        prefill, rest = ops(version, "prefill")
        assert ("Attention" in prefill) == what.native_attention and not rest
        assert not {"CoreFFN", "CoreAttention", "NonZero"} & prefill


def _casts(model: onnx.ModelProto) -> list[int]:
    return [onnx.helper.get_node_attr_value(n, "to") for n in model.graph.node if n.op_type == "Cast"]


def test_nothing_is_float64_and_large_weights_are_16_bit(exported):
    x = exported(0)
    s = source(x, SMALL.replace(tokens__policy="attention"))
    for precision, kind in (("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)):
        model = lowered(s, "prefill", target("10.3"), precision)
        assert onnx.TensorProto.DOUBLE not in _casts(model)
        assert all(t.data_type != onnx.TensorProto.DOUBLE for t in model.graph.initializer)
        large = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL and len(t.dims) > 1]
        assert large and all(t.data_type == kind for t in large)
        outputs = {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
        assert outputs["logits"] == onnx.TensorProto.FLOAT and outputs["present.0.key"] == kind


def test_every_axis_has_one_range_and_profiles_follow_it(exported):
    x = exported(0)
    recipe = SMALL.replace(engine__max_batch=3, engine__max_patches=400)
    s = source(x, recipe)
    every = axis_ranges(recipe, x.shape, x.tower)
    for name in s.chosen():
        # Requests decode together; prompts and pictures are read one at a time.
        ranges = every if name.startswith("decode") else every | {"batch": (1, 1, 1)}
        told = describe(lowered(s, name, target("10.14")), ranges, target("10.14"))
        for value in told["inputs"]:
            least, likely, most = told["profile"][value["name"]]
            assert all(a <= b <= c for a, b, c in zip(least, likely, most, strict=True)), value
            for axis, length in zip(value["shape"], most, strict=True):
                assert length == (axis if isinstance(axis, int) else ranges[axis][2])
    assert every["batch"] == (1, 3, 3) and every["patches"][2] == 400


def test_decode_reads_one_token_over_a_cache_of_fixed_size(exported):
    x = exported(0)
    s = source(x, SMALL)
    told = describe(lowered(s, "decode", target("10.3")), axis_ranges(SMALL, x.shape, x.tower), target("10.3"))
    shapes = {v["name"]: v["shape"] for v in told["inputs"]}
    assert shapes["inputs_embeds"][1] == 1 and shapes["attention_mask"] == ["batch", 96]
    assert shapes["past.0.key"][2] == 96 and shapes["write_index"] == ["batch"]
    assert told["index_inputs"] == ["core_neurons", "core_tokens"]
    assert told["plugins"] == {"CoreFFN": x.shape.layers, "CoreAttention": x.shape.layers}


# ------------------------------------------------------------------------------------------ refusals
def test_versions_that_are_not_known_are_refused():
    for wrong in ("10.2", "9.3", "rtx-1.0"):
        with pytest.raises(InputError, match="too old"):
            target(wrong)
    with pytest.raises(InputError, match="no TensorRT version"):
        target("newest")
    assert target("10.13.3.9").version == (10, 13) and target("11.4").name == "11.4"
    assert [t.version for t in TARGETS if t.module == "tensorrt"] == sorted(t.version for t in TARGETS[:-1])


def test_a_weight_beyond_16_bit_is_refused_and_bf16_takes_it(exported, tmp_path):
    x = exported(0)
    s = source(x, SMALL)
    large = "model.language_model.layers.0.self_attn.q_proj.weight"
    rows = np.array(x.weights[large])
    rows[0, 0] = 1e6

    class Loud:
        tensors, path = x.weights.tensors, x.weights.path

        def __getitem__(self, name):
            return rows if name == large else x.weights[name]

        def release(self):
            pass

    loud = dataclasses.replace(s, weights=Loud())
    with pytest.raises(InputError, match=r"does not fit into 16 bit.*bf16"):
        write_graphs(loud, tmp_path, target("10.3"))
    write_graphs(dataclasses.replace(loud, recipe=SMALL.replace(engine__precision="bf16")), tmp_path, target("10.3"))


def test_the_page_of_versions_is_the_table_that_the_lowering_reads():
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    rows = [
        r.split(" | ") for r in page.split("<!-- versions -->")[1].split("<!-- end -->")[0].strip().splitlines()[2:]
    ]
    told = []
    for version, module, norm, attention, cache, ops, functions in rows:
        name = version.removeprefix("| ")
        told.append(
            (
                tuple(map(int, name.split("."))),
                module.strip("`"),
                norm == "native",
                attention == "native",
                cache.replace(" ", "_"),
                ops == "plugin",
                functions.startswith("kept"),
            )
        )
    assert told == [
        (t.version, t.module, t.native_norm, t.native_attention, t.kv, t.plugins, t.keep_functions) for t in TARGETS
    ]


# ------------------------------------------------------------------------------------------ low bits
@functools.cache
def low_bits(demo_bundle, version, precision):
    """The demo model as an engine of that version gets it, written once; its bundle, what was told, and the folder."""
    bundle, folder = Bundle(demo_bundle), shared.own(f"lowered_{version}_{precision}")
    small = {"engine__capacity": 96, "engine__max_prompt": 64, "engine__precision": precision}
    s = dataclasses.replace(Source.of(bundle), recipe=bundle.recipe.replace(**small))
    return s, bundle, write_graphs(s, folder, target(version)), folder


def to_damage(demo_bundle, tmp_path):
    """(source, bundle, folder) of weights in 4 bits, a copy."""
    s, bundle, _, folder = low_bits(demo_bundle, "10.3", "int4")
    return s, bundle, shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("version", "precision"), [("10.3", "int4"), ("10.16", "int8"), wide("10.16", "int4"), ("rtx-1.7", "int4")]
)
def test_weights_in_low_bits_are_those_of_the_model(demo_bundle, version, precision):
    s, bundle, told, folder = low_bits(demo_bundle, version, precision)
    found = prove(s, version, bundle.family, bundle.config, folder)
    values = {g.name: g.value for g in found}
    assert 0 < values["packing"] < {"int4": 0.15, "int8": 0.01}[precision]
    assert values["half decode"] < 0.2 and values["half choice"] > 0.9
    decode = onnx.load(folder / "decode.onnx", load_external_data=False)
    packed = [n for n in decode.graph.node if n.op_type in ("DequantizeLinear", "CoreFFN")]
    layers = bundle.shape.layers
    assert len(packed) == (
        layers if precision == "int8" else 4 * layers + (layers if told["version"] != "rtx-1.7" else 0)
    )


def test_a_packed_weight_that_is_damaged_fails_a_gate(demo_bundle, tmp_path):
    s, bundle, folder = to_damage(demo_bundle, tmp_path)
    file = folder / "weights.int4.safetensors"
    place = weights.index(file)["model.language_model.layers.3.mlp.up_proj.weight/int4.words"]
    content = bytearray(file.read_bytes())
    content[place.offset : place.offset + place.length] = content[place.offset + 1 : place.offset + place.length + 1]
    file.write_bytes(content)
    with pytest.raises(GateFailed, match=r"packing.*layers\.3\.mlp\.up_proj"):
        prove(s, "10.3", bundle.family, bundle.config, folder)


def test_a_scale_that_is_no_number_fails_the_gate_of_its_weight(demo_bundle, tmp_path):
    s, bundle, folder = to_damage(demo_bundle, tmp_path)
    file = folder / "weights.int4.safetensors"
    place = weights.index(file)["model.language_model.layers.0.mlp.gate_proj.weight/int4.scale"]
    content = bytearray(file.read_bytes())
    content[place.offset : place.offset + 2] = np.array(np.nan, np.float16).tobytes()
    file.write_bytes(content)
    with pytest.raises(GateFailed, match=r"packing.*layers\.0\.mlp\.gate_proj.*differs by inf"):
        prove(s, "10.3", bundle.family, bundle.config, folder)


def test_decode_and_prefill_share_the_bytes_of_a_packed_weight(demo_bundle):
    *_, folder = low_bits(demo_bundle, "10.3", "int4")
    places = {}
    for name in ("decode", "prefill"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        tensor = next(t for t in graph.initializer if t.name.endswith("layers.0.mlp.gate_proj.weight/int4.words"))
        places[name] = sorted((e.key, e.value) for e in tensor.external_data)
    assert places["decode"] == places["prefill"]


def test_sizes_that_do_not_pack_and_int8_without_a_plugin_are_refused(exported, demo_bundle, tmp_path):
    s = source(exported(1), SMALL.replace(engine__precision="int4"))  # 12 wide: no whole words
    with pytest.raises(InputError, match=r"build with --precision fp16"):
        write_graphs(s, tmp_path, target("10.3"))
    with pytest.raises(InputError, match=r"int8 rows need the plugin"):
        low_bits(demo_bundle, "rtx-1.7", "int8")
