"""A family from outside the package, one file found by an entry point: it builds, equals transformers, and its tokens are cut."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import built, cm_export, wide
from PIL import Image
from random_models import Exported
from stepping import prefill
from test_batch import runner_of
from test_surgery import arrays
from tolerances import agrees
from traces import traced_once

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.families import Pictures, Port
from cm_export.host.decode import decode, greedy
from cm_export.host.request import Request, prefill_feeds, sparse_feeds
from cm_export.host.runner import Budget, Runner
from cm_export.recipe.recipe import Recipe
from cm_export.source import random_weights
from cm_export.surgery import pipeline

IMAGE = 5
LAYOUTS = ([3, "p", 4], [2, "p", "p", 3], [1, "p", 2, "p", 1], [6])  # words and pictures, two of them side by side


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder as pip would fill it: the family's file and the metadata that names it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "llava_like.py").write_text((Path(__file__).parent / "outside" / "llava_like.py").read_text())
    about = folder / "llava_like-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-like\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[cm_export.families]\nvipllava = llava_like\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", params=[5, wide(2)])
def llava(request, outside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    (folder / "out").mkdir()
    family = families.find("vipllava")
    random_weights.write(family.sample(request.param), family, folder / "model", request.param)
    x = Exported(folder / "model", folder / "out", family)
    with traced_once():
        assert x.dense
    return x


def asked(x, layout, rng):
    """Token ids, pixels of the pictures, and the request with what our tower makes of them."""
    rule = x.tower.rule({})
    pictures, ids = [], []
    for part in layout:
        if part == "p":
            pixels = rng.integers(0, 256, (9, 13, 3), np.uint8)
            pictures.append(x.tower.picture(Image.fromarray(pixels), rule))
            ids += [IMAGE] * pictures[-1].tokens
        else:
            ids += rng.integers(7, x.shape.vocab, part).tolist()
    return np.array(ids, np.int64), pictures


def prompt(x, layout, rng, backend):
    ids, pictures = asked(x, layout, rng)
    seen = Pictures.joined([Pictures(backend.vision(x.tower.feeds([p])), (p.layout,)) for p in pictures])
    return ids, pictures, Request.of(ids, seen, x.family, x.shape, x.weights[x.family.embedding])


def stock(x, ids, pictures, steps):
    """Stock generate(): greedy tokens, and the logits of every step."""
    given = {n: torch.from_numpy(v) for n, v in x.tower.feeds(pictures).items()} if pictures else {}
    ids = torch.from_numpy(ids)[None]
    out = x.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


def test_a_family_is_found_by_the_entry_point_of_a_distribution(outside):
    assert type(families.find("vipllava")).__name__ == "VipLlava"
    assert "vipllava" in families.names()
    with pytest.raises(InputError, match="did you mean 'vipllava'"):
        families.find("vipllav")


def test_the_verb_proves_it_like_one_of_the_package(llava, monkeypatch, capsys):
    """On the checkpoint of the fixture, so that it is traced once for this file."""
    monkeypatch.setattr("cm_export.parity.check.Subject", lambda *_, **__: llava)
    monkeypatch.setattr("cm_export.source.random_weights.write", lambda *_: llava.path)
    assert main(["check-family", "vipllava", "--configurations", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    states = {p["proof"]: p["state"] for p in report["configurations"][0]["proofs"]}
    assert set(states.values()) == {"proved"} and {"vision", "answers", "cut", "positions", "lowered"} <= set(states)
    assert report["notes"] == ["Tower.sample is the contract's: no layouts are asked but those of probes"]


def test_the_command_line_builds_and_runs_it(llava, outside, tmp_path, monkeypatch):
    x = llava
    monkeypatch.setenv("PYTHONPATH", str(outside), prepend=os.pathsep)
    out = built(tmp_path / "x.plan", "--model", x.path, "--neurons", "griffin", "--prune-layer", "1")
    runner = Runner(Bundle(out), threads=1)
    ids, pictures = asked(x, LAYOUTS[1], np.random.default_rng(5))
    seen = Pictures.joined([Pictures(runner.backend.vision(x.tower.feeds([p])), (p.layout,)) for p in pictures])
    prefilled = runner.prefill(runner.request(ids, seen), Budget(neuron_share=1.0, token_share=1.0))
    answer = [t for _, t in decode(runner.backend, [prefilled.row(choose=greedy(), limit=6)])]
    assert answer == stock(x, ids, pictures, 6)[0]
    each = pictures[0].tokens
    done = cm_export("bench", out, "--image-tokens", 2 * each, "--new-tokens", "2", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    done = cm_export("bench", out, "--image-tokens", 2 * each + 1, "--new-tokens", "2", "--repeats", "1")
    assert done.returncode == 2 and "no whole pictures" in done.stderr


def test_without_its_distribution_the_bundle_names_the_family(llava, outside, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = cm_export("build", "--model", llava.path, "--out", tmp_path / "x.plan", "--quiet")
    assert done.returncode == 2 and "model_type 'vipllava' is not supported" in done.stderr


# ------------------------------------------------------------------------------------------------ further outputs
def with_echo(family):
    """The same family, whose tower has a second output that is added after the first layer, as Qwen3-VL's deepstack is."""

    class Echo(type(family)):
        def shape(self, config):
            return dataclasses.replace(super().shape(config), whole_layers=1)

        def tower(self, config):
            tower = super().tower(config)
            tower.outputs = (*tower.outputs, Port("echo", np.float32, tower.outputs[0].axes))
            own, features = tower.module, tower.features

            def module(model):
                vision = own(model)
                forward = vision.forward
                vision.forward = lambda pixel_values: (lambda y: (y, y * 0.5))(forward(pixel_values)[0])
                return vision

            def both(model, given):
                found = features(model, given)
                return found | {"echo": found["image_embeds"] * 0.5}

            tower.module, tower.features = module, both
            return tower

        def mix_in(self, layer, hidden, rows):
            return hidden + rows["echo"] if layer == 0 else hidden

    return Echo()


