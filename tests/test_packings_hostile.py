"""Checkpoints in few bits that lie about themselves, in settings, types, shapes and shards: one line each, nothing is written.

The readers alone are asked here; the wide test asks `cm-export build` the same.
"""

import functools
import json
import shutil
from functools import partial

import low_bit_checkpoints as made
import numpy as np
import pytest
import shared
from low_bit_checkpoints import Low
from random_models import random_checkpoint, random_text_config
from safetensors.numpy import load_file, save_file
from test_packings import AWQ, CT, GPTQ, WHOLE, ct

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.build import kept
from cm_export.cli import main
from cm_export.source import directory, quantised
from cm_export.source.checkpoint import resolve
from cm_export.source.parameters import parameters

UP = "model.layers.0.mlp.up_proj."
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
LEFT = {"bits": 4, "group": 32}
# name: (settings, how its tensors are made)
FORMATS = {
    "gptq": (GPTQ | {"group_size": 32}, made.gptq, LEFT),
    "gptq without g_idx": (GPTQ | {"group_size": 32}, made.without(made.gptq, "g_idx"), LEFT),
    "awq": (AWQ, made.awq, LEFT | {"symmetric": False}),
    "packed": (ct(CT, 4), partial(made.packed, with_order=True), LEFT | {"symmetric": False}),
    "whole": (ct(WHOLE, 8), made.whole, {"bits": 8, "group": -1, "symmetric": False}),
    "fp8": (FP8, None, {}),
}


def checkpoint(form):
    """A tiny Llama in that format."""
    settings, make, how = FORMATS[form]

    def write(here):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = random_text_config("llama", 1, **sizes, num_hidden_layers=1, tie_word_embeddings=False)
        random_checkpoint(config, here / "floats")
        rng = np.random.default_rng(1)

        def pack(module, weight):
            if not module.endswith(made.PRODUCTS):
                return None
            if make is None:
                return made.fp8(weight, (32, 32))
            low = Low.of(weight, rng=rng, **how)
            return make(low), low.numbers

        made.write(here / "floats", here / "model", settings, pack)

    return shared.once(f"hostile_{form.replace(' ', '_')}", write) / "model"


