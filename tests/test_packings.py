"""Checkpoints in few bits are read exactly, their codes kept where that loses nothing, and nothing becomes float in silence."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import low_bit_checkpoints as made
import numpy as np
import pytest
import shared
import torch
from conftest import built, cm_export, few_answers, take_stages
from low_bit_checkpoints import Low
from safetensors.numpy import load_file, save_file

from cm_export import families
from cm_export.base.errors import GateFailed, InputError
from cm_export.build import kept
from cm_export.build.job import prepare
from cm_export.build.kept import Codes, Held
from cm_export.build.steps import packed as step
from cm_export.bundle.bundle import Bundle
from cm_export.bundle.packed import Entry
from cm_export.host.images import open_image
from cm_export.host.loaded import load
from cm_export.host.runner import Budget
from cm_export.quant import rows
from cm_export.recipe.aliases import DEMO
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf
from cm_export.source import packings, quantised
from cm_export.source.checkpoint import resolve
from cm_export.source.packings import Parts, awq, compressed_tensors, fp8, gptq

RNG = partial(np.random.default_rng, 7)


def parts_of(folder: Path, tensors: dict[str, np.ndarray]) -> Parts:
    save_file({f"a.b.{n}": np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "x.safetensors")
    return Parts("a.b", dict.fromkeys(tensors, folder / "x.safetensors"))


def low_of(outputs=48, inputs=128, **how) -> Low:
    rng = RNG()
    return Low.of(rng.standard_normal((outputs, inputs)).astype(np.float32), rng=rng, **how)


GPTQ = {"quant_method": "gptq", "bits": 4}
V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WHOLE = CT | {"format": "int-quantized"}


def ct(base: dict, bits: int = 4, **weights) -> dict:
    """compressed-tensors' settings with one group of modules."""
    return base | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits} | weights}}}


