"""A LoRA adapter is merged into the weights as PEFT merges it: against its formulas written out in float64, and its own files."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shared
import torch
from conftest import built, cm_export, take_stages
from random_models import random_checkpoint, random_config
from safetensors.numpy import load_file, save_file
from tolerances import agrees

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.bundle.weights import WeightFile
from cm_export.source import adapter as adapters
from cm_export.source import model as hf
from cm_export.source.checkpoint import resolve
from cm_export.source.parameters import Parameters, parameters

LAYER = "model.language_model.layers.0."
PARTS = ("base", "adapter", "merged")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "proj", "fc1"]}


@cache
def sees() -> tuple[Path, families.Family]:
    """A Qwen2-VL checkpoint with a head of its own; its names are those of an older transformers."""
    config = random_config(0) | {"tie_word_embeddings": False}
    config["text_config"]["tie_word_embeddings"] = False
    path = shared.once("adapter_base", lambda here: random_checkpoint(config, here / "m")) / "m"
    return path, families.find("qwen2_vl")


@cache
def known() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in hf.load(*sees()).named_parameters()}


def saved(folder: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    """An adapter's directory; `tensors` are named from the module on."""
    folder.mkdir()
    (folder / adapters.CONFIG).write_text(json.dumps(CONFIG | settings))
    save_file({f"base_model.model.{n}": np.ascontiguousarray(t) for n, t in tensors.items()}, folder / adapters.WEIGHTS)
    return folder


def low_rank(module: str, weight: str, seed: int = 0, rank: int = 4) -> dict[str, np.ndarray]:
    """A and B for a parameter of the model, large enough to be seen."""
    rng, (outputs, *inputs) = np.random.default_rng(seed), known()[weight].shape
    a, b = rng.standard_normal((rank, *inputs)), rng.standard_normal((outputs, rank, *[1] * (len(inputs) - 1)))
    return {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}


