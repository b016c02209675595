"""A checkpoint's generation settings: greedy answers equal `generate(do_sample=False)`, and what is not used is named.

Random checkpoints, Qwen2-VL with pictures and text models, with penalties from 1.0 to 1.3 and several stop ids.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import here, take_stages, wide
from random_models import IMAGE, patch_grids, prompt, random_checkpoint, random_text_config, request_of
from test_batch import runner_of
from test_export import picture_feeds
from test_text_only import WIDE, exported_text

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.families.qwen2_vl import vision_inputs
from cm_export.host.decode import decode
from cm_export.host.images import open_image
from cm_export.host.loaded import load
from cm_export.host.runner import Budget
from cm_export.host.sampling import Chooser, Sampling, settle
from cm_export.recipe.aliases import DEMO
from cm_export.recipe.recipe import Recipe
from cm_export.source import generation
from cm_export.source import model as hf

PENALTIES = (1.0, 1.02, 1.05, 1.1, 1.3)
STEPS = 24
WHOLE = {"neurons__policy": "dense", "tokens__policy": "dense"}
PICTURE = DEMO.parent / "images" / "teal-circle.png"


def settings_of(path, settings):
    """What the bundle of a checkpoint at `path` with this generation_config.json would know, and stock transformers for it."""
    (path / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((path / "config.json").read_text())
    return generation.read(path, config).settings, hf.load(path, families.find(config["model_type"]))


def answer(runner, request, rule, stop, dense):
    row = runner.prefill(request, Budget(dense=dense)).row(choose=Chooser(rule, request.ids, stop), limit=STEPS)
    list(decode(runner.backend, [row]))
    return row.ids


def theirs(model, ids, stop, **given):
    """Token ids up to a stop id, as `generate(do_sample=False)` has them."""
    ids = torch.from_numpy(ids)[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=STEPS, **given)
    out = out[0, ids.shape[1] :].tolist()
    return out[:-1] if out[-1] in stop else out


def settings(seed, vocab):
    """A random generation_config.json with a penalty, and the sampling that real ones ask for."""
    rng = np.random.default_rng(seed)
    stop = rng.integers(7, vocab, rng.integers(1, 5)).tolist()
    out = {"repetition_penalty": PENALTIES[seed % len(PENALTIES)], "eos_token_id": stop, "pad_token_id": 0}
    out |= {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001} if seed % 2 else {}
    return out | ({"min_new_tokens": 5} if seed % 3 == 0 else {}), frozenset(stop)


@pytest.mark.parametrize("seed", (1, wide(2)))
def test_greedy_answers_about_pictures_equal_generate_with_its_penalty_and_stop_ids(exported, tmp_path, seed):
    """The penalty counts the image token, too, since `generate` sees it in input_ids."""
    x, plain = exported(seed), []
    runner = runner_of(x, Recipe().replace(**WHOLE))
    path = shutil.copytree(x.path, tmp_path / "checkpoint")
    for case in range(5):
        rng = np.random.default_rng(10 * seed + case)
        asked, stop = settings(5 * seed + case, x.shape.vocab)
        known, model = settings_of(path, asked)
        layout = [(2, 3), (1, 2)][: 1 + case % 2]
        grid, pixels = picture_feeds(x, layout, rng)
        ids = prompt(x.shape, layout, rng, words=9)
        picture = {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.from_numpy(grid)}
        expected = theirs(model, ids, stop, **picture, mm_token_type_ids=(torch.from_numpy(ids)[None] == IMAGE).int())
        embeds = runner.backend.vision(vision_inputs(pixels, grid, x.tower.merge))["image_embeds"]
        request = request_of(x, ids, patch_grids(x, layout), embeds)
        rule = settle(None, known)
        for dense in (True, False):
            assert answer(runner, request, rule, stop, dense) == expected, (case, asked)
        plain.append(answer(runner, request, settle(Sampling(repetition_penalty=1.0), {}), stop, True) == expected)
    assert not all(plain), "without the rule some of these answers must differ for this test to say anything"


@pytest.mark.parametrize("case", WIDE)
def test_greedy_answers_of_text_models_equal_generate_with_its_penalty_and_stop_ids(tmp_path, case):
    x = exported_text(case)
    path = shutil.copytree(x.path, tmp_path / "checkpoint")
    runner, plain, lengths = runner_of(x, Recipe().replace(**WHOLE).for_model(x.shape)), [], set()
    for case in range(10):
        asked, stop = settings(case, x.shape.vocab)
        known, model = settings_of(path, asked)
        ids = np.random.default_rng(case).integers(7, x.shape.vocab, 3 + 4 * case)
        request, rule = request_of(x, ids, np.zeros((0, 3), np.int64), None), settle(None, known)
        stop = [*sorted(stop), answer(runner, request, rule, [], True)[2 * case]]  # one that this answer comes to
        known, model = settings_of(path, asked | {"eos_token_id": stop})
        found = answer(runner, request, rule, stop, True)
        assert found == theirs(model, ids, stop), (case, asked)
        plain.append(answer(runner, request, settle(None, {}), stop, True) == found)
        lengths.add(len(found))
    assert not all(plain) and len(lengths) > 2


def test_an_answer_ends_where_the_models_positions_do(exported):
    x = exported(1)
    runner = runner_of(x, Recipe().replace(**WHOLE))
    most = x.shape.max_positions
    ids = np.random.default_rng(0).integers(7, x.shape.vocab, most - 3)
    request = runner.request(ids, families.Pictures())
    row = runner.prefill(request, Budget(dense=True)).row(limit=200)
    list(decode(runner.backend, [row]))
    assert len(row.ids) == 3 and row.ended == "limit"
    with pytest.raises(InputError, match=f"{most} tokens, the model holds {most}"):
        runner.request(np.full(most, 8), families.Pictures())


# ---------------------------------------------------------------- what a file says


def read(tmp_path, values, **config):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    return generation.read(tmp_path, config)


def test_what_is_honoured_becomes_settings_and_what_changes_nothing_is_not_mentioned(tmp_path):
    real = {"bos_token_id": 1, "pad_token_id": 1, "eos_token_id": [2, 1], "transformers_version": "4.37.0"}
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "typical_p": 1.0, "max_length": 20}
    used = {
        "repetition_penalty": 1.05,
        "temperature": 0.1,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.1,
        "min_new_tokens": 2,
    }
    found = read(tmp_path, {**real, **neutral, **used, "stop_strings": "END", "_from_model_config": True})
    assert found.settings == used | {"stop": ["END"]} and found.notes == ()
    assert settle(None, json.loads(json.dumps(found.settings))).stop == ("END",)


NOT_USED = {
    "num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "suppress_tokens": [7],
    "begin_suppress_tokens": [7], "forced_eos_token_id": 2, "sequence_bias": [[[3], 1.0]], "min_length": 9,
    "max_length": 4096, "max_new_tokens": 40, "typical_p": 0.9, "eta_cutoff": 0.1, "penalty_alpha": 0.6,
    "guidance_scale": 1.5, "encoder_repetition_penalty": 1.2, "exponential_decay_length_penalty": [15, 1.6],
    "max_time": 3.0, "repetition_penality": 1.3, "watermarking_config": {"bias": 2.0}, "diversity_penalty": 0.5,
}  # fmt: skip


def test_every_setting_that_would_change_answers_and_is_not_used_is_named(tmp_path):
    found = read(tmp_path, NOT_USED)
    assert found.settings == {} and len(found.notes) == len(NOT_USED)
    for name, note in zip(NOT_USED, found.notes, strict=True):
        assert note.startswith(f"generation_config.json: {name} ") and "not used" in note


def test_every_setting_of_the_installed_transformers_is_known_by_name(tmp_path):
    """A new one would be called unknown; this says so first."""
    from transformers import GenerationConfig

    names = {n for n in GenerationConfig().to_dict() if not n.startswith("_")}
    notes = read(tmp_path, dict.fromkeys(names, "?") | dict.fromkeys(generation._GREEDY)).notes
    assert [note for note in notes if "no setting that is known" in note] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", v) for v in (0, -1.0, "1.05", True, [1.05])]
    + [("min_new_tokens", v) for v in (-1, 2.5, "3")]
    + [("stop_strings", v) for v in (3, [3], [""], {"a": 1})],
)
def test_a_setting_of_another_kind_that_greedy_answers_follow_is_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=name):
        read(tmp_path, {name: value})


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_k", -1), ("top_p", 7), ("min_p", [1])])
def test_a_sampling_setting_of_another_kind_is_named_and_not_used(tmp_path, name, value):
    found = read(tmp_path, {name: value})
    assert found.settings == {} and name in found.notes[0] and "not used" in found.notes[0]


def test_without_the_file_settings_in_config_json_count_as_in_transformers(tmp_path):
    path = random_checkpoint(random_text_config("llama", 3), tmp_path / "c", 3)
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text()) | {"repetition_penalty": 1.3, "num_beams": 2}
    (path / "config.json").write_text(json.dumps(config))
    found, stock = generation.read(path, config), hf.load(path, families.find("llama")).generation_config
    assert found.settings["repetition_penalty"] == stock.repetition_penalty == 1.3 and stock.num_beams == 2
    assert found.notes == ("config.json: num_beams = 2 is not used",)
    nested = {"text_config": {"repetition_penalty": 1.2, "top_k": 3}, "top_k": 4}
    assert generation.read(tmp_path, nested).settings == {"repetition_penalty": 1.2, "top_k": 4}


# ---------------------------------------------------------------- a bundle

SHIPPED = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.001,
    "repetition_penalty": 1.3,
    "num_beams": 3,
}


@pytest.fixture(scope="module")
def penalised(demo_bundle, tmp_path_factory):
    """(checkpoint, bundle, what build printed): the demo with settings as Qwen2-VL ships them."""
    folder = tmp_path_factory.mktemp("penalised")
    path = shutil.copytree(DEMO, folder / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    eos = config["text_config"]["eos_token_id"]
    (path / "generation_config.json").write_text(json.dumps(SHIPPED | {"eos_token_id": [eos, 1]}))
    take_stages(demo_bundle, folder / "p.plan")  # the same network, traced already
    done = here("build", "--recipe", "demo", "--model", path, "--out", folder / "p.plan", "--token-cache", "index")
    assert done.returncode == 0, done.stderr
    return path, folder / "p.plan", done.stdout


QUESTION = "what ?"  # of which the demo is unsure, so that a penalty changes its answer


def run(bundle, *more, question=QUESTION):
    done = here("run", bundle, "--image", PICTURE, "--prompt", question, *more)
    assert done.returncode == 0, done.stderr
    return done


def test_build_names_what_is_not_used_and_run_answers_as_generate_does(penalised):
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    path, bundle, said = penalised
    assert "note: generation_config.json: num_beams = 3 is not used" in said and "do_sample" in said
    answer = json.loads(run(bundle, "--dense", "--json", "--max-new-tokens", "16").stdout)
    assert answer["sampling"]["rule"] == "greedy" and answer["sampling"]["repetition_penalty"] == 1.3
    model = load(bundle, threads=1)
    picture = model.tower.picture(Image.open(PICTURE).convert("RGB"), model.picture_rule)
    ids = torch.from_numpy(model.chat.encode(QUESTION, None, [picture.layout]))[None]
    grid = {"image_grid_thw": torch.tensor([[1, *(model.tower.merge * g for g in picture.grid[1:])]])}
    kinds = (ids == model.bundle.shape.image_token).int()
    stock = AutoModelForImageTextToText.from_pretrained(path)
    given = {"pixel_values": torch.from_numpy(picture.pixels), **grid, "mm_token_type_ids": kinds}
    given |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16}
    out = stock.generate(ids, do_sample=False, num_beams=1, **given)[0, ids.shape[1] :].tolist()
    expected = out[:-1] if out[-1] in model.chat.stop_ids else out
    assert answer["token_ids"] == expected
    plain = model.generate(QUESTION, [open_image(PICTURE)], sampling=Sampling(repetition_penalty=1.0), dense=True)
    assert plain.token_ids[:16] != expected, "the penalty must matter for this test to say anything"


def test_run_draws_where_it_is_asked_to_and_says_how_to_repeat_it(penalised):
    _, bundle, _ = penalised
    hot = ("--temperature", "3", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "12")
    one, other = (json.loads(run(bundle, *hot, "--json").stdout) for _ in range(2))
    assert one["sampling"]["seed"] != other["sampling"]["seed"]
    assert one["token_ids"] != other["token_ids"] or one["token_ids"] == []  # both may draw their end at once
    drawn = Sampling(temperature=3.0, top_k=0, top_p=1.0)
    model = load(bundle, threads=1)
    picture = [open_image(PICTURE)]
    rules = [replace(drawn, seed=i) for i in range(6)]
    answers = {model.generate(QUESTION, picture, max_new_tokens=4, sampling=rule).text for rule in rules}
    assert len(answers) > 1
    again = run(bundle, *hot, "--seed", one["sampling"]["seed"])
    assert again.stdout.rstrip("\n") == one["text"]
    assert f"--seed {one['sampling']['seed']}" in again.stderr and "temperature 3" in again.stderr
    cold = json.loads(run(bundle, "--sample", "--json").stdout)
    assert cold["sampling"]["temperature"] == 0.01 and cold["sampling"]["top_k"] == 1
    assert cold["token_ids"] == json.loads(run(bundle, "--json").stdout)["token_ids"], "top-k 1 is greedy"


def test_stop_strings_the_limit_and_their_reasons(penalised):
    _, bundle, _ = penalised
    plain = json.loads(run(bundle, "--json").stdout)
    word = plain["text"].split()[2]
    cut = json.loads(run(bundle, "--json", "--stop", word).stdout)
    assert cut["text"] == plain["text"].split(word)[0] and cut["stopped"] == "stop string"
    assert cut["token_ids"] == plain["token_ids"][: len(cut["token_ids"])]
    shown = run(bundle, "--stop", word)
    assert shown.stdout == cut["text"] + "\n"
    short = run(bundle, "--max-new-tokens", "2")
    assert "cut at 2 tokens (--max-new-tokens)" in short.stderr and "cut" not in run(bundle).stderr
    long = json.loads(run(bundle, "--min-new-tokens", "40", "--max-new-tokens", "50", "--json").stdout)
    assert 40 <= long["new_tokens"] <= 50 and plain["new_tokens"] < 40


def test_the_guard_gives_the_dense_answer_under_a_penalty_and_the_dense_draws_of_the_same_seed(penalised):
    model, different = load(penalised[1], threads=1), 0
    picture = [open_image(PICTURE)]
    budget = {"neuron_share": 0.1, "token_share": 0.11}
    rules = [None, Sampling(repetition_penalty=1.1), Sampling(min_new_tokens=25, stop="zzz")]
    rules += [Sampling(temperature=t, top_k=k, top_p=1, seed=s) for t, k, s in ((0.7, 5, 1), (1.5, 0, 2), (2.5, 0, 3))]
    for rule in rules:
        dense, sparse, guarded = (
            model.generate(QUESTION, picture, max_new_tokens=30, sampling=rule, **how)
            for how in ({"dense": True}, budget, budget | {"guard": 4})
        )
        assert (guarded.token_ids, guarded.text) == (dense.token_ids, dense.text), rule
        assert guarded.stats["stopped"] == dense.stats["stopped"]
        different += sparse.token_ids != dense.token_ids
    assert different >= 3, "this budget must break answers for this test to say anything"


def test_questions_after_the_first_are_penalised_for_all_that_was_said(penalised):
    """As `generate` would be over the whole conversation."""
    model = load(penalised[1], threads=1)
    talk = model.conversation([open_image(PICTURE)], dense=True)
    first = talk.ask(QUESTION, max_new_tokens=8)
    second = talk.ask("what color is the shape?", max_new_tokens=8)
    ids = model.chat.encode_turns([QUESTION, "what color is the shape?"], [first.text], None, talk._pictures.layouts)
    request = model.request(ids, talk._pictures)
    prefilled = model.prefill(request, Budget(dense=True))
    row = model.answering(prefilled, model.rule(), 8)
    list(decode(model.backend, [row]))
    assert second.token_ids == row.ids and np.array_equal(request.ids, ids)


def test_eval_says_which_rule_it_uses_and_counts_answers_under_it(penalised, tmp_path):
    data = tmp_path / "q.jsonl"
    model = load(penalised[1], threads=1)
    right = model.generate(QUESTION, [open_image(PICTURE)], dense=True).text
    data.write_text(json.dumps({"image": str(PICTURE), "question": QUESTION, "answer": right}) + "\n")
    done = here("eval", penalised[1], "--data", data, "--json", "--neuron-share", "1", "--token-share", "1")
    report = json.loads(done.stdout)
    assert report["decoding"]["repetition_penalty"] == 1.3 and report["dense"]["accuracy"] == 1.0
    assert any("greedy, repetition penalty 1.3" in note for note in report["notes"])
    assert report["dense"]["top1"] == 1.0 and report["dense"]["kl"] < 1e-6, "both sides compare the same logits"


def test_a_bundle_of_before_has_no_penalty(penalised, tmp_path):
    """Its manifest has no such field."""
    from cm_export.bundle import bundle as bundles

    old = shutil.copytree(penalised[1], tmp_path / "old.plan")
    manifest = bundles.read_manifest(old)
    for name in ("generation", "notes", "files", "format"):
        del manifest[name]
    (old / bundles.MANIFEST).unlink()
    bundles.write_manifest(old, manifest)
    assert load(old, threads=1).rule() == settle(None, {})


def test_sampling_imports_no_torch():
    code = "import sys, cm_export.host.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