READ = {
    "gptq": (gptq, GPTQ, made.gptq, {"bits": 4, "group": 128}),
    "gptq, zeros": (gptq, GPTQ, made.gptq, {"bits": 4, "group": 32, "symmetric": False}),
    "gptq v2, zeros": (gptq, V2, partial(made.gptq, v2=True), {"bits": 4, "group": 64, "symmetric": False}),
    "gptq, 8 bits, zeros": (gptq, GPTQ | {"bits": 8}, made.gptq, {"bits": 8, "group": 32, "symmetric": False}),
    "gptq, one group": (gptq, GPTQ, made.gptq, {"bits": 4, "group": -1, "inputs": 160}),
    "gptq, dynamic": (gptq, GPTQ, made.gptq, {"bits": 8, "group": 128}),
    "awq": (awq, AWQ, made.awq, {"bits": 4, "group": 64, "symmetric": False}),
    "awq, groups of 128": (awq, AWQ, made.awq, {"bits": 4, "group": 128, "symmetric": False, "inputs": 256}),
    "int4": (compressed_tensors, CT, made.packed, {"bits": 4, "group": 32}),
    "int4, zeros": (compressed_tensors, CT, made.packed, {"bits": 4, "group": 64, "symmetric": False, "outputs": 44}),
    "int4 by output": (compressed_tensors, CT, made.packed, {"bits": 4, "group": -1, "inputs": 100}),
    "int8 packed": (compressed_tensors, CT, made.packed, {"bits": 8, "group": -1, "symmetric": False, "outputs": 45}),
    "int8": (compressed_tensors, WHOLE, made.whole, {"bits": 8, "group": -1}),
    "int8, zeros": (compressed_tensors, WHOLE, made.whole, {"bits": 8, "group": 32, "symmetric": False}),
    "gptq, longer groups": (gptq, GPTQ, made.gptq, {"bits": 4, "group": 256, "inputs": 512}),
    "gptq, groups of 96": (gptq, GPTQ, made.gptq, {"bits": 4, "group": 96, "inputs": 192}),
    "gptq, no g_idx, a shorter last group": (gptq, GPTQ | {"group_size": 128}, made.without(made.gptq, "g_idx"),
                                             {"bits": 4, "group": 128, "inputs": 384, "symmetric": False}),
    "gptq, no g_idx, one group": (gptq, GPTQ | {"group_size": -1, "desc_act": True}, made.without(made.gptq, "g_idx"),
                                  {"bits": 8, "group": -1, "inputs": 96}),
    "int4, as its settings say": (compressed_tensors, ct(CT, 4, symmetric=False), made.packed,
                                  {"bits": 4, "group": 32, "symmetric": False}),
    "int4, static order of activations": (compressed_tensors, ct(CT, 4, actorder="static"), made.packed,
                                          {"bits": 4, "group": 128, "inputs": 256}),
    "int4, an order that says nothing": (compressed_tensors, ct(CT, 4, actorder="group"), made.packed_without_order,
                                         {"bits": 4, "group": 64}),
    "int8 of a whole matrix": (compressed_tensors, ct(WHOLE, 8, strategy="tensor"), made.whole_by_one_scale,
                               {"bits": 8, "group": -1, "one": True}),
    "int8, naive": (compressed_tensors, ct(CT | {"format": "naive-quantized"}, 8), made.whole, {"bits": 8, "group": -1}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_matrix_is_read_and_its_codes_are_kept_to_the_last_bit(case, tmp_path):
    check_read(*READ[case], tmp_path)


def check_read(packing, settings, pack, how, tmp_path):
    low = low_of(**how)
    packing.check(settings, tmp_path)
    matrix = packing.matrix(parts_of(tmp_path, pack(low)), settings)
    assert (matrix.inputs, matrix.outputs, matrix.bits, matrix.why_not) == (*low.codes.shape, how["bits"], None)
    np.testing.assert_array_equal(matrix.numbers(), low.numbers.T)
    codes, scale, zero = matrix.stored()
    np.testing.assert_array_equal(rows.numbers(rows.pack(codes, scale, zero, matrix.bits, matrix.group)), low.numbers.T)


BLOCKS = [(128, 128), (1, 200), (300, 200), (32, 64)]


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("block", BLOCKS)
def test_eight_bit_floats_are_read_with_the_scale_of_their_block_and_have_no_codes(name, block, tmp_path):
    check_floats(fp8, compressed_tensors, name, block, tmp_path)


def check_floats(fp8, compressed_tensors, name, block, tmp_path):
    tensors, numbers = made.fp8(RNG().standard_normal((300, 200)).astype(np.float32), block, name)
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    for packing in (fp8, compressed_tensors) if name == "weight_scale" else (fp8,):
        own = settings if packing is fp8 else {"config_groups": {"g": {"weights": {"block_structure": list(block)}}}}
        matrix = packing.matrix(parts_of(tmp_path, tensors), own)
        np.testing.assert_array_equal(matrix.numbers(), numbers.T)
        assert matrix.why_not == "they are 8-bit floats"
    if name == "weight_scale":  # as older releases of compressed-tensors wrote it
        own = {"config_groups": {"g": {"weights": {"block_structure": "x".join(map(str, block))}}}}
        read = compressed_tensors.matrix(parts_of(tmp_path, tensors), own)
        np.testing.assert_array_equal(read.numbers(), numbers.T)
    if block == (128, 128):  # what transformers takes where a configuration does not say it
        np.testing.assert_array_equal(fp8.matrix(parts_of(tmp_path, tensors), {}).numbers(), numbers.T)
    if block == (300, 200):
        scalar = tensors | {name: tensors[name].reshape(())}
        np.testing.assert_array_equal(fp8.matrix(parts_of(tmp_path, scalar), {}).numbers(), numbers.T)


ODD_GROUPS = [
    ({"bits": 4, "group": 32, "shuffled": True}, "desc_act"),
    ({"bits": 8, "group": 64, "shuffled": True, "symmetric": False}, "desc_act"),
    ({"bits": 4, "group": 16}, "no multiple of 32"),
    ({"bits": 4, "group": 40, "inputs": 120}, "no multiple of 32"),
]


@pytest.mark.parametrize(("how", "word"), ODD_GROUPS)
def test_groups_that_the_layout_does_not_have_are_read_right_and_say_why_they_are_not_kept(how, word, tmp_path):
    check_odd_groups(gptq, compressed_tensors, how, word, tmp_path)


def check_odd_groups(gptq, compressed_tensors, how, word, tmp_path):
    low = low_of(**how)
    for packing, tensors in ((gptq, made.gptq(low)), (compressed_tensors, made.packed(low, with_order=True))):
        matrix = packing.matrix(parts_of(tmp_path, tensors), GPTQ)
        np.testing.assert_array_equal(matrix.numbers(), low.numbers.T)
        assert word in matrix.why_not


def test_a_scale_that_is_no_float16_keeps_its_codes_out_and_one_of_bfloat16_that_fits_lets_them_in(tmp_path):
    check_scales(gptq, tmp_path)


def check_scales(gptq, tmp_path):
    low = low_of(bits=4, group=32)
    for scale, fits in (
        (low.scale.astype(np.float32) * 1.0001, False),
        (np.full(low.scale.shape, 2.0**-9, np.float32), True),
    ):
        matrix = gptq.matrix(parts_of(tmp_path, made.gptq(low) | {"scales": scale}), GPTQ)
        assert (matrix.why_not is None) == fits
    assert "16-bit" in gptq.matrix(parts_of(tmp_path, made.gptq(low) | {"scales": scale * 1e9}), GPTQ).why_not


UNREAD = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "hqq": {"quant_method": "hqq"},
    "eetq": {"quant_method": "eetq"},
    "torchao": {"quant_method": "torchao"},
    "mxfp4": {"quant_method": "mxfp4"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "auto-round": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4},
    "None": {"bits": 4},
    "marlin": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    "3 bits": {"quant_method": "gptq", "bits": 3},
    "rotation": {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"},
    "gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "llm-awq": {"quant_method": "awq", "bits": 4, "backend": "llm-awq"},
    "gemv_fast": {"quant_method": "awq", "bits": 4, "format": "gemm", "checkpoint_format": "gemv_fast"},
    "EoRA": {"quant_method": "gptq", "bits": 4, "adapter": {"name": "lora", "path": "EoRA"}},
    "nvfp4-pack-quantized": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    "marlin-24": {"quant_method": "compressed-tensors", "format": "marlin-24"},
    "mixed-precision": {"quant_method": "compressed-tensors", "format": "mixed-precision"},
    "mxfp4-pack-quantized": CT | {"format": "mxfp4-pack-quantized"},
    "mxfp8-quantized": CT | {"format": "mixed-precision", "config_groups": {"g": {"format": "mxfp8-quantized"}}},
    "dense": CT | {"format": "dense", "quantization_status": "frozen"},
    "7 bits": ct(CT, 7),
    "16 bits": ct(CT | {"format": "float-quantized"}, 16, type="float"),
    "float-quantized": ct(CT | {"format": "float-quantized"}, 8, type="int"),
    "'float'": ct(CT, 8, type="float"),
    "sparse-24-bitmask": CT | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transform_config": CT | {"transform_config": {"config_groups": {"R1": {}}}},
    "weight_block_size": {"quant_method": "fp8", "weight_block_size": [128]},
}


@pytest.mark.parametrize("word", UNREAD)
def test_a_packing_that_is_not_read_is_refused_by_its_name_with_what_to_do(word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": UNREAD[word]}))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        resolve(str(tmp_path))
    for part in ("quantised checkpoint", word, "original float checkpoint"):
        assert part in str(caught.value)


def test_tensors_that_do_not_fit_together_are_refused_by_the_modules_name(tmp_path):
    check_refused({p: p for p in (gptq, awq, compressed_tensors, fp8)}, tmp_path)


def check_refused(readers, tmp_path):
    low = low_of(bits=4, group=32)
    shuffled = low_of(bits=4, group=32, shuffled=True)
    wrong = [
        (gptq, made.without(made.gptq, "g_idx")(low)),  # in groups of how many, nothing says
        (gptq, made.gptq(low) | {"scales": (low.scale * 2**14).astype(np.int32)}),
        (compressed_tensors, made.whole(low) | {"weight": low.numbers}),  # not yet rounded
        (fp8, {"weight": np.ones((4, 4), np.float32), "weight_scale": np.ones((), np.float32)}),
        (fp8, made.fp8(low.numbers, (16, 64))[0]),  # blocks of 128 by 128 would be one
        (compressed_tensors, made.fp8(low.numbers, (16, 64), "weight_scale")[0]),
        (
            compressed_tensors,
            made.fp8(low.numbers, (1, 128), "weight_scale")[0] | {"weight_zero_point": np.ones((48, 1), np.int8)},
        ),
        (gptq, made.gptq(low) | {"scales": low.scale[:, :8]}),
        (gptq, made.gptq(low) | {"g_idx": np.full(128, 9, np.int32)}),
        (gptq, {n: t for n, t in made.gptq(low).items() if n != "scales"}),
        (awq, made.awq(low) | {"scales": low.scale[:, :8]}),
        (compressed_tensors, made.packed(low) | {"weight_shape": np.array([48, 999], np.int64)}),
        (compressed_tensors, made.packed(low) | {"weight_scale": low.scale[:, :8].T}),
        (compressed_tensors, made.packed(low) | {"weight_zero_point": np.ones((3, 3), np.int32)}),
        (fp8, {"weight": np.ones((4, 4), np.float32), "weight_scale": np.ones((3, 2), np.float32)}),
    ]
    for packing, tensors in wrong:
        with pytest.raises(InputError, match=r"a\.b"):
            readers[packing].matrix(parts_of(tmp_path, tensors), GPTQ if packing is gptq else {})
    for packing, tensors, settings in (
        (gptq, made.without(made.gptq, "g_idx")(shuffled), GPTQ | {"group_size": 32, "desc_act": True}),
        (compressed_tensors, made.packed(low), ct(CT, 8)),
        (compressed_tensors, made.packed(low), ct(CT, 4, symmetric=False)),
    ):
        with pytest.raises(InputError, match=r"a\.b"):
            readers[packing].matrix(parts_of(tmp_path, tensors), settings)


ACCEPTED = {
    "awq as transformers 5 saves it": AWQ | {"backend": "auto", "format": "gemm", "sym": False, "desc_act": False},
    "awq of GPTQModel": AWQ | {"checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32", "desc_act": False},
    "awq that leaves the tower": AWQ | {"version": "GEMM", "modules_to_not_convert": ["visual"], "zero_point": True},
    "gptq of optimum": GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]], "exllama_config": {"version": 1},
                               "sym": True, "desc_act": True, "block_name_to_quantize": None, "use_cuda_fp16": False},
    "gptq of GPTQModel": V2 | {"pack_dtype": "int32", "lm_head": True, "meta": {"quantizer": ["gptqmodel:2.0"]},
                               "dynamic": {"-:.*visual.*": {}}},
    "compressed-tensors of two kinds": CT | {"format": "mixed-precision", "config_groups": {
        "a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int"}},
        "b": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}}, "c": {"format": "int-quantized"}}},
    "compressed-tensors, a preset": WHOLE | {"config_groups": {"W8A8": ["Linear"]}, "ignore": ["re:.*lm_head", "re:.*visual.*"]},
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_settings_of_other_programs_that_change_nothing_about_the_layout_are_accepted(case, tmp_path):
    packings.find(ACCEPTED[case], tmp_path)


