"""Qwen2.5-VL and Qwen3-VL: the laws of every family, on random configurations, and what is particular to each tower."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import shared
import test_lowered
import torch
import transformers
from conftest import bundles_of, cm_export, wide
from natively_attended import says_the_same
from PIL import Image
from proofs import each_proof, holds
from qwen_models import RANDOM, answering
from random_models import Exported
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.bundle.bundle import Bundle
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline

PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
QUESTION = "what shape is red ?"


bundle_of = bundles_of(answering)


@functools.cache
def exported_of(model, plan):
    """The graphs of a bundle as the tests of random models take them: dense ones, from which every recipe's are made."""
    bundle, folder = Bundle(plan), shared.own(f"{plan.parent.name}_graphs")
    for graph in bundle.shape.traced:
        shutil.copyfile(bundle.graph(graph if graph == "vision" else f"{graph}_dense"), folder / f"{graph}.onnx")
    x = Exported(model, folder, bundle.family, lambda: folder)
    vars(x)["weights"] = bundle.weights
    return x


@pytest.fixture(scope="module", params=RANDOM)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def x(name):
    return exported_of(*bundle_of(name))


# ---------------------------------------------------------------- graphs
@each_proof
def test_every_proof_holds(x, proof):
    holds(proof, x)


def test_attention_of_the_native_library_says_the_same(x):
    says_the_same(x)


def test_no_token_is_cut_before_the_last_layer_with_features(x, name):
    if name != "qwen3_vl":
        assert x.shape.whole_layers == 0 and len(x.tower.outputs) == 1
        return
    assert x.shape.whole_layers == len(x.tower.outputs) - 1 == 2
    recipe = Recipe().replace(tokens__policy="attention", tokens__prune_layer=1)
    with pytest.raises(InputError, match="the first 2 layers of this model must see every token"):
        pipeline.check_recipe(recipe, x.shape)
    assert Recipe().for_model(x.shape).tokens.prune_layer >= 2


@pytest.mark.parametrize("version", ["10.15", *(wide(v) for v in ("10.3", "rtx-1.7"))])
def test_lowered_graphs_equal_the_portable_ones(x, tmp_path, version):
    check_lowered(x, tmp_path, version)


def check_lowered(x, folder, version):
    test_lowered.check_all(
        x, test_lowered.SMALL.replace(tokens__prune_layer=max(1, x.shape.whole_layers)), version, folder
    )


# ---------------------------------------------------------------- the command line
def asked_of_transformers(name, model, images):
    """Prompt ids and pictures, by transformers' template, image processor and expansion of placeholders."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    blocks = [{"type": "image"} for _ in images] + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": blocks}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    given = processor(images, return_tensors="pt") if images else {}
    expand = getattr(transformers, PROCESSORS[name]).replace_image_token
    stub = SimpleNamespace(image_processor=processor, image_token="<|image_pad|>")
    first, *rest = text.split(stub.image_token)
    text = first + "".join(expand(stub, given, i) + part for i, part in enumerate(rest))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids, given


@pytest.mark.parametrize("pictures", [2, 0])
def test_run_answers_as_transformers_does_with_its_own_processor(name, pictures, tmp_path):
    model, plan = bundle_of(name)
    rng = np.random.default_rng(5)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((50, 90), (70, 40))[:pictures]]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    ids, given = asked_of_transformers(name, model, images)
    stock = getattr(transformers, families.find(name).model_class).from_pretrained(model).eval()
    kinds = {"mm_token_type_ids": (ids == stock.config.image_token_id).int()} if images else {}
    with torch.no_grad():
        out = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **kinds, max_new_tokens=8)
    options = [w for i in range(pictures) for w in ("--image", tmp_path / f"{i}.png")]
    done = cm_export("run", plan, *options, "--prompt", QUESTION, "--max-new-tokens", "8", "--json", "--dense")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["image_tokens"] == int((ids == stock.config.image_token_id).sum())
    assert found["token_ids"] == [
        i for i in out[0, ids.shape[1] :].tolist() if i != stock.generation_config.eos_token_id
    ]


@pytest.mark.parametrize("name", ["qwen3_vl", wide("qwen2_5_vl")])
def test_thresholds_and_weights_of_4_bits_answer(name, tmp_path):
    _, plan = bundle_of(name, "--neurons", "active", "--weights", "int4")
    Image.new("RGB", (60, 80), "red").save(tmp_path / "x.png")
    words = ["--image", tmp_path / "x.png", "--prompt", QUESTION, "--max-new-tokens", "4", "--json"]
    done = cm_export("run", plan, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["image_tokens_kept"] < found["image_tokens"] and found["neurons_kept"] < found["neurons"]
    packed = Bundle(plan).packed
    assert packed is not None and any(name.startswith("vision.") for name in packed.entries)


@pytest.mark.parametrize("name", ["qwen2_5_vl", wide("qwen3_vl")])
def test_bench_and_eval_take_it(name, tmp_path):
    _, plan = bundle_of(name)
    done = cm_export("bench", plan, "--image-tokens", "12", "--new-tokens", "2", "--repeats", "1", "--vision", "--json")
    assert done.returncode == 0, done.stderr
    Image.new("RGB", (60, 80), "red").save(tmp_path / "x.png")
    (tmp_path / "my.jsonl").write_text(json.dumps({"image": "x.png", "question": QUESTION, "answer": "circle"}))
    done = cm_export("eval", plan, "--data", tmp_path / "my.jsonl", "--out", tmp_path / "r.json", "--quiet")
    assert done.returncode == 0, done.stderr
