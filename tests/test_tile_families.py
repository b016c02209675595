"""SmolVLM, Idefics3 and InternVL: the laws of every family, on pictures of unequal numbers of tiles with text between them."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import test_lowered
import test_token_cuts
import torch
import transformers
from conftest import built, bundles_of, cm_export
from fake_engines import add_engines, machine
from PIL import Image
from random_models import Exported, random_checkpoint
from stepping import Decoder, every_row, gatherer, prefill, step_feeds
from test_batch import runner_of
from test_qwen_families import exported_of
from test_surgery import arrays
from test_turns import DENSE, FULL, WHOLE
from tile_models import PUBLISHED, RANDOM, answering, asked_of, processor_of, published
from tolerances import agrees

from cm_export import families
from cm_export.bundle.bundle import Bundle
from cm_export.evals import bench
from cm_export.families import IMAGE, Picture, Pictures
from cm_export.host.loaded import load
from cm_export.host.overlay import compose
from cm_export.host.request import Request, prefill_feeds, sparse_feeds
from cm_export.host.runner import Runner
from cm_export.recipe.recipe import Recipe

WIDE = [(name, seed) for name in RANDOM for seed in range(10, 18)]
QUESTION = "what shape is red ?"
# Words, and pictures by their rows and columns of tiles; two of them side by side.
LAYOUTS = ([3, (2, 2), 4, (1, 1), 3], [2, (1, 1), (3, 1), 2], [1, (2, 3), 2], [9])


bundle_of = bundles_of(answering, "--prune-layer", "1")


# Idefics3 is SmolVLM under another name: here it is built and asked, its graphs are compared in the wide tests.
@pytest.fixture(scope="module", params=["smolvlm", "internvl", pytest.param("idefics3", marks=pytest.mark.wide)])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def x(name):
    return exported_of(*bundle_of(name))


# ---------------------------------------------------------------- prompts
def pictures_of(x, layout, rng):
    """Pictures of random pixels."""
    found = []
    for part in layout:
        if isinstance(part, tuple):
            placed = x.tower.layout(*part)
            tiles = placed.tokens // x.tower.side**2
            pixels = rng.standard_normal((tiles, 3, x.tower.size, x.tower.size)).astype(np.float32)
            found.append(Picture(pixels, placed))
    return found


def prompt(x, layout, rng, backend):
    """Token ids, pictures, and the request; what stands between the image tokens of a picture becomes a few words."""
    pictures, ids = pictures_of(x, layout, rng), []
    placed = iter(pictures)

    def words(n):
        return rng.integers(7, x.shape.vocab, n).tolist()

    for part in layout:
        if isinstance(part, int):
            ids += words(part)
            continue
        for is_image, run in itertools.groupby(next(placed).layout.text, lambda c: c == IMAGE):
            n = len(list(run))
            ids += [x.shape.image_token] * n if is_image else words(1 + n % 3)
    seen = [Pictures(backend.vision(x.tower.feeds([p])), (p.layout,)) for p in pictures]
    seen = Pictures.joined(seen) if seen else x.tower.no_pictures()
    ids = np.array(ids, np.int64)
    return ids, pictures, Request.of(ids, seen, x.family, x.shape, x.weights[x.family.embedding])


def given(x, pictures):
    stock = x.tower.stock(pictures, np.zeros(0, bool)) if pictures else {}
    return {n: torch.from_numpy(v) for n, v in stock.items()}


def stock(x, ids, pictures, steps):
    """Stock generate(): greedy tokens, and the logits of every step."""
    ids = torch.from_numpy(ids)[None]
    out = x.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **given(x, pictures), max_new_tokens=steps,
        min_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


# ---------------------------------------------------------------- the laws of every family
def test_vision_equals_transformers_on_pictures_of_unequal_numbers_of_tiles(x):
    rng, backend = np.random.default_rng(1), x.backend()
    for layout in LAYOUTS[:3]:
        pictures = pictures_of(x, layout, rng)
        with torch.no_grad():
            expected = x.tower.features(x.model, given(x, pictures))
        found = backend.vision(x.tower.feeds(pictures))
        agrees("export", found["image_embeds"], expected["image_embeds"].numpy())


def test_answers_equal_stock_generate(x):
    """Dense graphs, and sparse graphs at full budget, give the greedy tokens and logits of transformers."""
    rng, steps = np.random.default_rng(2), 8
    backend = x.backend(Recipe().replace(tokens__prune_layer=1))
    rows = every_row(gatherer(x.weights, x.family, x.shape.layers))
    for layout in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[3]):
        ids, pictures, request = prompt(x, layout, rng, backend)
        tokens, logits = stock(x, ids, pictures, steps)
        full = sparse_feeds(request, Recipe(), token_share=1.0)
        for graph, constant in (("_dense", {}), ("", rows)):
            out = prefill(backend, prefill_feeds(request) | full, f"prefill{graph}")
            agrees("export", out["logits"].numpy(), logits[:1])
            decoder = Decoder(backend, f"decode{graph}", out, constant)
            for i in range(steps - 1):
                step = decoder.step(step_feeds(request, tokens[i], i))
                agrees("export", step, logits[i + 1 : i + 2])
                assert step[0].argmax() == tokens[i + 1]


def test_padded_batches_at_any_position_equal_transformers(x):
    batch, length, new = 3, 13, 4
    rng = np.random.default_rng(3)
    embeds = rng.standard_normal((batch, length + new, x.shape.hidden)).astype(np.float32)
    positions, mask = rng.integers(0, 50, (batch, length + new)), np.ones((batch, length + new), np.int64)
    mask[1, :4], mask[2, :9] = 0, 0
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}
    with torch.no_grad():
        hidden = x.model.get_decoder()(**{n: torch.from_numpy(v) for n, v in feeds.items()}).last_hidden_state
        expected = x.model.lm_head(hidden).numpy()
    backend, feeds = x.backend(), feeds | {"position_ids": positions[None]}
    first = {n: v[..., :length] for n, v in feeds.items()} | {"inputs_embeds": embeds[:, :length]}
    out = prefill(backend, first, "prefill_dense")
    agrees("export", out["logits"].numpy(), expected[:, length - 1])
    then = feeds | {"inputs_embeds": embeds[:, length:], "position_ids": positions[None, :, length:]}
    agrees("export", Decoder(backend, "decode_dense", out, {}).read(then), expected[:, length:])


def check_cut(x, policy, first="none"):
    recipe = test_token_cuts.recipe_of(policy=policy, first=first, first_share=1.0, share=0.4)
    backend = test_token_cuts.cached_backend(x, recipe)
    _, _, request = prompt(x, LAYOUTS[0], np.random.default_rng(4), backend)
    out = arrays(prefill(backend, prefill_feeds(request) | sparse_feeds(request, recipe)))
    kept = out["kept_tokens"][0]
    assert len(kept) < request.tokens
    assert np.isin(np.flatnonzero(~request.is_image[0]), kept).all(), "text between tiles stays"
    test_token_cuts.check_masked(x, request, recipe, out)
    return request, kept


@pytest.mark.parametrize("policy", ["attention", "spread_keys"])
def test_a_cut_prefill_is_the_dense_one_with_dropped_tokens_masked_and_text_between_tiles_stays(x, policy):
    request, _ = check_cut(x, policy)
    inside = np.flatnonzero(request.is_image[0])
    assert (~request.is_image[0, inside[0] : inside[-1]]).any(), "there is text between tiles"


def test_every_picture_keeps_a_share_of_its_own_whatever_its_number_of_tiles(x):
    recipe = test_token_cuts.recipe_of(policy="attention", quota="each", share=0.25)
    backend = test_token_cuts.cached_backend(x, recipe)
    _, pictures, request = prompt(x, LAYOUTS[1], np.random.default_rng(5), backend)
    assert request.picture_sizes() == [p.tokens for p in pictures]
    out = arrays(prefill(backend, prefill_feeds(request) | sparse_feeds(request, recipe)))
    kept = request.picture[0, out["kept_tokens"][0]]
    wanted = [max(1, int(0.25 * p.tokens + 0.5)) for p in pictures]
    assert [int((kept == i).sum()) for i in range(len(pictures))] == wanted


def test_every_image_token_is_the_dense_prefill_and_a_prompt_without_pictures_is_left_alone(x):
    recipe = test_token_cuts.recipe_of()
    backend = test_token_cuts.cached_backend(x, recipe)
    for layout in (LAYOUTS[0], LAYOUTS[3]):
        _, _, request = prompt(x, layout, np.random.default_rng(6), backend)
        feeds = prefill_feeds(request) | sparse_feeds(request, recipe, token_share=1.0)
        out = arrays(prefill(backend, feeds))
        for key, value in arrays(prefill(backend, prefill_feeds(request), "prefill_dense")).items():
            agrees("export", out[key], value)


def test_a_later_question_is_answered_as_if_all_were_asked_at_once(x):
    runner, rng = runner_of(x, WHOLE), np.random.default_rng(7)
    ids, pictures, request = prompt(x, LAYOUTS[0], rng, runner.backend)
    context = runner.prefill(request, FULL)
    seen = Pictures(runner.backend.vision(x.tower.feeds(pictures)), tuple(p.layout for p in pictures))
    for number in range(2):
        answer = [7 if i == x.shape.image_token else i for i in runner.tokens(context, 4 + number, frozenset())]
        asked = rng.integers(7, x.shape.vocab, 3 + number).tolist()
        context = context.then(answer + asked, len(asked))
        ids = np.concatenate([ids, answer, asked])
    scratch = runner.prefill(Request.of(ids, seen, x.family, x.shape, x.weights[x.family.embedding]), DENSE)
    agrees("export", context.logits, scratch.logits)
    assert context.request.next_position == scratch.request.next_position == len(ids)
    again = [list(runner.tokens(c, 6, frozenset())) for c in (context, scratch)]
    assert again[0] == again[1]


@pytest.mark.parametrize("version", ["10.3", "10.15", "rtx-1.7"])
def test_lowered_graphs_equal_the_portable_ones(x, tmp_path, version):
    check_lowered(x, tmp_path, version)


def check_lowered(x, folder, version):
    test_lowered.check_all(x, test_lowered.SMALL, version, folder)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "seed"), WIDE)
def test_random_configurations_keep_every_law(name, seed, tmp_path):
    path = random_checkpoint(RANDOM[name](seed), tmp_path / "model", seed)
    (tmp_path / "graphs").mkdir()
    x = Exported(path, tmp_path / "graphs", families.find(name))
    x.family.check_config(x.config)
    test_vision_equals_transformers_on_pictures_of_unequal_numbers_of_tiles(x)
    test_answers_equal_stock_generate(x)
    test_padded_batches_at_any_position_equal_transformers(x)
    for policy in test_token_cuts.POLICIES:
        check_cut(x, policy)
    check_cut(x, "attention", "spread")
    test_every_picture_keeps_a_share_of_its_own_whatever_its_number_of_tiles(x)
    test_every_image_token_is_the_dense_prefill_and_a_prompt_without_pictures_is_left_alone(x)
    test_a_later_question_is_answered_as_if_all_were_asked_at_once(x)
    for version in test_lowered.VERSIONS:
        (tmp_path / version).mkdir()
        check_lowered(x, tmp_path / version, version)


# ---------------------------------------------------------------- the command line
def drawn(folder, sizes):
    """Pictures with something in them, and their paths."""
    rng, found = np.random.default_rng(8), []
    for i, (width, height) in enumerate(sizes):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        image.save(folder / f"{i}.png")
        found.append((image, folder / f"{i}.png"))
    return found


def answered_by_transformers(name, model, images, question, system=None):
    """Prompt ids and greedy answer of transformers' own processor and generate()."""
    processor = processor_of(name, model)
    asked = asked_of(processor, images, question, system)
    stock = getattr(transformers, families.find(name).model_class).from_pretrained(model).eval()
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    with torch.no_grad():
        out = stock.generate(**{n: asked[n] for n in names if n in asked}, max_new_tokens=8, do_sample=False)
    ids = asked["input_ids"]
    stop = stock.generation_config.eos_token_id
    return (
        ids,
        [i for i in out[0, ids.shape[1] :].tolist() if i != stop],
        int((ids == stock.config.image_token_id).sum()),
    )


