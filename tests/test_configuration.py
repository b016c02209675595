"""A configuration means what the installed transformers makes of it, or is refused by name: compared on generated ones.

preprocessor_config.json, processor_config.json      against AutoImageProcessor (its PIL variant)
config.json of every family                          against the logits of from_pretrained
eos_token_id in three places                         against what generate() stops at
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import wide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_models import random_checkpoint, random_config, random_text_config
from safetensors.torch import load_file, save_file

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.build import job
from cm_export.bundle import weights
from cm_export.host.chat import Chat
from cm_export.recipe.aliases import DEMO
from cm_export.recipe.recipe import Recipe
from cm_export.source import checkpoint, model, processor_files

transformers.logging.set_verbosity_error()

# ---------------------------------------------------------------- pictures

VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_heads": 2}
SIZES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
RULES, NESTED = "preprocessor_config.json", "processor_config.json"
tower = families.find("qwen2_vl").tower({"vision_config": VISION | {"hidden_size": 16}})

pixels = st.sampled_from([64, 100, 640, 1500, 4096, 20000, 900.5])
wrong = st.sampled_from([None, 0, -64, "640", True, [64], 1e400])
limit = st.one_of(pixels, pixels, pixels, wrong)
edges = st.dictionaries(
    st.sampled_from(["shortest_edge", "longest_edge", "min_pixels", "max_pixels", "height", "width"]), limit, max_size=4
)
pairs = st.sampled_from([("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels"), ("height", "width")])
paired = st.builds(lambda names, a, b: dict(zip(names, (a, b), strict=True)), pairs, limit, limit)
rules = st.fixed_dictionaries(
    {key: st.just(value) for key, value in SIZES.items()},
    optional={
        "size": st.one_of(paired, paired, edges, st.sampled_from([None, 448, [64, 640], {}])),
        "min_pixels": limit,
        "max_pixels": limit,
        "do_rescale": st.sampled_from([True, False, None, 0, "no"]),
        "do_normalize": st.sampled_from([True, False, None, 1]),
        "do_convert_rgb": st.sampled_from([True, False]),
        "do_center_crop": st.just(True),
        "rescale_factor": st.sampled_from([None, 0.5, 1, "1/255"]),
        "image_mean": st.sampled_from([None, 0.5, [0.1, 0.2, 0.3], [0.5], "0.5"]),
        "image_std": st.sampled_from([None, 0.5, [0.1, 0.2, 0.3], [1, 1, 0]]),
        "resample": st.sampled_from([None, 0, 1, 2, 3, 4, 5, 6, "bicubic", True]),
        "image_processor_type": st.sampled_from(["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"]),
        "videos": st.just({"min_pixels": 1}),
    },
)


def _theirs(folder: Path, image: Image.Image) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        found = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="np")
    except Exception:
        return None
    return found["pixel_values"], found["image_grid_thw"][0]


def _ours(folder: Path, image: Image.Image) -> tuple[np.ndarray, tuple[int, ...]]:
    found, _ = processor_files.picture_rules(folder)
    picture = tower.picture(image, tower.rule(found or {}))
    t, h, w = picture.grid
    return picture.pixels, (t, 2 * h, 2 * w)


def _write(folder: Path, **files: Any) -> None:
    for file in folder.iterdir():
        file.unlink()
    files = {"config": {"model_type": "qwen2_vl", "vision_config": VISION}} | files
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def _plain(values: dict[str, Any]) -> bool:
    """Whether nothing in it is of a type that a careful reader would refuse, whatever transformers makes of it."""
    flags = all(isinstance(values.get(key, True), bool) for key in ("do_rescale", "do_normalize"))
    size = values.get("size")
    numbers = [values.get("min_pixels"), values.get("max_pixels"), *(size.values() if isinstance(size, dict) else [])]
    right = all(n is None or (type(n) in (int, float) and 0 < n < 1e300) for n in numbers)
    sound = (
        type(values.get("resample", 3)) is int
        and values.get("resample", 3) in range(6)
        and not isinstance(values.get("image_mean"), str)
    )
    return flags and right and sound and values.get("image_std") != [1, 1, 0]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules, st.sampled_from([RULES, NESTED, "both"]), st.tuples(st.integers(9, 70), st.integers(9, 70)))
def test_picture_rules_are_followed_as_transformers_does_or_refused(tmp_path, values, place, size):
    files = {
        RULES: {RULES[:-5]: values},
        NESTED: {NESTED[:-5]: {"processor_class": "Qwen2VLProcessor", "image_processor": values}},
        "both": {NESTED[:-5]: {"image_processor": values}, RULES[:-5]: {**SIZES, "min_pixels": 64, "max_pixels": 64}},
    }
    _write(tmp_path, **files[place])
    image = Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), np.uint8))
    expected = _theirs(tmp_path, image)
    try:
        found, grid = _ours(tmp_path, image)
    except InputError as e:
        assert any(key in str(e) for key in (*values, "size")), e
        assert expected is None or not _plain(values), values
        return
    assert expected is not None, values
    assert tuple(expected[1]) == grid
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": {"min_pixels": 64, "max_pixels": 640}}, ("size", "min_pixels", "beside size")),
        ({"size": {"height": 64, "width": 64}}, ("size", "height")),
        ({"size": 448}, ("size = 448",)),
        ({"size": {"shortest_edge": 64}}, ("size",)),
        ({"min_pixels": 0}, ("above 0",)),
        ({"patch_size": 14}, ("patch_size = 14", "vision_config", "4")),
        ({"merge_size": 1}, ("merge_size = 1",)),
        ({"temporal_patch_size": 1}, ("temporal_patch_size",)),
        ({"image_processor_type": "CLIPImageProcessor"}, ("CLIPImageProcessor",)),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, ("ViTFeatureExtractor",)),
        ({"image_std": 0}, ("image_std",)),
        ({"do_rescale": "false"}, ("do_rescale",)),
    ],
)
def test_a_rule_that_is_not_followed_is_refused_by_its_key(values, words):
    with pytest.raises(InputError) as caught:
        tower.rule({**SIZES, **values})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ({}, (56 * 56, 28 * 28 * 1280)),
        ({"size": None}, (56 * 56, 28 * 28 * 1280)),
        ({"min_pixels": 64, "max_pixels": None}, (64, 28 * 28 * 1280)),
        ({"size": {"shortest_edge": 64, "longest_edge": 640}}, (64, 640)),
        ({"size": {"shortest_edge": 64, "longest_edge": 640}, "max_pixels": 999}, (64, 999)),
        ({"size": {"min_pixels": 64, "max_pixels": 640}, "min_pixels": 65, "max_pixels": 999}, (65, 999)),
    ],
)
def test_limits_are_read_in_every_spelling_that_transformers_accepts(tmp_path, values, limits):
    _write(tmp_path, **{RULES[:-5]: {**SIZES, **values}})
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil").size
    assert (theirs["shortest_edge"], theirs["longest_edge"]) == limits
    ours = tower.rule({**SIZES, **values})
    assert (ours.min_pixels, ours.max_pixels) == limits


def test_rules_inside_the_processors_own_file_go_before_the_others_and_into_the_bundle(tmp_path):
    source, target = tmp_path / "model", tmp_path / "processor"
    source.mkdir()
    _write(source, preprocessor_config={"min_pixels": 1}, processor_config={"image_processor": {"min_pixels": 2}})
    assert processor_files.picture_rules(source)[0] == {"min_pixels": 2}
    processor_files.copy(source, target)
    assert json.loads((target / RULES).read_text()) == {"min_pixels": 2}
    _write(source, preprocessor_config={"min_pixels": 1}, processor_config={"processor_class": "Qwen2VLProcessor"})
    assert processor_files.picture_rules(source)[0] == {"min_pixels": 1}


# ---------------------------------------------------------------- config.json

Change = Callable[[dict[str, Any]], object]


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def _rope(**values: Any) -> Change:
    """The decoder's rope settings as these keys say, none of today's spelling left; `section` keeps M-RoPE's own."""

    def change(config: dict[str, Any]) -> None:
        text = _text(config)
        old = text.pop("rope_parameters")
        section = {"mrope_section": old["mrope_section"]} if "mrope_section" in old else {}
        text.pop("rope_theta", None)
        for key, value in values.items():
            text[key] = section | value if isinstance(value, dict) and "full_attention" not in value else value

    return change