def held(weight="w", kind="ffn", bits=4, why_not=None, **more) -> Held:
    return Held(**{"module": weight, "parameter": weight, "weight": weight, "kind": kind, "bits": bits, "length": 128,
                   "group": 128, "zeros": True, "why_not": why_not} | more)  # fmt: skip


def settled(recipe: Recipe, *matrices: Held, changed=(), reordered=False, tiny=True):
    shape = families.decoder_shape(
        {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "num_key_value_heads": 2, "hidden_act": "silu",
         "intermediate_size": 128 if tiny else 10**6, "vocab_size": 96}
    )  # fmt: skip
    codes = Codes(None, None, matrices)
    return kept.settle(codes, recipe, recipe.for_model(shape), changed, reordered)


@pytest.mark.parametrize("tiny", [True, False])
def test_codes_are_kept_where_nobody_asks_for_something_else_and_floats_get_eight_bits(tiny):
    recipe, codes = settled(Recipe(), held("up"), held("q", "attention", 8), tiny=tiny)
    w = recipe.weights
    assert (w.codes, w.of("ffn"), w.of("attention"), w.of("head"), w.of("vision")) == ("auto", 4, 8, 8, 8)
    assert {*codes.kept} == {"up", "q"} and not codes.others


@pytest.mark.parametrize(
    ("overrides", "kind", "bits", "how", "why"),
    [
        ({"weights__precision": "fp32"}, "ffn", 4, {}, "asks for 32 bits"),
        ({"weights__precision": "int4"}, "ffn", 8, {}, "asks for 4 bits"),
        ({"weights__ffn": "fp32"}, "ffn", 4, {}, "asks for 32 bits"),
        ({"weights__codes": "anew"}, "ffn", 4, {}, "anew"),
        ({"neurons__policy": "griffin"}, "ffn", 4, {}, "griffin"),
        ({"backend": "tensorrt"}, "ffn", 4, {}, "engines"),
        ({}, "ffn", 4, {"changed": ["w"]}, "adapter"),
        ({}, "ffn", 4, {"reordered": True}, "another order"),
        ({"weights__precision": "int8"}, "ffn", 4, {}, None),
        ({"weights__precision": "int4"}, "ffn", 4, {}, None),
        ({"neurons__policy": "griffin"}, "attention", 4, {}, None),
        ({}, "attention", 4, {"reordered": True}, None),
    ],
)
def test_codes_give_way_to_what_was_asked_for_and_the_reason_is_kept(overrides, kind, bits, how, why):
    recipe, codes = settled(Recipe().replace(**overrides), held("w", kind, bits), held("o", "value", bits), **how)
    assert ("w" in codes.kept) == (why is None) and (why is None or why in codes.others["w"])
    if kind == "ffn" and "griffin" in str(overrides):
        assert recipe.weights.of("ffn") == 32


