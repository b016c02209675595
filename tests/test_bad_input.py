"""Bad input of every kind through the whole command: one line on stderr, exit code 2, nothing on stdout, no traceback.

What needs no bundle and no checkpoint stands in test_cli.py; here the real ones are opened.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import cm_export, session
from PIL import Image
from safetensors.torch import load_file, save_file

from cm_export import families
from cm_export.bundle.bundle import WEIGHTS, Bundle
from cm_export.cli import main
from cm_export.host import picture_source
from cm_export.host.chat import Chat
from cm_export.source import checkpoint

SECONDS = 20  # within which every mistake must be told, also by a `build` of a whole checkpoint


def one_line(code: int, out: str, err: str, *words: str, expected: int = 2) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("cm-export: [")]
    assert (code, out, len(lines)) == (expected, "", 1), (code, out, err)
    assert lines[0].startswith("cm-export: error: ") and "Traceback" not in err and "this is a bug" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused(arguments, words of the message): runs the command here, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(args: list[object], *words: str, expected: int = 2) -> None:
        started = time.perf_counter()
        code = main([*map(str, args)])
        one_line(code, *capfd.readouterr(), *words, expected=expected)
        assert time.perf_counter() - started < SECONDS
        assert not [p for p in tmp_path.rglob("*.tmp")]

    return run


# ---------------------------------------------------------------- run, eval, bench, inspect


def _picture(size: tuple[int, int], keep: float = 1.0) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        Image.effect_noise(size, 50).convert("RGB").save(path, "PNG")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return write


IMAGES = {
    "missing.png": (None, "no such file"),
    "empty.png": (lambda p: p.write_bytes(b""), "is empty"),
    "text.png": (lambda p: p.write_text("not a picture\n" * 99), "not a picture"),
    "page.png": (lambda p: p.write_text("<!DOCTYPE html><html></html>"), "it is an HTML page"),
    "pointer.png": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "zeros.png": (lambda p: p.write_bytes(bytes(4096)), "nothing but zero bytes"),
    "link.png": (lambda p: p.symlink_to("gone.png"), "is a symbolic link to gone.png, which is not there"),
    "~nobody-of-that-name/x.png": (None, "no home directory is known for ~nobody-of-that-name"),
    "half.png": (_picture((64, 64), 0.5), "truncated"),
    "only-the-signature.png": (_picture((64, 64), 0.003), "picture"),
    "folder.png": (lambda p: p.mkdir(), "is a directory"),
    "long.png": (_picture((6500, 32)), "too long and thin"),
    "pipe.png": (os.mkfifo, "not a regular file"),
    "vector.svg": (lambda p: p.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'), "not a picture"),
    "broken.jpg": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 400), "broken.jpg"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_file_that_is_no_usable_picture_is_named(refused, demo_bundle, tmp_path, name, monkeypatch):
    monkeypatch.setattr(picture_source, "WAIT_SECONDS", 0.2)
    write, word = IMAGES[name]
    if write:
        write(tmp_path / name)
    refused(["run", demo_bundle, "--image", name, "--prompt", "what ?", "-q"], name, word)


@pytest.mark.parametrize("url", ["https://example.org/x.png", "file:///etc/hostname", "data:image/png;base64,AAAA"])
def test_a_url_is_not_fetched(refused, demo_bundle, url):
    refused(["run", demo_bundle, "--image", url, "--prompt", "what ?"], "URLs are not fetched")


RUN = {
    "neuron share 0": (["--neuron-share", "0"], "--neuron-share"),
    "neuron share 1.5": (["--neuron-share", "1.5"], "--neuron-share"),
    "token share nan": (["--token-share", "nan"], "--token-share"),
    "token share text": (["--token-share", "half"], "not a number"),
    "no tokens": (["--max-new-tokens", "0"], "--max-new-tokens"),
    "tokens text": (["--max-new-tokens", "ten"], "--max-new-tokens"),
    "unknown option": (["--neuronshare", "0.4"], "--neuron-share"),
    "dense with a budget": (["--dense", "--neuron-share", "0.5"], "--dense"),
    "overlay of another kind": (["--image", "{picture}", "--overlay", "kept.pdf"], "use .png"),
    "overlay into nowhere": (["--image", "{picture}", "--overlay", "no/kept.png"], "no directory"),
    "overlay without a picture": (["--overlay", "kept.png"], "no picture"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "more words than the model holds": (["--prompt", "what " * 40_000], "the model holds"),
    "empty prompt": (["--prompt", ""], "prompt is empty"),
    "bytes that are no text": (["--prompt", "\udcff\udcfe"], "not valid text"),
    "the image token": (["--control-tokens", "--prompt", "a {image_token} b"], "reserved"),
    "the image token beside a picture": (
        ["--control-tokens", "--image", "{picture}", "--prompt", "{image_token}"],
        "reserved",
    ),
    "the image token as system": (["--control-tokens", "--system", "{image_token}"], "reserved"),
}


@pytest.mark.parametrize("name", RUN)
def test_a_bad_option_of_run_is_refused(refused, demo_bundle, tmp_path, name):
    _picture((64, 64))(tmp_path / "x.png")
    options, word = RUN[name]
    image_token = Chat(Bundle(demo_bundle)).image_token
    options = [o.format(picture=tmp_path / "x.png", image_token=image_token) for o in options]
    asked = [] if "--prompt" in options else ["--prompt", "what ?"]
    refused(["run", demo_bundle, *asked, *options], word)
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize("verb", ["run", "eval", "bench", "inspect"])
def test_every_verb_refuses_what_is_no_bundle(refused, tmp_path, verb):
    rest = {"run": ["--prompt", "x"], "eval": ["--task", "easy-vqa"]}.get(verb, [])
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    refused([verb, "none.plan", *rest], "none.plan", "no such bundle")
    refused([verb, "file", *rest], "file", "is a file")
    refused([verb, "folder", *rest], "folder", "not a bundle")


@pytest.mark.parametrize("verb", ["run", "eval", "bench", "inspect"])
def test_every_verb_refuses_a_damaged_bundle_before_it_shows_anything(refused, demo_bundle, tmp_path, verb):
    rest = {"run": ["--prompt", "what color ?"], "eval": ["--task", "easy-vqa", "--limit", "1"]}.get(verb, [])
    shutil.copytree(demo_bundle, tmp_path / "x.plan", copy_function=os.link)
    content = bytearray((demo_bundle / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "x.plan" / WEIGHTS).unlink()
    (tmp_path / "x.plan" / WEIGHTS).write_bytes(content)
    refused([verb, "x.plan", *rest], WEIGHTS, "build the bundle again")


OTHER = {
    "unknown verb": (["evla"], "did you mean 'eval'?"),
    "unknown task": (["eval", "{bundle}", "--task", "easy-vqb"], "did you mean 'easy-vqa'?"),
    "report of another kind": (["eval", "{bundle}", "--task", "easy-vqa", "--out", "r.csv"], "use .json"),
    "unknown graph": (["inspect", "{bundle}", "--graph", "decoed"], "did you mean 'decode'?"),
    "longer than the model": (["bench", "{bundle}", "--prompt-tokens", "999999"], "the model holds"),
    "more image tokens than the model": (["bench", "{bundle}", "--image-tokens", "999999"], "the model holds"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_verbs_refuse_bad_options(refused, demo_bundle, name):
    args, word = OTHER[name]
    refused([a.format(bundle=demo_bundle) for a in args], word)


# ---------------------------------------------------------------- build


@pytest.fixture
def model(bare_checkpoint, tmp_path) -> Path:
    shutil.copytree(bare_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def _config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _a_weight(tensors: dict[str, torch.Tensor]) -> str:
    return next(n for n in sorted(tensors) if n.endswith("0.mlp.up_proj.weight"))


def _poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_a_weight(tensors)][1, 1] = value

    return lambda folder: _tensors(folder, change)


CHECKPOINTS = {
    "truncated weights": (lambda f: _cut(f, 0.7), "truncated", "model.safetensors"),
    "weights cut in the header": (lambda f: _cut(f, 0.001), "truncated", "model.safetensors"),
    "pickle": (_pickle, "pytorch_model.bin", "pickles can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "git-lfs pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull"),
    "missing tensor": (lambda f: _tensors(f, lambda t: t.pop(_a_weight(t))), "missing", "up_proj"),
    "tensor of another shape": (
        lambda f: _tensors(f, lambda t: t.update({_a_weight(t): torch.ones(3, 5)})),
        "up_proj",
    ),
    "NaN": (_poison(float("nan")), "NaN", "up_proj"),
    "infinity": (_poison(float("inf")), "infinity", "up_proj"),
    "layers that the weights lack": (
        lambda f: _config(f, text_config__num_hidden_layers=3, text_config__layer_types=["full_attention"] * 3),
        "missing",
        "layers.2",
    ),
    "settings that disagree": (lambda f: _config(f, text_config__num_hidden_layers=3), "config.json", "layer_types"),
    "layers beyond all memory": (
        lambda f: _config(f, text_config__num_hidden_layers=10**12),
        "num_hidden_layers = 1000000000000",
    ),
    "a width beyond all memory": (
        lambda f: _config(f, text_config__intermediate_size=10**12),
        "proj.weight is [",
        "config.json asks for [",
    ),
    "a tower of no type": (lambda f: _config(f, vision_config__model_type=[]), "config.json"),
    "a tower that cannot be made": (lambda f: _config(f, vision_config__embed_dim=-8), "config.json", "negative"),
    "unsupported model": (
        lambda f: _config(f, model_type="mistral"),
        "'mistral'",
        f"supported: {', '.join(families.names())}",
    ),
    "own code": (lambda f: _config(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "quantised": (lambda f: _config(f, quantization_config={"bits": 4}), "quantised"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json", "JSON"),
    "config of a wrong type": (lambda f: _config(f, text_config__hidden_size="wide"), "config.json"),
    "config with a section that is none": (lambda f: _config(f, text_config=3), "config.json"),
    "config without layers": (lambda f: _config(f, text_config__num_hidden_layers=0), "config.json"),
    "no heads": (lambda f: _config(f, text_config__num_attention_heads=0), "config.json", "num_attention_heads"),
    "heads that do not divide": (lambda f: _config(f, text_config__num_attention_heads=7), "config.json"),
    "unknown activation": (lambda f: _config(f, text_config__hidden_act="sinus"), "config.json", "hidden_act"),
    "unknown rope": (
        lambda f: _config(f, text_config__rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "config.json",
    ),
    "tokenizer is no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\0"), "tokenizer.json"),
    "picture rules are no JSON": (
        lambda f: (f / "preprocessor_config.json").write_text("["),
        "preprocessor_config.json",
    ),
    "pictures that keep their size": (
        lambda f: (f / "preprocessor_config.json").write_text('{"do_resize": false}'),
        "preprocessor_config.json",
        "do_resize",
    ),
    "generation rules are no JSON": (
        lambda f: (f / "generation_config.json").write_text("["),
        "generation_config.json",
    ),
    "chat template is no template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        "chat_template.jinja",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_become_a_bundle_is_refused_early(refused, model, tmp_path, name):
    damage, *words = CHECKPOINTS[name]
    damage(model)
    refused(["build", "--model", "model", "--out", "x.plan", "--prune-layer", "1", "-q"], *words)
    assert not (tmp_path / "x.plan").exists()


BUILD = {
    "prune layer beyond the model": (["--prune-layer", "2"], "2 layers"),
    "unknown neuron policy": (["--neurons", "grifin"], "did you mean 'griffin'?"),
    "unknown token policy": (["--tokens", "overlapp"], "did you mean 'overlap'?"),
    "unknown recipe": (["--recipe", "dmeo"], "did you mean 'demo'?"),
    "recipe that is missing": (["--recipe", "none.toml"], "none.toml"),
    "recipe that is a folder": (["--recipe", "model"], "model"),
    "hub id without a network": (["--model", "owner/name"], "owner/name"),
    "revision of a folder": (["--revision", "main"], "no revision"),
    "out is a file": (["--out", "file"], "file", "not a directory"),
    "out holds something else": (["--out", "full"], "full", "not a bundle"),
    "out below a file": (["--out", "file/x.plan"], "file"),
    "out where nothing can be made": (["--out", "/proc/x.plan"], "/proc"),
    "out below that": (["--out", "/proc/x/y.plan"], "/proc"),
    "work directory where nothing can be made": (["--work-dir", "/proc/x"], "/proc/x"),
    "work directory is a file": (["--work-dir", "file"], "file"),
    "negative threads": (["--threads", "-2"], "--threads"),
}


@pytest.mark.parametrize("name", BUILD)
def test_a_bad_option_of_build_is_refused(refused, model, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    options, *words = BUILD[name]
    base = ["--model", "model", "--out", "x.plan"]
    refused(["build", *base, *options, "-q"], *words)
    assert (tmp_path / "full" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "x.plan").exists()


RECIPES = {
    "[neurons\nshare = 1": "TOML",
    "\xff": "r.toml",
    "modle = 'demo'": "did you mean 'model'?",
    "[neurons]\nshaer = 0.4": "did you mean 'share'?",
    "[neurns]\nshare = 0.4": "did you mean 'neurons'?",
    "neurons = 3": "table",
    "[neurons]\nshare = '0.4'": "share",
    "[neurons]\nshare = true": "share",
    "[neurons]\nshare = 0": "share",
    "[tokens]\nshare = nan": "share",
    "[tokens]\nprune_layer = 1.5": "prune_layer",
    "[tokens]\nprune_layer = 0": "prune_layer",
    "[tokens]\npolicy = 'atention'": "did you mean 'attention'?",
    "[tokens]\nbudget = 'count'": "count",
    "[tokens]\nmin_share = 0.9\nmax_share = 0.1": "min_share",
    "seed = -1": "seed",
    "seed = 99999999999999999999": "seed",
    "dtype = 'int4'": "dtype",
    "backend = 'tensorflow'": "backend",
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_bad_recipe_is_refused(refused, model, tmp_path, text):
    (tmp_path / "r.toml").write_text(text, encoding="latin-1")
    refused(["build", "--model", "model", "--recipe", "r.toml", "--out", "x.plan", "-q"], RECIPES[text])


# ---------------------------------------------------------------- the real process


def test_the_installed_command_refuses_in_one_line(demo_bundle, tmp_path):
    """A handful through a process of its own, and a build below: what main() does in this one must hold there."""
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    for args, word in (
        (["run", demo_bundle, "--prompt", "what ?", "--image", tmp_path / "half.png", "-q"], "half.png"),
        (["run", demo_bundle, "--prompt", "what ?", "--neuron-share", "40"], "write 0.4"),
    ):
        done = cm_export(*args, timeout=120)
        one_line(done.returncode, done.stdout, done.stderr, word)


def test_a_refused_build_is_one_line_and_leaves_no_process_behind(model, tmp_path):
    _poison(float("nan"))(model)
    command = [Path(sys.executable).parent / "cm-export", "build", "--model", model, "--out", tmp_path / "x.plan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command), "--prune-layer", "1"], start_new_session=True, **pipes)
    out, err = process.communicate(timeout=120)
    one_line(process.returncode, out, err, "NaN")
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "x.plan").exists()
    for _ in range(50):  # multiprocessing's own tracker ends when it notices that its pipe was closed
        left = session(process.pid)
        if not left:
            break
        time.sleep(0.1)
    assert not left


def test_the_good_checkpoint_of_these_tests_passes_every_early_check(bare_checkpoint):
    assert checkpoint.resolve(str(bare_checkpoint)).model_type == "qwen2_vl"
