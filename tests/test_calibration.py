"""Calibration: what the file holds is what a plain PyTorch run sees, it is repeatable, and it is refused elsewhere."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, cm_export, here, take_stages
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tolerances import agrees

from cm_export.base.errors import InputError
from cm_export.bundle import calibration as files
from cm_export.calibrating import answers as answers_of
from cm_export.calibrating import calibrate
from cm_export.calibrating.answers import read_prompts
from cm_export.calibrating.cluster import GROUPS, cluster
from cm_export.families import Pictures, find
from cm_export.host.decode import Reader
from cm_export.host.loaded import load
from cm_export.host.runner import Budget
from cm_export.source import model as hf

CASES = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def measured(bare_bundle, tmp_path_factory):
    """The bare model (no tokenizer) continues random beginnings of its own."""
    out = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    options = ("--prompts", "5", "--max-new-tokens", "9", "--sensitivity-prompts", "2", "--threads", "1", "--json")
    done = cm_export("calibrate", bare_bundle, "--out", out, *options, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), options


def test_a_calibration_is_repeatable_to_the_byte(measured, bare_bundle, tmp_path):
    out, _, options = measured
    again = cm_export("calibrate", bare_bundle, "--out", tmp_path / "c", *options, env=ONE_THREAD)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "c").read_bytes() == out.read_bytes()


def test_it_says_what_was_run(measured, bare_bundle):
    _, summary, _ = measured
    manifest = json.loads((bare_bundle / "manifest.json").read_bytes())
    assert summary["checkpoint"] == files.checkpoint_id(manifest["model"]["files"])
    assert summary["ran"]["data"] == "own text" and summary["ran"]["generated_tokens"] > 5
    assert {"numpy", "onnxruntime"} <= set(summary["versions"])
    assert len(summary["rows"]) == manifest["model"]["config"]["text_config"]["num_hidden_layers"]


def test_measured_means_equal_a_plain_pytorch_run(bare_bundle, bare_checkpoint, monkeypatch):
    """energy, mean_z and mean_y of two made-up answers, with hooks on transformers' own down_proj."""
    runner, requests, answers = load(bare_bundle, 1), [], []
    write = answers_of._written

    def remember(runner, row):
        requests.append(row.request)
        answers.append(write(runner, row))
        return answers[-1]

    monkeypatch.setattr(answers_of, "_written", remember)
    found = calibrate.measure(runner, [], own=2, max_new_tokens=6, sensitivity_prompts=1)
    model = hf.load(bare_checkpoint, find("qwen2_vl"))
    z, y = ([[] for _ in model.model.language_model.layers] for _ in range(2))

    def watch(i):
        def hook(_module, inputs, output):
            z[i].append(inputs[0][0].double())
            y[i].append(output[0].double())

        return hook

    for i, layer in enumerate(model.model.language_model.layers):
        layer.mlp.down_proj.register_forward_hook(watch(i))
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for request, answer in zip(requests, answers, strict=True):
            embeds = torch.cat([torch.from_numpy(request.inputs_embeds), embedding[answer][None]], 1)
            positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)
            model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    for i in range(len(z)):
        own = torch.cat([a[-len(ids) :] for a, ids in zip(z[i], answers, strict=True)])
        outs = torch.cat([a[-len(ids) :] for a, ids in zip(y[i], answers, strict=True)])
        energy = (own / own.norm(dim=1, keepdim=True)).square().mean(0)
        agrees("export", found.energy[i], energy.numpy())
        agrees("export", found.mean_z[i], own.mean(0).numpy())
        agrees("export", found.mean_y[i], outs.mean(0).numpy())
    np.testing.assert_allclose(found.energy.sum(1), 1, atol=1e-6)
    assert (found.sensitivity >= 0).all() and found.sensitivity[:, 0].max() > found.sensitivity[:, -1].max()


def after(runner, prefilled, token):
    """[V]: logits after a first token of the answer."""
    row = prefilled.row()
    Reader(runner.backend).read([row], [[token]])
    return row.last


def test_another_checkpoint_is_refused(measured, tmp_path):
    from random_models import random_checkpoint, random_config

    other = random_checkpoint(random_config(0), tmp_path / "other", seed=1)
    options = ("--calibration", measured[0], "--prune-layer", "1", "--out", tmp_path / "x.plan")
    done = here("build", "--model", other, *options)
    assert done.returncode == 2 and "was measured on other weights" in done.stderr
    assert not (tmp_path / "x.plan").exists()


def test_a_policy_that_needs_a_calibration_says_so(bare_checkpoint, tmp_path):
    done = here("build", "--model", bare_checkpoint, "--neurons", "glass", "--out", tmp_path / "x.plan")
    assert done.returncode == 2 and "needs a calibration" in done.stderr and "cm-export calibrate" in done.stderr


