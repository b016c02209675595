"""LLaVA-1.5 and LLaVA-OneVision: the laws of every family, on random configurations, and `run` against transformers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import test_lowered
import torch
import transformers
from conftest import bundles_of, cm_export, wide
from llava_models import PUBLISHED, RANDOM, answering, noise, seen
from natively_attended import says_the_same
from PIL import Image
from proofs import PROOFS, each_proof, holds
from random_models import IMAGE, Exported, random_checkpoint, shared_export
from tolerances import agrees
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from cm_export import families
from cm_export.bundle.bundle import Bundle
from cm_export.host.chat import Chat
from cm_export.recipe.recipe import Recipe

QUESTION = "what shape is red ?"
RECIPE = Recipe().replace(tokens__prune_layer=1)
# Sizes of the pictures of a prompt: one alone, in tiles; several; flat and high strips of which no row of cells is left.
ASKED = [((30, 20),), ((30, 20), (9, 31)), ((60, 60),), ((200, 3),), ((3, 200),), ((5, 5), (70, 8), (8, 8))]


bundle_of = bundles_of(answering)


@pytest.fixture(scope="module", params=RANDOM)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def x(name):
    return shared_export(f"{name}_random", RANDOM[name](5), 5)


# ---------------------------------------------------------------- graphs
@each_proof
def test_every_proof_holds(x, proof):
    holds(proof, x)


def test_attention_of_the_native_library_says_the_same(x):
    says_the_same(x)


def test_vision_equals_transformers_on_pictures_of_every_shape(x):
    backend = x.backend(RECIPE)
    for sizes in ASKED:
        check_vision(x, backend, sizes)


def check_vision(x, backend, sizes):
    pictures = seen(x, sizes, np.random.default_rng(1))
    given = {n: torch.from_numpy(v) for n, v in x.tower.stock(pictures, np.ones(1, bool)).items()}
    with torch.no_grad():
        expected = x.tower.features(x.model, given)["image_embeds"].numpy()
    agrees("export", backend.vision(x.tower.feeds(pictures))["image_embeds"], expected)


@pytest.mark.parametrize("version", ["10.15", *map(wide, ("10.3", "rtx-1.7"))])
def test_lowered_graphs_equal_the_portable_ones(x, tmp_path, version):
    check_lowered(x, tmp_path, version)


def check_lowered(x, folder, version):
    test_lowered.check_all(x, test_lowered.SMALL.replace(engine__capacity=256, engine__max_prompt=192), version, folder)


@pytest.mark.wide
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_configuration_with_two_layers_keeps_the_laws(model, tmp_path):
    config = copy.deepcopy(PUBLISHED[model][0])
    for part in ("text_config", "vision_config"):
        config[part]["num_hidden_layers"] = 2
    path = random_checkpoint(config, tmp_path / "model", 1)
    (tmp_path / "graphs").mkdir()
    x = Exported(path, tmp_path / "graphs", families.find(config["model_type"]))
    x.family.check_config(x.config)
    backend = x.backend(RECIPE)
    check_vision(x, backend, ((500, 300),))
    check_vision(x, backend, ((500, 300), (90, 200)))
    for proof in (p for p in PROOFS if p.name in ("two pictures", "text only", "full budget", "cut")):
        holds(proof, x)


# ---------------------------------------------------------------- the command line
def processor_of(name, model):
    """transformers' own processor, on Pillow."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    template, token = (model / "chat_template.jinja").read_text(), "<|image_pad|>"
    tower = Exported(model, model, families.find(name)).tower
    how = {"chat_template": template, "image_token": token, "vision_feature_select_strategy": "default"}
    if name == "llava":
        images = CLIPImageProcessorPil.from_pretrained(model)
        how |= {"patch_size": tower.patch, "num_additional_image_tokens": 1}
        how["vision_feature_select_strategy"] = "default" if tower.left_out else "full"
        return transformers.LlavaProcessor(images, tokenizer, **how)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(model)
    how |= {"num_image_tokens": tower.side**2, "vision_aspect_ratio": f"anyres_max_{tower.most}"}
    how["vision_feature_select_strategy"] = "full"  # of tokens that num_image_tokens counts

    class Processor(transformers.LlavaOnevisionProcessor):
        """Without torchvision transformers has no class that a processor of videos could be of."""

        def check_argument_for_proper_class(self, name, argument):
            return None

    return Processor(images, tokenizer, None, **how)