def low_rank_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Of two weights of every layer of a checkpoint, q_proj and down_proj."""
    rng, given = np.random.default_rng(1), {}
    for name, p in hf.load(checkpoint, families.find("qwen2_vl")).named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            for part, shape in (("A", (4, p.shape[1])), ("B", (p.shape[0], 4))):
                given[f"{name.removesuffix('.weight')}.lora_{part}.weight"] = (
                    rng.standard_normal(shape).astype(np.float32) / 8
                )
    return given


def fitted(folder: Path) -> adapters.Merge:
    return adapters.fit(adapters.read(folder), parameters(*sees()))


def merged(folder: Path, name: str) -> np.ndarray:
    return fitted(folder).apply(name, known()[name]).numpy()


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({}, 4, 6 / 4),
        ({"use_rslora": True}, 4, 6 / 2),
        ({"rank_pattern": {"q_proj": 2}}, 2, 6 / 2),
        ({"rank_pattern": {r"layers\.[1-9]\.self_attn\.q_proj": 2}}, 4, 6 / 4),
        ({"alpha_pattern": {r"0\.self_attn\.q_proj": 12}}, 4, 12 / 4),
        ({"alpha_pattern": {"self_attn.q_proj": 1}, "rank_pattern": {"x": 9}, "use_rslora": True}, 4, 1 / 2),
        ({"target_modules": r".*\.q_proj"}, 4, 6 / 4),
        ({"target_modules": "all-linear"}, 4, 6 / 4),
    ],
)
@pytest.mark.parametrize(
    "module", ["model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]
)
def test_a_weight_gets_scale_times_b_a_whatever_release_named_it(tmp_path, settings, rank, scale, module):
    name = f"{LAYER}self_attn.q_proj.weight"
    given = low_rank(module, name, rank=rank)
    found = merged(saved(tmp_path / "a", given, **settings), name)
    a, b = (given[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    agrees("same numbers", found, known()[name].double().numpy() + scale * (b @ a))


def test_a_convolution_and_a_layer_of_the_tower_are_merged(tmp_path):
    for module, name in (
        ("visual.patch_embed.proj", "model.visual.patch_embed.proj.weight"),
        ("visual.blocks.0.mlp.fc1", "model.visual.blocks.0.mlp.fc1.weight"),
    ):
        given = low_rank(module, name)
        found = merged(saved(tmp_path / module, given), name)
        a, b = (given[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        delta = np.tensordot(b.reshape(b.shape[0], -1), a, axes=1)
        agrees("same numbers", found, known()[name].double().numpy() + 1.5 * delta)


def test_dora_gives_every_output_the_length_that_was_trained(tmp_path):
    module, name = "model.layers.0.mlp.down_proj", f"{LAYER}mlp.down_proj.weight"
    given = low_rank(module, name)
    length = np.linspace(0.5, 2, len(known()[name])).astype(np.float32)
    folder = saved(tmp_path / "a", given | {f"{module}.lora_magnitude_vector": length}, use_dora=True)
    a, b = (given[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    whole = known()[name].double().numpy() + 1.5 * (b @ a)
    expected = length[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
    agrees("same numbers", merged(folder, name), expected)


def test_saved_biases_heads_and_embeddings_take_the_place_of_the_models_own(tmp_path):
    rng = np.random.default_rng(0)
    names = {
        "model.layers.0.self_attn.q_proj.base_layer.bias": f"{LAYER}self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.bias": f"{LAYER}self_attn.k_proj.bias",
        "visual.blocks.0.norm1.bias": "model.visual.blocks.0.norm1.bias",
        "lm_head.weight": "lm_head.weight",
        "model.embed_tokens.base_layer.weight": "model.language_model.embed_tokens.weight",
    }
    given = {key: rng.standard_normal(known()[name].shape).astype(np.float32) for key, name in names.items()}
    words, width = known()["lm_head.weight"].shape
    given["model.embed_tokens.lora_embedding_A"] = rng.standard_normal((4, words)).astype(np.float32)
    given["model.embed_tokens.lora_embedding_B"] = rng.standard_normal((width, 4)).astype(np.float32)
    given |= low_rank("model.layers.0.self_attn.q_proj", f"{LAYER}self_attn.q_proj.weight")
    given["model.layers.0.self_attn.q_proj.lora_B.bias"] = rng.standard_normal(
        len(known()[f"{LAYER}self_attn.q_proj.bias"])
    ).astype("f4")
    targets = ["q_proj", "embed_tokens"]
    folder = saved(
        tmp_path / "a", given, bias="all", lora_bias=True, modules_to_save=["lm_head"], target_modules=targets
    )
    for key, name in names.items():
        expected = given[key].astype(np.float64)
        if "embed" in key:
            a, b = (given[f"model.embed_tokens.lora_embedding_{x}"].astype(np.float64) for x in "AB")
            expected = expected + 1.5 * (b @ a).T
        if "q_proj" in key:
            expected = expected + 1.5 * given["model.layers.0.self_attn.q_proj.lora_B.bias"]
        agrees("same numbers", merged(folder, name), expected)
    other = "model.visual.blocks.0.norm2.bias"
    assert fitted(folder).apply(other, known()[other]) is known()[other]


@pytest.mark.parametrize("case", ["plain", "dora", "patterns", "layers", "one_layer"])
def test_what_peft_saved_is_merged_to_what_peft_merged(case, tmp_path):
    held = load_file(Path(__file__).parent / "adapters" / f"{case}.safetensors")
    parts = {
        part: {n.removeprefix(f"{part}/"): t for n, t in held.items() if n.startswith(f"{part}/")} for part in PARTS
    }
    (tmp_path / adapters.CONFIG).write_bytes((Path(__file__).parent / "adapters" / f"{case}.json").read_bytes())
    save_file(parts["adapter"], tmp_path / adapters.WEIGHTS)
    shapes = {name: t.shape for name, t in parts["base"].items()}
    model = Parameters(shapes, "model.embed_tokens.weight", False, lambda name: name)
    merge = adapters.fit(adapters.read(tmp_path), model)
    differ = {n for n, t in parts["base"].items() if (t != parts["merged"][n]).any()}
    assert len(differ) >= 4 and differ <= {*merge.changes}
    for name, base in parts["base"].items():
        found = merge.apply(name, torch.from_numpy(base)).numpy()
        agrees("same numbers", found, parts["merged"][name])


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "another kind of adapter": ({"peft_type": "LOHA"}, {}, "LOHA"),
    "a base that was changed": ({"init_lora_weights": "pissa"}, {}, "pissa"),
    "another form": ({"use_qalora": True}, {}, "use_qalora"),
    "trained tokens": ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    "no rank": ({"r": 0}, {}, "r 0"),
    "no scale": ({"lora_alpha": 0}, {}, "changes nothing"),
    "no rank of a module": ({"rank_pattern": {"q_proj": 0}}, {}, "rank_pattern: q_proj = 0"),
    "a scale in words": ({"alpha_pattern": {"q_proj": "x"}}, {}, "alpha_pattern: q_proj = 'x'"),
    "a module that is left out": ({"exclude_modules": ["q_proj"]}, {}, "exclude_modules names"),
    "a layer that is left out": ({"layers_to_transform": [1]}, {}, "layers_to_transform leaves out"),
    "layers of another name": ({"layers_to_transform": 0, "layers_pattern": "h"}, {}, "layers_to_transform leaves out"),
    "a name of layers that is no pattern": ({"layers_to_transform": 0, "layers_pattern": "("}, {}, "is no pattern"),
    "layers in words": ({"layers_to_transform": "all"}, {}, "no numbers of layers"),
    "names that are a number": ({"target_modules": 3}, {}, "no pattern and no list of names"),
    "another rank": ({"r": 8}, {}, "rank 4 and 4, and adapter_config.json says 8"),
    "a module that is not named": ({"target_modules": ["v_proj"]}, {}, "target_modules does not name"),
    "a pattern that is none": ({"target_modules": "("}, {}, "is no pattern"),
    "dora without lengths": ({"use_dora": True}, {}, "no magnitude"),
    "lengths without dora": ({}, {f"{Q}.lora_magnitude_vector": (4,)}, "use_dora is False"),
    "A alone": ({}, {f"{Q}.lora_B.weight": None}, "a part only"),
    "another width": ({}, {f"{Q}.lora_A.weight": (4, 3)}, "is for a weight of"),
    "more layers": ({}, {"model.layers.99.self_attn.q_proj.lora_A.weight": (4, 3)}, "layers.99"),
    "another vocabulary": ({}, {"lm_head.weight": (7, 3)}, "lm_head.weight of this model is"),
    "what is no adapter": ({}, {f"{Q}.hada_w1_a": (2, 2)}, "hada_w1_a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_a_merge_would_do_no_justice_to_is_refused_in_words(case, tmp_path):
    settings, changes, word = REFUSED[case]
    given = low_rank(Q, f"{LAYER}self_attn.q_proj.weight")
    for key, shape in changes.items():
        given = {n: t for n, t in given.items() if n != key} | ({key: np.ones(shape, np.float32)} if shape else {})
    with pytest.raises(InputError) as caught:
        fitted(saved(tmp_path / "a", given, **settings))
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_b_that_is_one_column_of_one_is_no_matrix(tmp_path):
    given = low_rank(Q, f"{LAYER}self_attn.q_proj.weight")
    given[f"{Q}.lora_B.weight"] = given[f"{Q}.lora_B.weight"][:, 0]
    with pytest.raises(InputError, match="no matrix"):
        fitted(saved(tmp_path / "a", given))


def test_a_directory_that_holds_no_adapter_as_safetensors_is_refused(tmp_path):
    def refused(word):
        with pytest.raises(InputError, match=word):
            adapters.read(tmp_path / "a")

    refused("no such directory")
    (tmp_path / "a").mkdir()
    refused("no adapter_config.json")
    (tmp_path / "a" / adapters.CONFIG).write_text(json.dumps(CONFIG))
    refused("no adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    refused("pickles can run code")


def test_a_head_that_is_the_embedding_as_well_cannot_be_changed_alone(tmp_path):
    shapes = {"model.embed_tokens.weight": (9, 4)}
    model = Parameters(shapes, "model.embed_tokens.weight", True, lambda name: name)
    for number, key in enumerate(("lm_head.weight", "model.embed_tokens.weight")):
        folder = saved(tmp_path / str(number), {key: np.ones((9, 4), np.float32)}, modules_to_save=["x"])
        with pytest.raises(InputError, match="head and embedding are one weight"):
            adapters.fit(adapters.read(folder), model)


@pytest.mark.parametrize(
    ("base", "source", "noted"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl", False),
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct@main", False),
        ("Qwen/Qwen2-VL-2B", "qwen2-vl", True),
        ("/home/me/base", "qwen2-vl", False),
        ("Qwen/Qwen2-VL-2B", ".", False),
        (None, "qwen2-vl", False),
        (3, "qwen2-vl", False),
    ],
)
def test_another_base_of_the_hub_is_noted(base, source, noted):
    found = adapters.notes(adapters.Adapter(Path("a"), {"base_model_name_or_path": base}, {}, ()), source)
    assert bool(found) == noted and all(base in note and source in note for note in found)


def test_a_build_holds_the_merged_weights_and_says_of_which_adapter(bare_bundle, bare_checkpoint, tmp_path):
    given = low_rank_of(bare_checkpoint)
    folder = saved(tmp_path / "my-lora", given, target_modules=["q_proj", "down_proj"])
    take_stages(bare_bundle, tmp_path / "x.plan")
    options = ["--model", bare_checkpoint, "--neurons", "griffin", "--prune-layer", "1", "--adapter", folder]
    built(tmp_path / "x.plan", *options)
    before, after = (WeightFile(b / "weights.safetensors") for b in (bare_bundle, tmp_path / "x.plan"))
    merge = adapters.fit(adapters.read(folder), parameters(bare_checkpoint, families.find("qwen2_vl")))
    for name in before.tensors:
        own = name.removesuffix("_t")
        plain = before[name].T if name != own else before[name]
        expected = merge.apply(own, torch.tensor(np.array(plain))).numpy()
        np.testing.assert_array_equal(after[name].T if name != own else after[name], expected)
        assert (expected != plain).any() == (own in merge.changes)
    manifest = json.loads((tmp_path / "x.plan" / "manifest.json").read_text())
    digest = manifest["model"]["adapter"]["files"][adapters.WEIGHTS]
    assert (
        manifest["model"]["files"][f"adapter/{adapters.WEIGHTS}"]
        == digest
        == resolve(str(bare_checkpoint), None, folder).adapter.files[adapters.WEIGHTS]
    )
    assert manifest["recipe"]["adapter"] == "my-lora"
    shown = cm_export("inspect", tmp_path / "x.plan").stdout
    assert "my-lora" in shown and digest[:16] in shown and "rank 4" in shown