def settings_of(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


def whole_settings(value):
    return lambda config, tensors: config.update(quantization_config=value)


def tensor(part, change, of=UP):
    """One tensor of a module is replaced by what `change` makes of it; None: it is gone."""

    def apply(config, tensors):
        value = change(tensors.get(of + part))
        tensors.pop(of + part, None)
        if value is not None:
            tensors[of + part] = np.ascontiguousarray(value)

    return apply


@np.errstate(over="ignore")
def cast(value, kind):
    return value.astype(kind)


def typed(part, kind):
    return tensor(part, functools.partial(cast, kind=kind))


def gone(part):
    return tensor(part, lambda _: None)


def group(**weights):
    return settings_of(config_groups={"g": {"weights": {"num_bits": 4, "type": "int"} | weights}})


def spoilt(value):
    value = value.copy()
    value.reshape(-1)[3] = np.nan
    return value


# what is wrong: (format, change, words of the error)
WRONG = {
    "no object": ("gptq", whole_settings("gptq"), "quant_method None"),
    "a list": ("gptq", whole_settings([1]), "quant_method None"),
    "a method that is a list": ("gptq", settings_of(quant_method=["gptq"]), "['gptq']"),
    "bits in words": ("gptq", settings_of(bits="4"), "'4' bits"),
    "bits in a list": ("gptq", settings_of(bits=[4]), "[4] bits"),
    "groups of another length": ("gptq without g_idx", settings_of(group_size=48), "group_size 48"),
    "groups of length 0": ("gptq without g_idx", settings_of(group_size=0), "group_size 0"),
    "no length of groups": ("gptq without g_idx", settings_of(group_size="32"), "group_size '32'"),
    "scales of whole numbers": ("gptq", typed("scales", np.int32), "scales is I32"),
    "scales in a row": ("gptq", tensor("scales", np.ravel), "no GPTQ matrix"),
    "a scale that is no number": ("gptq", tensor("scales", spoilt), "scales holds NaN"),
    "a scale without end": ("fp8", tensor("weight_scale_inv", lambda t: t * np.inf), "weight_scale_inv holds NaN or inf"),
    "a group too few": ("gptq", tensor("scales", lambda t: t[:1]), "no GPTQ matrix"),
    "zeros of floats": ("gptq", typed("qzeros", np.float16), "qzeros is F16"),
    "codes in words of 64 bits": ("gptq", typed("qweight", np.int64), "qweight is I64"),
    "codes in a row": ("gptq", tensor("qweight", np.ravel), "no matrix of 32-bit words"),
    "codes turned": ("gptq", tensor("qweight", np.transpose), "no GPTQ matrix"),
    "another width": ("gptq", tensor("qweight", lambda t: t[:4]), "up_proj"),
    "a group of floats": ("gptq", typed("g_idx", np.float32), "g_idx is F32"),
    "a group that is none": ("gptq", tensor("g_idx", lambda t: t + 7), "g_idx does not name a group"),
    "a group below 0": ("gptq", tensor("g_idx", lambda t: t - 1), "g_idx does not name a group"),
    "groups of some inputs": ("gptq", tensor("g_idx", lambda t: t[:5]), "g_idx does not name a group"),
    "the weight as well": ("gptq", tensor("weight", lambda _: np.ones((96, 64), np.float32)), "up_proj.weight is F32"),
    "another scale": ("gptq", tensor("weight_scale_2", lambda _: np.ones(1, np.float32)), "up_proj.weight_scale_2"),
    "a scale of an activation": ("gptq", tensor("scales", lambda _: np.ones(96, np.float16), "model.layers.0.mlp.act_fn."),
                                 "nothing here says what it scales"),
    "statistics of bitsandbytes": ("gptq", tensor("absmax", lambda _: np.ones(9, np.uint8)), "up_proj.absmax is U8"),
    "no codes": ("gptq", gone("qweight"), "nothing here says what its numbers mean"),
    "no zeros": ("gptq", gone("qzeros"), "has no qzeros"),
    "groups that do not divide": ("awq", lambda config, tensors: [
        tensor(part, lambda t: np.concatenate([t, t[:1]]))(config, tensors) for part in ("scales", "qzeros")],
        "no AWQ matrix"),
    "no groups": ("awq", lambda config, tensors: [
        tensor(part, lambda t: t[:0])(config, tensors) for part in ("scales", "qzeros")], "do not fit together"),
    "half zeros": ("awq", typed("qzeros", np.float16), "qzeros is F16"),
    "a format in a list": ("packed", settings_of(format=["pack-quantized"]), "format ['pack-quantized']"),
    "a pattern in words": ("packed", settings_of(sparsity_config="2:4"), "sparsity_config format '2:4'"),
    "bits in quotes": ("packed", group(num_bits="4"), "'4' bits"),
    "weights in words": ("packed", settings_of(config_groups={"g": {"weights": "int4"}}), "weights 'int4'"),
    "blocks with a star": ("packed", group(block_structure="128*128"), "block_structure '128*128'"),
    "blocks of one length": ("packed", group(block_structure=[128]), "block_structure [128]"),
    "blocks of length 0": ("packed", group(block_structure="0x0"), "block_structure '0x0'"),
    "blocks of nothing": ("packed", group(block_structure="x"), "block_structure 'x'"),
    "a shape of three": ("packed", tensor("weight_shape", lambda t: np.array([2, 48, 64])), "weight_shape [2, 48, 64]"),
    "a shape of more rows": ("packed", tensor("weight_shape", lambda t: np.array([97, 64])), "weight_shape [97, 64]"),
    "a shape of floats": ("packed", typed("weight_shape", np.float32), "weight_shape is F32"),
    "scales that do not divide": ("packed", tensor("weight_scale", lambda t: t[:, [0, 0, 0]]), "weight_scale [96, 3]"),
    "no scales": ("packed", tensor("weight_scale", lambda t: t[:, :0]), "weight_scale [96, 0]"),
    "nothing packed": ("packed", gone("weight_packed"), "up_proj has no weight"),
    "zeros of more outputs": ("packed", tensor("weight_zero_point", lambda t: np.tile(t, (2, 1))), "point [24, 2]"),
    "an order of floats": ("packed", typed("weight_g_idx", np.float32), "weight_g_idx is F32"),
    "an order beyond the groups": ("packed", tensor("weight_g_idx", lambda t: t + 9), "weight_g_idx does not name"),
    "zeros beyond the codes": ("whole", tensor("weight_zero_point", lambda t: np.full((96, 1), 200, np.int16)), "to 200"),
    "zeros that are floats": ("whole", typed("weight_zero_point", np.float32), "weight_zero_point is F32"),
    "numbers of 16 bits": ("whole", typed("weight", np.int16), "weight is I16"),
    "numbers in a row": ("whole", tensor("weight", np.ravel), "weight is I8"),
    "numbers without a scale": ("whole", gone("weight_scale"), "nothing here says what its numbers mean"),
    "blocks below 0": ("fp8", settings_of(weight_block_size=[-1, 32]), "weight_block_size [-1, 32]"),
    "blocks in words": ("fp8", settings_of(weight_block_size="large"), "weight_block_size 'large'"),
    "floats of 16 bits": ("fp8", typed("weight", np.float16), "weight is F16"),
    "a scale of other blocks": ("fp8", tensor("weight_scale_inv", lambda t: t[:, :1]), "a scale [3, 1]"),
    "floats without a scale": ("fp8", gone("weight_scale_inv"), "nothing here says what its numbers mean"),
}  # fmt: skip


def spoil(case, out):
    """The checkpoint with that one thing wrong."""
    form, change, word = WRONG[case]
    source = checkpoint(form)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config, tensors = json.loads((out / "config.json").read_text()), made.read(source / "model.safetensors")
    change(config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return word


@functools.cache
def known():
    """The parameters of the model, which are the same in every format."""
    return parameters(checkpoint("gptq").with_name("floats"), families.find("llama"))


def look_at(path):
    """What a build looks at before it begins, as far as it is about a checkpoint in few bits."""
    resolve(str(path))
    return kept.survey(quantised.find(path), known(), families.find("llama"), None)


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_lies_is_refused_by_what_it_lies_about(case, tmp_path):
    word = spoil(case, tmp_path / "m")
    with pytest.raises(InputError) as caught:
        look_at(tmp_path / "m")
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_the_checkpoints_that_were_spoilt_are_whole(form):
    assert len(look_at(checkpoint(form)).held) == 7


@pytest.mark.wide
@pytest.mark.parametrize("case", WRONG)
def test_a_build_of_one_that_lies_says_it_in_one_line_and_writes_nothing(case, tmp_path, capsys):
    word = spoil(case, tmp_path / "m")
    assert refused(tmp_path, capsys).count(word) == 1


def refused(folder, capsys):
    """The one line that `build` says about the checkpoint in a folder; nothing else is there afterwards."""
    capsys.readouterr()
    assert main(["build", "--model", str(folder / "m"), "--out", str(folder / "x.plan"), "--quiet"]) in (1, 2)
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1, said
    assert {path.name for path in folder.iterdir()} == {"m"}
    return said.err


def sharded(out):
    """The GPTQ checkpoint in two shards, the parts of most matrices in both of them; returns its index."""
    source = checkpoint("gptq")
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, out / file)
    (out / directory.INDEX).write_text(json.dumps({"weight_map": where}))
    return where, files


def test_a_matrix_may_lie_in_several_shards(tmp_path):
    sharded(tmp_path / "m")
    found, whole = (quantised.find(path) for path in (tmp_path / "m", checkpoint("gptq")))
    for module in whole.modules:
        np.testing.assert_array_equal(found.matrix(module).numbers(), whole.matrix(module).numbers())


def without_a_shard(folder, where, files):
    (folder / files[1]).unlink()
    return f"missing {files[1]}"


def with_shards_swapped(folder, where, files):
    (folder / files[0]).rename(folder / "x")
    (folder / files[1]).rename(folder / files[0])
    (folder / "x").rename(folder / files[1])
    return "not in the shard it names"


def with_half_a_shard(folder, where, files):
    (folder / files[0]).write_bytes((folder / files[0]).read_bytes()[:-9])
    return "truncated"


def with_a_tensor_less(folder, where, files):
    tensors = load_file(folder / files[0])
    lost = next(name for name in sorted(tensors) if name.endswith(".scales"))
    save_file({n: t for n, t in tensors.items() if n != lost}, folder / files[0])
    return f"not in the shard it names: {lost}"


def with_an_index_of_less(folder, where, files):
    """A shard that holds more than the index says is read whole, so that nothing is missed."""
    lost = next(name for name in where if name.endswith(".qzeros"))
    tensors = load_file(folder / where[lost])
    save_file({n: t for n, t in tensors.items() if n != lost}, folder / where[lost])
    (folder / directory.INDEX).write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if n != lost}}))
    return f"{lost.rpartition('.')[0]} has no qzeros"


SHARDS = [without_a_shard, with_shards_swapped, with_half_a_shard, with_a_tensor_less, with_an_index_of_less]


@pytest.mark.parametrize("spoil", SHARDS)
def test_shards_that_are_not_all_there_are_named(spoil, tmp_path):
    word = spoil(tmp_path / "m", *sharded(tmp_path / "m"))
    with pytest.raises(InputError) as caught:
        look_at(tmp_path / "m")
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.wide
@pytest.mark.parametrize("spoil", SHARDS)
def test_a_build_names_them_and_writes_nothing(spoil, tmp_path, capsys):
    word = spoil(tmp_path / "m", *sharded(tmp_path / "m"))
    assert word in refused(tmp_path, capsys)