def given_by_transformers(name, model, images):
    """A question about pictures, by transformers' template, processor and tokenizer."""
    blocks = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUESTION}]
    return processor_of(name, model).apply_chat_template(
        [{"role": "user", "content": blocks}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def shown(count):
    rng = np.random.default_rng(5)
    return [noise(rng, *size) for size in ((50, 90), (70, 40))[:count]]


@pytest.mark.parametrize("pictures", [1, 2, 0])
def test_prompts_and_pictures_are_those_of_transformers_own_processor(name, pictures, tmp_path):
    model = answering(name, tmp_path / "model")
    given = given_by_transformers(name, model, shown(pictures))
    x = Exported(model, tmp_path, families.find(name))
    rule = json.loads((model / "preprocessor_config.json").read_text())
    rule = x.tower.rule_for(x.tower.rule(rule), pictures)
    found = [x.tower.picture(image, rule) for image in shown(pictures)]
    files = SimpleNamespace(path=model, shape=x.shape, processor=lambda n: f if (f := model / n).is_file() else None)
    ids = Chat(files).encode(QUESTION, None, [p.layout for p in found])
    assert ids.tolist() == given["input_ids"][0].tolist()
    assert ids[0] == 0 != ids[1], "the tokenizer begins a text with a token of its own"
    typed, plain = (Chat(files).encode(text, None, []) for text in ("stop <|im_end|> here", "stop here"))
    assert typed[0] == 0 and (typed == 2).sum() == (plain == 2).sum()
    for key, value in (x.tower.stock(found, ids == IMAGE) if found else {}).items():
        np.testing.assert_allclose(value, given[key].numpy(), rtol=0, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("pictures", [1, 2, 0])
def test_run_answers_as_transformers_does_with_its_own_processor(name, pictures, tmp_path):
    model, plan = bundle_of(name)
    for i, image in enumerate(shown(pictures)):
        image.save(tmp_path / f"{i}.png")
    given = given_by_transformers(name, model, shown(pictures))
    ids = given["input_ids"]
    stock = getattr(transformers, families.find(name).model_class).from_pretrained(model).eval()
    with torch.no_grad():
        out = stock.generate(**given, max_new_tokens=8)
    options = [w for i in range(pictures) for w in ("--image", tmp_path / f"{i}.png")]
    options += ["--overlay", tmp_path / "kept.png"] if pictures else []
    done = cm_export("run", plan, *options, "--prompt", QUESTION, "--max-new-tokens", "8", "--json", "--dense")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["image_tokens"] == found["image_tokens_kept"] == int((ids == IMAGE).sum())
    assert found["token_ids"] == [
        i for i in out[0, ids.shape[1] :].tolist() if i != stock.generation_config.eos_token_id
    ]
    assert len(found["overlays"]) == pictures


@pytest.mark.wide
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


@pytest.mark.wide
def test_bench_and_eval_take_it(name, tmp_path):
    _, plan = bundle_of(name)
    done = cm_export("bench", plan, "--new-tokens", "2", "--repeats", "1", "--vision", "--json")
    assert done.returncode == 0, done.stderr
    done = cm_export("bench", plan, "--image-tokens", "23", "--new-tokens", "2", "--repeats", "1")
    assert done.returncode == 2 and "no whole pictures" in done.stderr
    for i, side in enumerate((60, 90)):
        Image.new("RGB", (60, side), "red").save(tmp_path / f"{i}.png")
    asked = [{"image": f"{i}.png", "question": QUESTION, "answer": "circle"} for i in range(2)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, asked)))
    done = cm_export("eval", plan, "--data", tmp_path / "my.jsonl", "--out", tmp_path / "r.json", "--quiet")
    assert done.returncode == 0, done.stderr