@pytest.mark.parametrize(
    ("sizes", "system"), [(((90, 50), (40, 70)), None), ((), "be short ."), (((13, 12),), "be short .")]
)
def test_run_answers_as_transformers_does_with_its_own_processor(name, sizes, system, tmp_path):
    model, plan = bundle_of(name)
    files = drawn(tmp_path, sizes)
    ids, tokens, image_tokens = answered_by_transformers(name, model, [i for i, _ in files], QUESTION, system)
    options = [w for _, path in files for w in ("--image", path)] + (["--system", system] if system else [])
    done = cm_export("run", plan, *options, "--prompt", QUESTION, "--max-new-tokens", "8", "--json", "--dense")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["prompt_tokens"], found["image_tokens"]) == (ids.shape[1], image_tokens)
    assert found["token_ids"] == tokens


def test_a_later_question_on_the_command_line_is_the_conversation_of_transformers(name, tmp_path):
    """Both questions in one run, the second over the cache of the first."""
    model, plan = bundle_of(name)
    ((image, path),) = drawn(tmp_path, [(50, 30)])
    words = [
        "--image",
        path,
        "--prompt",
        QUESTION,
        "--prompt",
        "and the line ?",
        "--max-new-tokens",
        "6",
        "--json",
        "--dense",
    ]
    done = cm_export("run", plan, *words)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["turns"]
    processor = processor_of(name, model)
    said = [({"type": "image", "image": image}, QUESTION), (None, "and the line ?")]
    messages = []
    for i, (picture, text) in enumerate(said):
        messages.append({"role": "user", "content": [*([picture] if picture else []), {"type": "text", "text": text}]})
        if i == 0:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": first["text"]}]})
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(messages, **how)["input_ids"]
    assert second["prompt_tokens"] == expected.shape[1]