def test_a_build_that_must_keep_codes_is_refused_where_one_cannot_be_kept():
    assert settled(Recipe().replace(weights__codes="kept"), held())[1].kept
    for one, how in ((held(why_not="no room"), {}), (held(), {"changed": ["w"]}), (held(), {"reordered": True})):
        with pytest.raises(InputError, match=r"cannot be kept, e\.g\. w"):
            settled(Recipe().replace(weights__codes="kept"), one, **how)


def test_the_manifest_counts_what_became_of_every_kind_and_says_it_in_words():
    matrices = [
        held("g"),
        held("u"),
        held("g2"),
        held("u2", why_not="no room"),
        held("q", "attention"),
        held("h", "head"),
    ]
    codes = Codes(
        SimpleNamespace(method="gptq"),
        None,
        tuple(matrices),
        {h.weight: h for h in matrices if h.why_not is None},
        {"u2": "no room"},
    )
    entry = partial(Entry, bits=4, group=128, inputs=128, outputs=(4, 4))
    entries = {"a": entry(("g", "u"), kept=True), "b": entry(("g2", "u2")), "c": entry(("q",), kept=True)}
    found = {row["kind"]: row for row in kept.rows(codes, {n: e.to_dict() for n, e in entries.items()})}
    assert found["ffn"]["became"] == {"kept": 2, "4 bits anew": 2} and "no room" in found["ffn"]["why"]
    assert found["attention"]["became"] == {"kept": 1} and found["head"]["became"] == {"float32": 1}
    said = "\n".join(row["said"] for row in found.values())
    assert "(gptq), 2 kept as they are, 2 rounded to 4 bits anew" in said and "1 read as float32" in said