def test_a_build_with_everything_calibrated_is_proved_and_answers(measured, bare_bundle, bare_checkpoint, tmp_path):
    """glass, fill, layer budgets and blocks in one bundle: gates pass, the weights are the checkpoint's, reordered."""
    out = tmp_path / "x.plan"
    take_stages(bare_bundle, out)
    options = ["--calibration", measured[0], "--neurons", "glass", "--fill", "prompt", "--neuron-layers", "calibrated"]
    options += ["--neuron-block", "8", "--neuron-share", "0.5", "--prune-layer", "1", "--threads", "1", "--out", out]
    done = here("build", "--model", bare_checkpoint, *options, "--json", threads=1)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["recipe"]["calibration"] == files.FILE and files.FILE in manifest["files"]
    assert (out / files.FILE).read_bytes() == measured[0].read_bytes()
    gates = {g["name"]: g["value"] for g in manifest["gates"]}
    assert gates["full budget, decode"] == 0
    runner, plain = load(out, 1), load(bare_bundle, 1)
    up = "model.language_model.layers.1.mlp.up_proj.weight"
    order = files.read(measured[0]).order[1]
    np.testing.assert_array_equal(runner.bundle.weights[up], plain.bundle.weights[up][order])
    np.testing.assert_array_equal(runner.bundle.calibration.energy[1], files.read(measured[0]).energy[1][order])
    request = runner.request(np.arange(7, 20), Pictures())
    for share in (0.5, 1.0):
        prefilled = runner.prefill(request, Budget(neuron_share=share))
        counts = prefilled.core_set.counts
        assert not (counts % 8).any() and prefilled.neurons == round(counts.mean())
        logits = after(runner, prefilled, 9)
    dense = runner.prefill(request, Budget(dense=True))
    np.testing.assert_array_equal(logits, after(runner, dense, 9))
    again = here("calibrate", out, "--out", tmp_path / "c")
    assert again.returncode == 2 and "reordered" in again.stderr


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("order", lambda a: a * 0, "not a permutation"),
        ("energy", lambda a: -a, "negative"),
        ("mean_z", lambda a: a * np.float32("nan"), "NaN"),
        ("mean_y", lambda a: a[1:], r"mean_y is float32"),
        ("shares", lambda a: a.astype(np.float64), "shares is float64"),
    ],
)
def test_a_damaged_file_is_refused_and_named(measured, tmp_path, name, change, says):
    arrays = load_file(measured[0])
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    about = files.read(measured[0]).about
    save_file(arrays, tmp_path / "bad", {"cm_export": json.dumps(about)})
    with pytest.raises(InputError, match=says):
        files.read(tmp_path / "bad")


def test_what_is_no_calibration_is_refused(measured, tmp_path):
    (tmp_path / "text").write_text("hello")
    save_file({"a": np.zeros(1)}, tmp_path / "other")
    (tmp_path / "short").write_bytes(measured[0].read_bytes()[:-9])
    for name, says in (("text", "cannot be read"), ("other", "not a calibration"), ("short", "cannot be read")):
        with pytest.raises(InputError, match=says):
            files.read(tmp_path / name)
    with pytest.raises(InputError, match="no such calibration"):
        files.read(tmp_path / "nothing")


def test_prompts_are_read_with_pictures_beside_the_file(tmp_path):
    lines = [
        '{"prompt": "a?", "image": "x.png"}',
        "",
        '{"question": "b?", "image": ["y.png", "z.png"]}',
        '{"prompt": "c"}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    found = read_prompts(tmp_path / "p.jsonl")
    assert [p.text for p in found] == ["a?", "b?", "c"]
    assert [len(p.images) for p in found] == [1, 2, 0] and found[0].images[0] == tmp_path / "x.png"


def test_remarks_on_the_pictures_of_prompts_are_gathered_by_name(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n{"prompt": "b", "image": "x.png"}\n')
    monkeypatch.setattr(answers_of, "_written", lambda *_: np.zeros(0, np.int64))
    runner = SimpleNamespace(
        bundle=SimpleNamespace(shape=None),
        chat=SimpleNamespace(stop_ids=frozenset()),
        see=lambda pictures: None,
        ask=lambda text, seen: None,
        notes_on=lambda picture: picture.notes,
        prefill=lambda *_: None,
        rule=lambda: None,
        answering=lambda *_: None,
    )
    notes: dict = {}
    asked = answers_of.asking(runner, read_prompts(tmp_path / "p.jsonl"), notes=notes)
    list(answers_of.answering(runner, asked, 1, drawn=False))
    assert {name: [note.kind for note in found] for name, found in notes.items()} == {
        str(tmp_path / "x.png"): ["of one colour"]
    }


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"image": "x"}', '{"prompt": 3}', '{"prompt": "a", "image": [1]}'])
def test_a_bad_line_of_prompts_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(InputError, match="line 2"):
        read_prompts(tmp_path / "p.jsonl")


# ------------------------------------------------------------------------------------------------ order
@CASES
@given(st.integers(1, 100), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_any_layer_is_ordered_by_a_permutation(ffn, tokens, seed):
    energy = np.random.default_rng(seed).random((tokens, ffn)).astype(np.float32)
    assert sorted(cluster(energy).tolist()) == list(range(ffn))


@CASES
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_neurons_that_are_always_active_together_share_a_block(many, seed):
    """Planted groups of 32, each of four groups of 8 that are alike but not equal: found at every size."""
    rng = np.random.default_rng(seed)
    tokens = 64
    big = np.repeat(np.eye(many), tokens // many, axis=1)  # [many, tokens]
    profile, label = [], []
    for g in range(many):
        for sub in range(4):
            noise = 0.3 * (np.arange(big.shape[1]) % 4 == sub)
            profile += [(big[g] * (1 + noise)) * rng.uniform(0.5, 2) for _ in range(8)]
            label += [(g, sub)] * 8
    shuffle = rng.permutation(len(label))
    order = cluster(np.array(profile)[shuffle].T.astype(np.float32))
    found = [label[shuffle[n]] for n in order]
    for at in range(0, len(found), 8):
        assert len(set(found[at : at + 8])) == 1
    for at in range(0, len(found), 32):
        assert len({g for g, _ in found[at : at + 32]}) == 1
    assert GROUPS == (8, 16, 32)
