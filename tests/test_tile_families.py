"""SmolVLM, Idefics3 and InternVL: the laws of every family, on pictures of unequal numbers of tiles with text between them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import test_lowered
import torch
import transformers
from conftest import built, bundles_of, cm_export, wide
from fake_engines import add_engines, machine
from natively_attended import says_the_same
from PIL import Image
from proofs import each_proof, holds
from random_models import random_checkpoint
from test_qwen_families import exported_of
from tile_models import PUBLISHED, answering, asked_of, processor_of, published

from cm_export import families
from cm_export.bundle.bundle import Bundle
from cm_export.evals import bench
from cm_export.host.loaded import load
from cm_export.host.overlay import compose
from cm_export.host.runner import Runner

QUESTION = "what shape is red ?"
bundle_of = bundles_of(answering, "--prune-layer", "1")


# Idefics3 is SmolVLM under another name: here it is built and asked, its graphs are compared in the wide tests.
@pytest.fixture(scope="module", params=["smolvlm", "internvl", wide("idefics3")])
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


@pytest.mark.parametrize("version", ["10.15", *map(wide, ("10.3", "rtx-1.7"))])
def test_lowered_graphs_equal_the_portable_ones(x, tmp_path, version):
    check_lowered(x, tmp_path, version)


def check_lowered(x, folder, version):
    test_lowered.check_all(x, test_lowered.SMALL, version, folder)


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


@pytest.mark.parametrize("name", ["internvl", *map(wide, ("smolvlm", "idefics3"))])
def test_thresholds_and_weights_of_4_bits_answer(name, tmp_path):
    _, plan = bundle_of(name, "--neurons", "active", "--weights", "int4", "--prune-layer", "1")
    ((_, path),) = drawn(tmp_path, [(60, 80)])
    done = cm_export("run", plan, "--image", path, "--prompt", QUESTION, "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["image_tokens_kept"] < found["image_tokens"] and found["neurons_kept"] < found["neurons"]
    packed = Bundle(plan).packed
    assert packed is not None and any(name.startswith("vision.") for name in packed.entries)


@pytest.mark.parametrize("name", ["smolvlm", *map(wide, ("internvl", "idefics3"))])
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


@pytest.mark.parametrize("version", ["10.3.0", wide("10.16.1.11")])
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
    built(plan, "--model", model, "--neurons", "griffin", "--prune-layer", "1")
    done = cm_export("bench", plan, "--vision", "--new-tokens", "2", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    peaks = []
    for tiles in (3, 11):
        command = [sys.executable, "-c", PEAK, plan, str(tiles)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    tower = Bundle(plan).tower
    (picture,) = tower.sized(8 * tower.side**2, np.random.default_rng(0))
    assert peaks[1] - peaks[0] < 1.1 * tower.memory(picture) < 2 * (peaks[1] - peaks[0])