def test_kept_tokens_are_counted_and_drawn_where_they_lie(name, tmp_path):
    """A thumbnail's tokens count and cover no cell."""
    _, plan = bundle_of(name)
    ((_, path),) = drawn(tmp_path, [(90, 50)])
    words = ["--image", path, "--prompt", QUESTION, "--max-new-tokens", "2", "--json", "--token-share"]
    for share in ("1", "0.3"):
        done = cm_export("run", plan, *words, share, "--overlay", tmp_path / f"{share}.png")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["image_tokens_kept"] == round(float(share) * found["image_tokens"])
        assert found["kept_tokens"] == found["prompt_tokens"] - found["image_tokens"] + found["image_tokens_kept"]
    runner = Runner(Bundle(plan), threads=1)
    picture = runner.tower.picture(Image.open(path).convert("RGB"), runner.picture_rule)
    rows, columns = picture.grid[1:]
    stays = np.zeros(picture.tokens, bool)
    stays[[0, 1, runner.tower.side**2, picture.tokens - 1]] = (
        True  # two of the first tile, one of the next, one of the last
    )
    kept = picture.layout.kept(stays)
    assert kept.shape == (rows, columns)
    assert np.argwhere(kept).tolist() == [[0, 0], [0, 1], [0, runner.tower.side]], "and none of the thumbnail"
    assert compose(Image.open(path), kept).size[0] % columns == 0