# ---------------------------------------------------------------- whole checkpoints


def demo_in_four_bits(folder: Path) -> dict[str, np.ndarray]:
    """The demo model as AutoAWQ would leave it: the decoder's products in 4 bits with zeros, the rest float16."""
    rng = RNG()

    def pack(module: str, weight: np.ndarray):
        if not module.endswith(made.PRODUCTS) or "visual" in module:
            return None
        group = 64 if module.endswith("k_proj") else 128
        low = Low.of(weight, 4, group, rng, symmetric=False)
        return made.awq(low), low.numbers

    return made.write(DEMO, folder, AWQ | {"group_size": 128, "zero_point": True}, pack, zero_biases=True)


@pytest.fixture(scope="module")
def in_awq(demo_bundle) -> Path:
    """model: that checkpoint; float: the same numbers as floats; x.plan: its bundle."""

    def make(here: Path) -> None:
        meant = demo_in_four_bits(here / "model")
        shutil.copytree(DEMO, here / "float")
        save_file({n: v.astype(np.float32) for n, v in meant.items()}, here / "float" / "model.safetensors")
        take_stages(demo_bundle, here / "x.plan")
        with few_answers():
            built(here / "x.plan", "--model", here / "model")

    return shared.once("in_awq", make)


def test_a_build_keeps_the_codes_of_every_matrix_and_says_so(in_awq):
    bundle, meant = Bundle(in_awq / "x.plan"), load_file(in_awq / "float" / "model.safetensors")
    became = {row["kind"]: row["became"] for row in bundle.manifest["codes"]}
    assert became == {"ffn": {"kept": 24}, "attention": {"kept": 24}, "value": {"kept": 8}}
    assert any("24 kept as they are" in note for note in bundle.manifest["notes"])
    weights = bundle.manifest["recipe"]["weights"]
    assert (weights["codes"], weights["ffn"], weights["precision"]) == ("auto", "int4", "int8")
    entries = bundle.packed.entries
    groups = {
        name.split(".")[-1]: (e.bits, e.group, e.kept) for name, e in entries.items() if name.startswith("layers.0")
    }
    # k has groups of 64, so it does not lie beside q and v
    assert groups.pop("attention_in_2") == (4, 64, True)
    assert {*groups.values()} == {(4, 128, True)} and {*groups} == {
        "ffn_in",
        "ffn_out",
        "attention_in",
        "attention_out",
    }
    assert entries["head"].bits == 8 and not entries["head"].kept
    for layer, part in ((0, "gate_proj"), (7, "up_proj"), (3, "down_proj")):
        name = f"layers.{layer}.mlp.{part}.weight"
        stored = bundle.weights[f"model.language_model.{name}" + ("_t" if part == "down_proj" else "")]
        np.testing.assert_array_equal(stored.T if part == "down_proj" else stored, meant[f"model.{name}"])
    assert "quantization_config" not in json.dumps(bundle.manifest["model"]["config"])
    assert "24 kept as they are" in cm_export("inspect", in_awq / "x.plan").stdout