@pytest.fixture(scope="module")
def echo(llava, tmp_path_factory):
    """The same checkpoint, exported by that family."""
    x = Exported(llava.path, tmp_path_factory.mktemp("echo"), with_echo(llava.family))
    with traced_once():  # its decoder is the one above: nothing is added after prefill
        assert x.dense
    return x


def test_further_outputs_of_a_tower_reach_the_layers_that_add_them(echo):
    """Prefill with a second vision output = transformers with the same sum after its first layer; and the cut after it."""
    x = echo
    recipe = Recipe().replace(tokens__policy="attention", tokens__prune_layer=1, tokens__share=0.5)
    backend = x.backend(recipe)
    ids, pictures, request = prompt(x, LAYOUTS[2], np.random.default_rng(6), backend)
    added = torch.zeros(1, len(ids), x.shape.hidden)
    added[0, torch.from_numpy(request.is_image[0])] = torch.from_numpy(request.inputs_embeds[request.is_image] * 0.5)
    layer = x.model.model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda _, __, out: (out[0] + added) if isinstance(out, tuple) else out + added)
    try:
        with torch.no_grad():
            given = {n: torch.from_numpy(v) for n, v in x.tower.feeds(pictures).items()}
            expected = x.model(input_ids=torch.from_numpy(ids)[None], **given).logits[0, -1].numpy()
    finally:
        hook.remove()
    dense = arrays(prefill(backend, prefill_feeds(request), "prefill_dense"))
    agrees("export", dense["logits"][0], expected)
    without = dict(prefill_feeds(request), echo=np.zeros_like(request.rows["echo"]))
    assert np.abs(arrays(prefill(backend, without, "prefill_dense"))["logits"][0] - expected).max() > 1e-3
    full = arrays(prefill(backend, prefill_feeds(request) | sparse_feeds(request, recipe, token_share=1.0)))
    agrees("export", full["logits"], dense["logits"])
    cut = arrays(prefill(backend, prefill_feeds(request) | sparse_feeds(request, recipe)))
    assert cut["kept_tokens"].shape[1] < request.tokens and np.isfinite(cut["logits"]).all()


def test_a_prompt_without_pictures_gives_prefill_no_further_rows_but_zeros(echo):
    x = echo
    runner = runner_of(x, Recipe())
    ids = np.array([7, 8, 9, 10])
    prefilled = runner.prefill(runner.request(ids, Pictures()), Budget(dense=True))
    with torch.no_grad():
        expected = x.model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    agrees("export", prefilled.logits[0], expected)


def test_no_token_is_cut_before_a_layer_that_must_see_all(llava):
    shape = dataclasses.replace(llava.shape, layers=6, whole_layers=3)
    recipe = Recipe().replace(tokens__policy="attention", tokens__prune_layer=3)
    pipeline.check_recipe(recipe, shape)
    with pytest.raises(InputError, match="must see every token"):
        pipeline.check_recipe(recipe.replace(tokens__prune_layer=2), shape)
    with pytest.raises(InputError, match="must see every token"):
        pipeline.check_recipe(recipe.replace(tokens__first="spread"), shape)
    assert Recipe().for_model(shape).tokens.prune_layer == 3, "a default gives way"
    assert Recipe().replace(tokens__prune_layer=1).for_model(shape).tokens.prune_layer == 1, "a choice is refused above"
