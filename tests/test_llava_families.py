"""LLaVA-1.5 and LLaVA-OneVision: the laws of every family, on random configurations, and `run` against transformers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import test_export
import test_lowered
import test_token_cuts
import test_turns
import torch
import transformers
from conftest import bundles_of, cm_export
from llava_models import PUBLISHED, RANDOM, answering, asked, ids_of, noise, request, seen, stock
from PIL import Image
from random_models import IMAGE, Exported, random_checkpoint, shared_export
from stepping import Decoder, every_row, gatherer, prefill, step_feeds
from test_surgery import arrays
from tolerances import agrees
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from cm_export import families
from cm_export.bundle.bundle import Bundle
from cm_export.host.chat import Chat
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.recipe.recipe import Recipe

WIDE = [(name, seed) for name in RANDOM for seed in range(20, 32)]
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
    return shared_export(f"{name}_random", RANDOM[name](2), 2)


# ---------------------------------------------------------------- the laws of every family
@pytest.mark.parametrize("sizes", ASKED, ids=str)
def test_vision_equals_transformers(x, sizes):
    check_vision(x, x.backend(RECIPE), sizes)


def check_vision(x, backend, sizes):
    pictures = seen(x, sizes, np.random.default_rng(1))
    given = {n: torch.from_numpy(v) for n, v in x.tower.stock(pictures, np.ones(1, bool)).items()}
    with torch.no_grad():
        expected = x.tower.features(x.model, given)["image_embeds"].numpy()
    agrees("export", backend.vision(x.tower.feeds(pictures))["image_embeds"], expected)


@pytest.mark.parametrize("words", [2, 0])
@pytest.mark.parametrize("sizes", [*ASKED[:2], ()], ids=str)
def test_answers_equal_stock_generate(x, sizes, words):
    """Dense graphs, and sparse graphs at full budget; words 0: pictures side by side."""
    check_answers(x, x.backend(RECIPE), sizes, words)


def check_answers(x, backend, sizes, words, steps=9):
    rng = np.random.default_rng(2)
    pictures = seen(x, sizes, rng)
    ids = ids_of(x, pictures, rng, words)
    tokens, logits = stock(x, pictures, ids, steps)
    made = asked(x, backend, pictures, ids)
    full = sparse_feeds(made, Recipe(), token_share=1.0)
    for graph, constant in (("_dense", {}), ("", every_row(gatherer(x.weights, x.family, x.shape.layers)))):
        out = prefill(backend, prefill_feeds(made) | full, f"prefill{graph}")
        agrees("export", out["logits"].numpy(), logits[:1])
        decoder = Decoder(backend, f"decode{graph}", out, constant)
        for i in range(steps - 1):
            step = decoder.step(step_feeds(made, tokens[i], i))
            agrees("export", step, logits[i + 1 : i + 2])
            assert step[0].argmax() == logits[i + 1].argmax()  # tokens leave the stop id out, as asked


@pytest.mark.parametrize(("batch", "length"), [(3, 13), (1, 2)])
def test_prompts_of_a_padded_batch_equal_transformers(x, batch, length):
    test_export.test_prefill_with_left_padding_equals_transformers(lambda _: x, 1, batch, length)


@pytest.mark.parametrize(("batch", "past", "new"), [(3, 5, 6), (1, 77, 1)])
def test_decode_of_a_batch_equals_transformers(x, batch, past, new):
    test_export.test_decode_at_any_past_and_of_any_length_equals_transformers(lambda _: x, 1, batch, past, new)


@pytest.mark.parametrize("policy", ["attention", "spread_keys"])
def test_a_cut_prefill_is_the_dense_one_with_dropped_tokens_masked(x, policy):
    check_cut(x, 2, policy)


def check_cut(x, seed, policy, sizes=((30, 20),)):
    recipe, req = test_token_cuts.recipe_of(policy=policy), request(x, seed, sizes)
    _, out = test_token_cuts.run(x, req, recipe)
    assert out["kept_tokens"].shape[1] < req.tokens
    test_token_cuts.check_masked(x, req, recipe, out)


def test_every_image_token_is_the_dense_prefill_and_a_prompt_without_pictures_is_left_alone(x):
    recipe = test_token_cuts.recipe_of()
    for sizes in (((30, 20),), ((30, 20), (9, 31)), ()):
        req = request(x, 3, sizes)
        backend, out = test_token_cuts.run(x, req, recipe, token_share=1.0)
        for name, value in arrays(prefill(backend, prefill_feeds(req), "prefill_dense")).items():
            agrees("export", out[name], value)


def test_each_picture_keeps_its_share_where_a_quota_says_so(x):
    req, recipe = request(x, 4), test_token_cuts.recipe_of(quota="each", share=0.5)
    _, out = test_token_cuts.run(x, req, recipe)
    kept = req.picture[0, out["kept_tokens"][0]]
    assert [int((kept == i).sum()) for i in range(2)] == [max(1, int(0.5 * n + 0.5)) for n in req.picture_sizes()]


def test_a_later_question_is_answered_as_if_all_were_asked_at_once(x):
    runner, rng = test_turns.runner_of(x, test_turns.WHOLE), np.random.default_rng(6)
    first = request(x, 5)
    for budget in (test_turns.FULL, test_turns.DENSE):
        context = runner.prefill(first, budget)
        answer = [7 if i == IMAGE else i for i in runner.tokens(context, 4, frozenset())]
        said = answer + rng.integers(7, x.shape.vocab, 3).tolist()
        later, whole = context.then(said, 3), runner.prefill(first.extended(said), test_turns.DENSE)
        agrees("export", later.logits, whole.logits)
        assert list(runner.tokens(later, 6, frozenset())) == list(runner.tokens(whole, 6, frozenset()))


@pytest.mark.parametrize("version", ["10.3", "10.15", "rtx-1.7"])
def test_lowered_graphs_equal_the_portable_ones(x, tmp_path, version):
    check_lowered(x, tmp_path, version)


def check_lowered(x, folder, version):
    test_lowered.check_all(x, test_lowered.SMALL.replace(engine__capacity=256, engine__max_prompt=192), version, folder)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "seed"), WIDE)
def test_random_configurations_keep_every_law(name, seed, tmp_path):
    path = random_checkpoint(RANDOM[name](seed), tmp_path / "model", seed)
    (tmp_path / "graphs").mkdir()
    x = Exported(path, tmp_path / "graphs", families.find(name))
    x.family.check_config(x.config)
    backend = x.backend(RECIPE)
    for sizes in ASKED:
        check_vision(x, backend, sizes)
    for sizes, words in ((ASKED[0], 2), (ASKED[1], 0), (ASKED[5], 1), ((), 3)):
        check_answers(x, backend, sizes, words)
    for batch, length in ((3, 13), (1, 2), (2, 31)):
        test_export.test_prefill_with_left_padding_equals_transformers(lambda _: x, seed, batch, length)
    for batch, past, new in ((3, 1, 1), (1, 77, 1), (3, 5, 6), (2, 1, 17)):
        test_export.test_decode_at_any_past_and_of_any_length_equals_transformers(lambda _: x, seed, batch, past, new)
    for policy in test_token_cuts.POLICIES:
        check_cut(x, seed, policy, ((30, 20), (9, 31)))
    test_every_image_token_is_the_dense_prefill_and_a_prompt_without_pictures_is_left_alone(x)
    test_a_later_question_is_answered_as_if_all_were_asked_at_once(x)
    for version in test_lowered.VERSIONS:
        (tmp_path / version).mkdir()
        check_lowered(x, tmp_path / version, version)


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
    check_answers(x, backend, ((500, 300),), 2, 4)


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