def test_answers_are_those_of_transformers_on_the_numbers_that_the_codes_stand_for(in_awq):
    stock = hf.load(in_awq / "float", families.find("qwen2_vl"))
    images = sorted((DEMO.parent / "images").glob("*.png"))[:3]
    with load(in_awq / "x.plan", threads=1) as runner:
        tower = runner.bundle.tower
        rule = tower.rule(json.loads((DEMO / "preprocessor_config.json").read_text()))
        for image in images:
            opened = open_image(image)
            asked = runner.ask("describe : what shape is in the image?", runner.see([opened]))
            answer = [*runner.tokens(runner.prefill(asked, Budget(dense=True)), 6, frozenset({2}))]
            ids = torch.from_numpy(asked.ids)[None]
            given = tower.stock([tower.picture(opened, rule)], asked.ids == runner.bundle.shape.image_token)
            more = {n: torch.from_numpy(v) for n, v in given.items()}
            with torch.no_grad():
                out = stock.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **more)[
                    0, ids.shape[1] :
                ].tolist()
            assert answer and out[: len(answer)] == answer


def test_codes_that_are_not_the_numbers_of_the_weight_file_end_a_build(in_awq):
    source = quantised.find(in_awq / "model")
    bundle = Bundle(in_awq / "x.plan")
    name, entry = "layers.0.ffn_out", bundle.packed.entries["layers.0.ffn_out"]
    down = entry.weights[0]
    for module, fits in (("model.layers.0.mlp.down_proj", True), ("model.layers.1.mlp.down_proj", False)):
        own = Codes(source, None, (), {down: held(down, module=module)})
        if fits:
            packed = step._kept(name, entry, bundle.weights, own, lambda: None)
            np.testing.assert_array_equal(packed.codes, bundle.packed.rows(name).codes)
        else:
            with pytest.raises(GateFailed, match="not the numbers"):
                step._kept(name, entry, bundle.weights, own, lambda: None)


def test_a_bias_that_the_model_does_not_have_must_be_zero(in_awq, tmp_path):
    def has(name: str) -> bool:
        return any(part in name for part in ("q_proj", "k_proj", "v_proj"))

    shutil.copytree(in_awq / "model", tmp_path / "m")
    source = quantised.find(tmp_path / "m")
    with source.in_float32(tmp_path, has, lambda *_, **__: None) as out:
        names = {*load_file(out / "model.safetensors")}
        assert "model.layers.0.self_attn.q_proj.bias" in names and "model.layers.0.mlp.up_proj.bias" not in names
        assert json.loads((out / "config.json").read_text()) == json.loads((DEMO / "config.json").read_text())
    assert not out.exists()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] += 1
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.bias is not zero"), source.in_float32(tmp_path, has, print):
        pass


def test_a_packed_head_is_no_embedding_whatever_the_configuration_ties(in_awq, tmp_path):
    assert not hf.head_differs(in_awq / "model")
    shutil.copytree(in_awq / "model", tmp_path / "m")
    own = made.awq(low_of(outputs=96, inputs=256, bits=4, group=128))
    tensors = load_file(tmp_path / "m" / "model.safetensors") | {f"lm_head.{n}": t for n, t in own.items()}
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "m" / "model.safetensors")
    assert hf.head_differs(tmp_path / "m")


def test_quantised_tensors_without_a_word_in_config_json_are_refused(in_awq, tmp_path):
    shutil.copytree(in_awq / "model", tmp_path / "m")
    shutil.copyfile(DEMO / "config.json", tmp_path / "m" / "config.json")
    with pytest.raises(InputError, match="quantised checkpoint"):
        resolve(str(tmp_path / "m"))


def test_kept_of_a_float_checkpoint_is_refused():
    with pytest.raises(InputError, match="holds no codes"):
        prepare(resolve("demo"), Recipe().replace(weights__codes="kept"), 1, lambda *_: None)