def _own(**values: Any) -> Change:
    return lambda config: _text(config).update(values)


def _outer(**values: Any) -> Change:
    return lambda config: config.update(values)


def _flat(config: dict[str, Any]) -> None:
    """As the hub's Qwen2-VL checkpoints are: the decoder's settings stand outside."""
    text = config.pop("text_config", {})
    text.pop("model_type", None)
    rope = text.pop("rope_parameters", None)
    if rope:
        text |= {"rope_theta": rope["rope_theta"]}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}} if len(rope) > 2 else {}
    config.update({k: v for k, v in text.items() if k not in config})


CHANGES: dict[str, Change] = {
    "flat": _flat,
    "rope_scaling of type mrope": _rope(rope_scaling={"type": "mrope"}, rope_theta=1000.0),
    "rope_scaling of rope_type default": _rope(rope_scaling={"rope_type": "default"}, rope_theta=50.0),
    "both spellings of the type": _rope(rope_scaling={"rope_type": "default", "type": "default"}, rope_theta=50.0),
    "theta inside and outside": _rope(rope_parameters={"rope_type": "default", "rope_theta": 70.0}, rope_theta=5000.0),
    "rope_scaling beside rope_parameters": _rope(
        rope_parameters={"rope_type": "default", "rope_theta": 70.0}, rope_scaling={"type": "linear", "factor": 3.0}
    ),
    "linear": _rope(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=50.0),
    "yarn": _rope(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0}),
    "yarn with its own length": _rope(
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "original_max_position_embeddings": 8,
            "attention_factor": 1.3,
        }
    ),
    "llama3": _rope(
        rope_parameters={
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 50.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "dynamic": _rope(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=50.0),
    "longrope": _rope(
        rope_parameters={"rope_type": "longrope", "rope_theta": 50.0, "short_factor": [1.0], "long_factor": [1.0]}
    ),
    "by kind of layer": _rope(rope_parameters={"full_attention": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}}),
    "no rope settings": _rope(),
    "rope null": _rope(rope_parameters=None),
    "theta null": _rope(rope_parameters={"rope_type": "default", "rope_theta": None}),
    "theta text": _rope(rope_parameters={"rope_type": "default", "rope_theta": "50"}),
    "theta 0": _rope(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
    "unknown rope": _rope(rope_parameters={"rope_type": "spiral", "rope_theta": 50.0}),
    "half the head": _own(partial_rotary_factor=0.5),
    "sections too short": lambda c: _text(c)["rope_parameters"].update(mrope_section=[1, 1, 1]),
    "sections of text": lambda c: _text(c)["rope_parameters"].update(mrope_section="all"),
    "act swish": _own(hidden_act="swish"),
    "act gelu": _own(hidden_act="gelu"),
    "act gelu_fast": _own(hidden_act="gelu_fast"),
    "act relu6": _own(hidden_act="relu6"),
    "act null": _own(hidden_act=None),
    "act number": _own(hidden_act=3),
    "another head_dim": _own(head_dim=6),
    "head_dim null": _own(head_dim=None),
    "kv heads null": _own(num_key_value_heads=None),
    "stale: no cache": lambda c: (c.update(use_cache=False), _own(use_cache=False)(c)),
    "stale: tuples": _outer(return_dict=False),
    "stale: torchscript": _outer(torchscript=True),
    "stale: attentions": lambda c: (c.update(output_attentions=True), _own(output_attentions=True)(c)),
    "stale: hidden states": _outer(output_hidden_states=True),
    "stale: bfloat16": lambda c: (c.update(torch_dtype="bfloat16"), _own(dtype="float16")(c)),
    "stale: dtype auto": _outer(dtype="auto"),
    "stale: flash attention": _outer(_attn_implementation="flash_attention_2", attn_implementation="flash_attention_2"),
    "stale: eager": _outer(_attn_implementation="eager"),
    "stale: pretraining_tp": _own(pretraining_tp=2, attention_dropout=0.5, hidden_dropout=0.1),
    "stale: chunks": _own(chunk_size_feed_forward=2, is_decoder=True, add_cross_attention=False),
    "stale: heads pruned": _outer(pruned_heads={"0": [0]}),
    "stale: labels": _outer(architectures=["OtherForSequenceClassification"], num_labels=7, problem_type="regression"),
    "stale: norm": _own(layer_norm_eps=1.0),
    "sliding window off": _own(use_sliding_window=False, sliding_window=4, max_window_layers=0),
    "sliding window on": _own(use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None),
    "sliding layers": lambda c: _own(layer_types=["sliding_attention"] * _text(c)["num_hidden_layers"])(c),
    "odd layers": lambda c: _own(layer_types=["linear_attention"] * _text(c)["num_hidden_layers"])(c),
    "biases": _own(attention_bias=True),
    "FFN bias": _own(mlp_bias=True),
    "longest prompt null": _own(max_position_embeddings=None),
    "longest prompt 0": _own(max_position_embeddings=0),
    "longest prompt text": _own(max_position_embeddings="long"),
    "vocabulary too large": lambda c: _own(vocab_size=_text(c)["vocab_size"] + 3)(c),
    "image token outside": _outer(image_token_id=100000),
    "image token negative": _outer(image_token_id=-1),
    "image token null": _outer(image_token_id=None),
    "vision act": lambda c: c.get("vision_config", {}).update(hidden_act="gelu"),
    "vision act unknown": lambda c: c.get("vision_config", {}).update(hidden_act="sinus"),
    "vision patch of two": lambda c: c.get("vision_config", {}).update(patch_size=[4, 4]),
    "vision channels": lambda c: c.get("vision_config", {}).update(in_chans=1),
    "vision one channel": lambda c: c.get("vision_config", {}).update(in_channels=1),
    "vision old model type": lambda c: c.get("vision_config", {}).update(model_type="qwen2_vl"),
    "vision rope": lambda c: c.get("vision_config", {}).update(rope_parameters={"rope_theta": 50.0}),
    "text model type": lambda c: c.get("text_config", {}).update(model_type="qwen2"),
}  # fmt: skip
# What transformers itself computes with; another of CHANGES that is refused has a reason given here.
REFUSED = {
    "no rope settings", "rope null",  # Qwen2-VL's default sections fit heads of 128 alone
    "rope_scaling of type mrope",  # of a model without pictures
    "theta 0", "half the head", "kv heads null", "head_dim null", "biases", "longest prompt null", "longest prompt 0",
    "stale: tuples", "stale: dtype auto", "stale: flash attention",
    "dynamic", "longrope", "by kind of layer", "theta null", "theta text", "unknown rope", "sections too short",
    "sections of text", "act gelu_fast", "act relu6", "act null", "act number", "another head_dim", "sliding window on",
    "sliding layers", "odd layers", "FFN bias", "longest prompt text", "vocabulary too large", "image token outside",
    "image token negative", "image token null", "vision act unknown", "vision patch of two", "vision one channel",
}  # fmt: skip


def _config_of(kind: str) -> dict[str, Any]:
    """One layer: every other is read as the first is."""
    if kind != "qwen2_vl":
        return random_text_config(kind, 3, num_hidden_layers=1)
    config = random_config(3)
    config["text_config"]["num_hidden_layers"] = config["vision_config"]["depth"] = 1
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """model_type -> a random checkpoint of it, saved by transformers."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = random_checkpoint(_config_of(kind), tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get


def _changed(source: Path, folder: Path, change: Change) -> Path:
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


def _logits_of_ours(folder: Path, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """From the weight file of a bundle, after every check that a build makes before its first stage."""
    recipe = Recipe().replace(neurons__policy="dense", tokens__policy="dense")
    found = job.prepare(checkpoint.resolve(str(folder)), recipe, 1, lambda *_: None)
    out = folder / "out"
    out.mkdir()
    model.write_weights(folder, found.family, out, found.tower, found.inputs, lambda *_: None)
    with torch.no_grad():
        return model.reading(folder, out / weights.FILE, found.family)(input_ids=ids, return_dict=True).logits


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["qwen2_vl", *(wide(k) for k in ("llama", "qwen2"))])
def test_a_configuration_computes_what_transformers_computes_or_is_refused(saved, tmp_path, kind, name):
    source = saved(kind)
    before = json.loads((source / "config.json").read_text())
    after = copy.deepcopy(before)
    try:
        CHANGES[name](after)
    except KeyError:
        pytest.skip("not in this family's configuration")
    if after == before:
        pytest.skip("says nothing of this")
    folder = _changed(source, tmp_path / "model", CHANGES[name])
    ids = torch.arange(7, 27)[None]
    try:
        ours = _logits_of_ours(folder, kind, ids)
    except InputError as e:
        assert "config.json" in str(e) or "weights have" in str(e) or str(folder) in str(e), e
        print("refused", kind, name, e)
        assert name in REFUSED, e
        return
    stock = getattr(transformers, families.find(kind).model_class)
    with torch.no_grad():
        theirs = stock.from_pretrained(folder, dtype="float32", attn_implementation="eager")(
            input_ids=ids, return_dict=True
        )
    torch.testing.assert_close(ours, theirs.logits, rtol=1e-5, atol=1e-5)


def test_rope_settings_by_kind_of_layer_are_called_that(saved, tmp_path):
    folder = _changed(saved("llama"), tmp_path / "model", CHANGES["by kind of layer"])
    with pytest.raises(InputError, match="rope_parameters: differs from layer to layer"):
        families.find("llama").check_config(model.read_config(folder))


HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


# What the configuration and its decoder's part say; the wide tests ask the other six pairs.
SAID = [(None, None), (True, False), (False, True)]
PAIRS = [
    (pytest.param if (outer, inner) in SAID else wide)(outer, inner)
    for outer in (None, True, False)
    for inner in (None, True, False)
]


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
@pytest.mark.parametrize(
    ("kind", "outer", "inner"),
    [
        *(pytest.param("qwen2_vl", *p.values, marks=p.marks) for p in PAIRS),
        *(("qwen2", o, None) for o in (None, True, False)),
    ],
)
def test_heads_are_tied_as_transformers_ties_them_or_their_absence_is_named(saved, tmp_path, kind, outer, inner, head):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((saved(kind) / "config.json").read_text())
    for part, tie in ((config, outer), (_text(config), inner if kind == "qwen2_vl" else outer)):
        part.pop("tie_word_embeddings", None)
        part.update({} if tie is None else {"tie_word_embeddings": tie})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(saved(kind) / "model.safetensors")
    tensors.pop(HEAD, None)
    embedding = next(value for name, value in tensors.items() if name.endswith(EMBEDDING))
    if head != "absent":
        tensors[HEAD] = embedding.clone() if head == "equal" else embedding.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ids = torch.arange(7, 27)[None]
    try:
        ours = _logits_of_ours(folder, kind, ids)
    except InputError as e:
        assert head == "absent" and HEAD in str(e) and not (outer or inner), e
        return
    stock = getattr(transformers, families.find(kind).model_class)
    with torch.no_grad():
        theirs = stock.from_pretrained(folder, dtype="float32")(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tensors_that_nothing_reads_are_named(saved, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(saved("qwen2") / "config.json", folder / "config.json")
    tensors = load_file(saved("qwen2") / "model.safetensors") | {"score.weight": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe().replace(neurons__policy="dense", tokens__policy="dense")
    found = job.prepare(checkpoint.resolve(str(folder)), recipe, 1, lambda *_: None)
    (tmp_path / "out").mkdir()
    state = model.write_weights(folder, found.family, tmp_path / "out", None, found.inputs, lambda *_: None)
    assert state["unread"] == ["score.weight"]


# ---------------------------------------------------------------- stop ids


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outer=st.sampled_from(["absent", None, 7, [7, 8]]),
    inner=st.sampled_from(["absent", None, 9, [9]]),
    generation=st.sampled_from(["absent", {}, {"eos_token_id": None}, {"eos_token_id": 11}, {"eos_token_id": [11, 0]}]),
)
def test_answers_end_at_what_generate_stops_at(tmp_path, outer, inner, generation):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((DEMO / "config.json").read_text())
    for part, ids in ((config, outer), (config["text_config"], inner)):
        part.pop("eos_token_id", None)
        part.update({} if ids == "absent" else {"eos_token_id": ids})
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    else:
        theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = theirs.eos_token_id
    expected = {expected} if isinstance(expected, int) else {*(expected or ())}
    shape = families.find("qwen2_vl").shape(model.read_config(tmp_path))
    files = {file.name: file for file in tmp_path.iterdir()}
    bundle = SimpleNamespace(path=tmp_path, shape=shape, processor=files.get)
    assert Chat(bundle).stop_ids == expected