def test_thresholds_and_weights_of_4_bits_answer(name, tmp_path):
    _, plan = bundle_of(name, "--neurons", "active", "--weights", "int4", "--prune-layer", "1")
    ((_, path),) = drawn(tmp_path, [(60, 80)])
    done = cm_export("run", plan, "--image", path, "--prompt", QUESTION, "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["image_tokens_kept"] < found["image_tokens"] and found["neurons_kept"] < found["neurons"]
    packed = Bundle(plan).packed
    assert packed is not None and any(name.startswith("vision.") for name in packed.entries)


def test_bench_and_eval_take_it(name, tmp_path):
    _, plan = bundle_of(name)
    words = ["--new-tokens", "2", "--repeats", "1", "--json"]
    done = cm_export("bench", plan, "--image-tokens", "20", "--vision", *words)
    assert done.returncode == 0, done.stderr
    done = cm_export("bench", plan, "--image-tokens", "21", *words)
    assert done.returncode == 2 and "no picture has 21 image tokens" in done.stderr
    drawn(tmp_path, [(60, 80)])
    (tmp_path / "my.jsonl").write_text(json.dumps({"image": "0.png", "question": QUESTION, "answer": "circle"}))
    done = cm_export("eval", plan, "--data", tmp_path / "my.jsonl", "--out", tmp_path / "r.json", "--quiet")
    assert done.returncode == 0, done.stderr


def test_bench_takes_the_nearest_number_of_image_tokens_that_pictures_have(name):
    """4 image tokens a tile: one tile, or three and more of them."""
    tower = Bundle(bundle_of(name)[1]).tower
    assert [bench.likely(tower, n) for n in (1, 4, 7, 9, 29, 256)] == [4, 4, 4, 12, 28, 256]


@pytest.mark.parametrize("version", ["10.3.0", pytest.param("10.16.1.11", marks=pytest.mark.wide)])
def test_engines_answer_as_onnx_runtime_does(name, version, tmp_path, monkeypatch):
    """A stand-in for TensorRT runs engines of the lowered graphs; pictures of one tile and of several."""
    _, plan = bundle_of(name)
    at = add_engines(
        monkeypatch, plan, tmp_path / "x.plan", machine(version), engine__max_prompt=640, engine__capacity=768
    )
    at.sit_at(monkeypatch)
    images = [image for image, _ in drawn(tmp_path, [(90, 50), (28, 28)])]
    engines, ours = (load(at.bundle, threads=1, backend=b) for b in (None, "onnxruntime"))
    assert engines.backend.name == "tensorrt"
    for given in (images, images[1:], []):
        found, expected = (one.generate(QUESTION, given, max_new_tokens=6) for one in (engines, ours))
        assert found.token_ids == expected.token_ids
        assert all(map(np.array_equal, found.kept, expected.kept))


# ---------------------------------------------------------------- published checkpoints
PEAK = """
import sys
import numpy as np
from cm_export.base.environment import peak_memory_bytes
from cm_export.bundle.bundle import Bundle
from cm_export.host.runner import Runner
runner = Runner(Bundle(sys.argv[1]), threads=1)
tower = runner.tower
runner.backend.vision(tower.feeds(tower.sized(int(sys.argv[2]) * tower.side**2, np.random.default_rng(0))))
print(peak_memory_bytes())
"""


@pytest.mark.wide
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_builds_and_tiles_take_the_memory_that_is_predicted(name, tmp_path):
    """Random weights, two layers of decoder and tower, a small vocabulary."""
    model, plan = random_checkpoint(published(name, small=True), tmp_path / "model"), tmp_path / "x.plan"
    built(plan, "--model", model, "--neurons", "griffin", "--prune-layer", "1", timeout=1200)
    done = cm_export("bench", plan, "--vision", "--new-tokens", "2", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    peaks = []
    for tiles in (3, 11):
        command = [sys.executable, "-c", PEAK, plan, str(tiles)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    tower = Bundle(plan).tower
    (picture,) = tower.sized(8 * tower.side**2, np.random.default_rng(0))
    assert peaks[1] - peaks[0] < 1.1 * tower.memory(picture) < 2 * (peaks[1] - peaks[0])
