"""TensorRT sessions: engines of every version answer as ONNX Runtime does, and what cannot run is refused in words.

The library is fake_tensorrt, which computes with ONNX Runtime on the addresses that it is given; the CUDA runtime is
fake_cuda, whose memory is full of nan and whose work runs when somebody waits. So what is proven is everything on our side.
"""

import functools
import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import wide
from fake_engines import ROWS, machine, policies_in_memory, reseal
from PIL import Image
from test_core_set import made_up
from tolerances import agrees

from cm_export.backends.tensorrt import cuda as _cuda
from cm_export.backends.tensorrt import decode as decoding
from cm_export.backends.tensorrt.session import Session
from cm_export.base.errors import BundleError, CmExportError, InputError
from cm_export.base.install import pip_install
from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.evals import bench
from cm_export.evals import compare as _compare
from cm_export.evals import task as _task
from cm_export.families import Pictures
from cm_export.host.core_rows import CoreRows
from cm_export.host.decode import teacher_forced
from cm_export.host.images import open_image
from cm_export.host.loaded import LoadedBundle, load
from cm_export.host.runner import Budget
from cm_export.recipe import aliases

IMAGES = sorted((aliases.DEMO.parent / "images").glob("*.png"))
QUESTION = "describe : what shape is in the image?"
VERSIONS = ("10.3.0", "10.14.1", "10.16.1.11", "11.4.0.106", "rtx-1.7.1")
SOME = ("10.3.0", "10.16.1.11", "rtx-1.7.1")  # copied cache, cache in place, gathered rows
MOST = 4
FP32 = {"engine__max_batch": MOST, "engine__precision": "fp32"}  # one set of engines for several files


def engines_of(at) -> LoadedBundle:
    return load(at.bundle, threads=1)


def on_cpu(at) -> LoadedBundle:
    """What to compare with: the bundle that the engines were made of, loaded once for all of them."""
    return _on_cpu(at.made_of)


@functools.cache
def _on_cpu(bundle: Path) -> LoadedBundle:
    return load(bundle, threads=1, backend="onnxruntime")


def answer_on_cpu(at, picture: int = 0, **budget):
    """Its answer to QUESTION about one of IMAGES, asked for once."""
    return _answer_on_cpu(at.made_of, picture, *budget.items())


@functools.cache
def _answer_on_cpu(bundle: Path, picture: int, *budget):
    return ask(_on_cpu(bundle), [IMAGES[picture]], **dict(budget))


def ask(engine, images=IMAGES[:1], **budget):
    return engine.generate(QUESTION, [open_image(p) for p in images], max_new_tokens=20, **budget)


def prefilled_of(model, images=IMAGES[:1], question=QUESTION, **budget):
    pictures = model.see([open_image(p) for p in images])
    return model.prefill(model.ask(question, pictures), Budget(**budget))


def logits_of(model, tokens, images=IMAGES[:1], **budget):
    """Of the prefill and of steps that read `tokens`: [1 + T, V]; and the prefill."""
    prefilled = prefilled_of(model, images, **budget)
    return teacher_forced(model.backend, prefilled.row(), tokens), prefilled


# ---------------------------------------------------------------------------------------------------- same answers
@pytest.mark.parametrize(
    ("version", "cache", "precision"),
    [
        *((v, "cut", "fp16") if v in SOME else wide(v, "cut", "fp16") for v in VERSIONS),
        ("10.16.1.11", "index", "fp16"),
        *(wide(version, "index", "fp16") for version in ("10.3.0", "rtx-1.7.1")),
        ("10.3.0", "cut", "int4"),
        wide("10.16.1.11", "cut", "int8"),
        wide("rtx-1.7.1", "cut", "int4"),
    ],
)
def test_engines_of_every_version_answer_as_onnx_runtime_does(sit, version, cache, precision):
    at = sit(version, cache, **({"engine__precision": precision} if precision != "fp16" else {}))
    ours = engines_of(at)
    small = {"neuron_share": 0.3, "token_share": 0.2}
    for picture, budget in zip((0, 0, 1, 1), ({"dense": True}, {}, {}, small), strict=True):
        a, b = ask(ours, [IMAGES[picture]], **budget), answer_on_cpu(at, picture, **budget)
        assert a.token_ids == b.token_ids and len(a.token_ids) > 5
        assert [k.tolist() for k in a.kept] == [k.tolist() for k in b.kept]
        assert a.stats["neurons_kept"] == b.stats["neurons_kept"] and a.notes == []
    assert ours.backend.name == at.backend and on_cpu(at).backend.name == "onnxruntime"


WITHOUT_DENSE = {"engine__dense": False}
RECIPES = {
    "own": {},
    "fill": WITHOUT_DENSE | {"neurons__fill": "prompt"},
    "knee": WITHOUT_DENSE | {"tokens__budget": "knee", "tokens__min_share": 0.2, "tokens__max_share": 0.9},
    "first cut": WITHOUT_DENSE | {"tokens__first": "spread", "tokens__first_share": 0.6, "tokens__share": 0.3},
    "each picture": WITHOUT_DENSE | {"tokens__quota": "each"},
    "layers differ": WITHOUT_DENSE | {"neurons__layers": "calibrated", "calibration": "made up"},
    "no tokens cut": WITHOUT_DENSE | {"tokens__policy": "dense"},
}


@pytest.mark.parametrize(
    ("version", "name"),
    [
        *((version, "own") for version in SOME),
        ("10.3.0", "fill"),
        ("10.16.1.11", "knee"),
        wide("10.3.0", "first cut"),
        wide("10.16.1.11", "each picture"),
        ("10.3.0", "layers differ"),
        wide("rtx-1.7.1", "layers differ"),
        ("rtx-1.7.1", "no tokens cut"),
    ],
)
def test_in_float32_every_logit_is_onnx_runtimes(sit, demo_bundle, version, name):
    recipe, bundle = RECIPES[name], Bundle(demo_bundle)
    calibration = made_up(sizes_of(bundle)) if "calibration" in recipe else None
    at = sit(version, "cut", calibration, **FP32, **recipe)
    ours = engines_of(at)
    ours.bundle.__dict__["calibration"] = calibration
    theirs = policies_in_memory(bundle, bundle.recipe.replace(**recipe), calibration)
    pictures, tokens = IMAGES[: 1 + (name == "each picture")], [11, 12, 5, 7]
    (a, p), (b, q) = (logits_of(e, tokens, pictures) for e in (ours, theirs))
    assert p.kept_tokens.tolist() == q.kept_tokens.tolist() and (p.core_neurons == q.core_neurons).all()
    agrees("export", a, b)
    if name == "layers differ":
        assert len(set(p.core_set.counts.tolist())) > 1
    if name == "knee":
        assert len(p._kept_mask) > p.kept_tokens.shape[1], "the graph must have padded for this to say anything"


def sizes_of(bundle):
    return type("Model", (), {"shape": bundle.shape, "weights": bundle.weights})


@pytest.mark.parametrize("version", ["10.3.0", wide("rtx-1.7.1")])
def test_a_long_answer_passes_the_borders_of_the_list_and_ends_where_the_cache_does(sit, version):
    """The list of rows grows past 128, where its padded length changes; then no row is left."""
    at = sit(version, "index", **FP32)
    tokens = np.random.default_rng(0).integers(5, 30, ROWS).tolist()
    model = engines_of(at)
    p = prefilled_of(model, neuron_share=0.5)
    row, read = p.row(), decoding.BUCKET + 6 - p.kept_tokens.shape[1]
    a = teacher_forced(model.backend, row, tokens[:read])
    b, _ = logits_of(on_cpu(at), tokens[:read], neuron_share=0.5)
    agrees("long answer", a, b)
    assert p.kept_tokens.shape[1] < decoding.BUCKET
    for token in tokens[: ROWS - 1 - row.cache.lengths[row.place]]:
        model.read([row], [[token]])
    with pytest.raises(InputError, match=f"the cache of these engines has {ROWS - 1}"):
        model.read([row], [tokens[:1]])


def test_listed_rows_are_padded_with_a_row_that_is_never_valid():
    mask = np.zeros((1, 300), np.int64)
    mask[:, :130] = 1
    np.testing.assert_array_equal(decoding.listed_rows(None, mask)[0], [*range(130), *[299] * 126])
    short = decoding.listed_rows([np.array([2, 5], np.int32)], mask)
    np.testing.assert_array_equal(short[0], [2, 5, *[299] * 126])
    assert decoding.listed_rows([np.arange(290, dtype=np.int32)], mask).shape == (1, 300)


# ---------------------------------------------------------------------------------------------------- the device
def test_a_second_request_takes_no_new_memory_and_steps_copy_only_what_is_new(sit):
    at = sit("10.16.1.11")
    engine = engines_of(at)
    first = ask(engine)
    left, at.cuda._log[:] = at.cuda._left, []
    assert ask(engine).token_ids == first.token_ids
    assert at.cuda._left == left and "cudaMalloc" not in at.cuda._log
    steps = at.cuda._log[at.cuda._log.index("cudaGraphLaunch") :]
    assert steps[:5] == ["cudaGraphLaunch", "copy up", "engine", "copy down", "wait"]
    assert steps == steps[:5] * (len(steps) // 5), "one launch and two copies a step, no other wait"


def test_decode_replays_a_graph_for_each_side_of_the_cache(sit):
    """Copied: two graphs, whose sides change places. In place: one. Each is recorded at the second run of its kind."""
    for version, graphs in (("10.3.0", 2), ("10.16.1.11", 1)):
        at = sit(version, **FP32)
        at.cuda._log[:] = []
        steps = 9
        logits_of(engines_of(at), list(range(5, 5 + steps)))
        assert at.cuda._log.count("cudaStreamBeginCapture") == graphs
        assert at.cuda._log.count("cudaGraphLaunch") == steps - graphs


def test_a_model_that_nobody_holds_any_more_leaves_neither_graphs_nor_memory_on_the_device(sit):
    at = sit("10.3.0", **FP32)
    gc.collect()
    assert at.cuda._graphs == at.cuda._device == {}
    model = engines_of(at)
    ask(model)
    assert at.cuda._graphs and at.cuda._device
    del model
    gc.collect()
    assert at.cuda._graphs == at.cuda._device == at.cuda._pinned == {}


def test_without_graphs_the_answer_is_the_same_and_the_user_is_told(sit):
    at = sit("10.3.0")
    expected = ask(engines_of(at)).token_ids
    at.cuda._fail["cudaStreamEndCapture"] = 900
    try:
        found = ask(engines_of(at))
    finally:
        at.cuda._fail.clear()
    assert found.token_ids == expected
    assert len(found.notes) == 1 and "decode runs without a CUDA graph" in found.notes[0]


@pytest.mark.parametrize("version", SOME)
def test_an_older_request_goes_on_beside_a_newer_one(sit, version):
    """Each has its own rows: step by step in turn they give what each gives alone."""
    at = sit(version, **FP32)
    tokens, model = [11, 12, 5, 7], engines_of(at)
    alone = [logits_of(model, tokens, images)[0] for images in (IMAGES[:1], IMAGES[1:3])]
    old = prefilled_of(model).row()
    model.read([old], [tokens[:1]])
    new = prefilled_of(model, IMAGES[1:3]).row()
    found = [[old.last], [new.last]]
    model.read([new], [tokens[:1]])
    found[1].append(new.last)
    for token in tokens[1:]:
        for logits, row in zip(found, (old, new), strict=True):
            model.read([row], [[token]])
            logits.append(row.last)
    agrees("export", np.stack(found[0]), alone[0][1:])
    agrees("export", np.stack(found[1]), alone[1])


def skip_a_wait(patch):
    """Of a step, after its logits were asked for."""
    real = decoding.Decoder.read

    def read(self, tokens, cache):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(_cuda.Cuda, "wait", lambda self: None)
            return real(self, tokens, cache)

    patch.setattr(decoding.Decoder, "read", read)


def fill_nothing(patch):
    patch.setattr(_cuda.Cuda, "copy_rows", lambda *args: None)


def clear_nothing(patch):
    patch.setattr(_cuda.Cuda, "clear", lambda *args: None)


def one_side_only(patch):
    real = Session.bind
    patch.setattr(Session, "bind", lambda s, n, a: real(s, n, s._addresses.get(n.replace("present", "past"), a)))


def _changed(name, change):
    real = decoding.Decoder._changing

    def plant(patch):
        def changing(self, *args):
            out = real(self, *args)
            return out | {name: change(out[name])}

        patch.setattr(decoding.Decoder, "_changing", changing)

    return plant


def another_layers_neurons(patch):
    real = decoding.core_inputs

    def turned(backend, session, cores):
        out = real(backend, session, cores)
        return {n: v[::-1] if n == "core_neurons" else v for n, v in out.items()}

    patch.setattr(decoding, "core_inputs", turned)


FAULTS = {
    "a wait is missing": skip_a_wait,
    "the prompt's rows stay behind": fill_nothing,
    "unwritten rows hold nan": clear_nothing,
    "present lies over past": one_side_only,
    "a row too far": _changed("write_index", lambda rows: rows + 1),
    "the mask lacks the new row": _changed("attention_mask", lambda m: np.roll(m, -1)),
    "another layer's neurons": another_layers_neurons,
    "the wrong position": _changed("position_ids", lambda p: p + 1),
}


@functools.cache
def _logits_on_cpu(bundle: Path, *tokens: int):
    return logits_of(_on_cpu(bundle), tokens, neuron_share=0.3)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(sit, monkeypatch, fault):
    """The tests above can fail: with one of these in our code they would."""
    at = sit("10.3.0", **FP32)
    tokens = [11, 12, 5, 7]
    expected = _logits_on_cpu(at.made_of, *tokens)
    FAULTS[fault](monkeypatch)
    engine = engines_of(at)
    try:
        found, _ = logits_of(engine, tokens, neuron_share=0.3)
    except (CmExportError, ValueError):
        return
    finally:
        at.cuda._queues.clear()  # what nobody waited for must not run into memory that is gone
    with pytest.raises(AssertionError):
        agrees("export", found, expected)


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "10.3.1"}, "built for version 10.3.1, this machine has 10.3.0"),
        ({"architecture": "sm_87"}, "built for architecture sm_87, this machine has sm_86"),
        ({"backend": "tensorrt-rtx"}, "holds no engines of tensorrt, only of tensorrt-rtx"),
        ({"plugins": {"name": "libcm_plugins.so", "sha256": "0"}}, "not the library that its engines were built with"),
        ({"plugins": {"name": "other.so", "sha256": "0"}}, "its engines/other.so is not the library"),
    ],
)
def test_engines_of_elsewhere_are_refused_and_what_differs_is_named(sit, tmp_path, change, said):
    at = sit("10.3.0")
    bundle = tmp_path / "copy.plan"
    shutil.copytree(at.bundle, bundle, copy_function=os.link)
    reseal(bundle, **change)
    with pytest.raises(BundleError, match=said) as error:
        load(bundle, threads=1)
    assert "cm-export build" in str(error.value) and "\n" not in str(error.value)


def test_the_graphs_of_engines_of_elsewhere_run_anywhere(sit, tmp_path):
    bundle = copied(sit("10.3.0").bundle, tmp_path)
    reseal(bundle, version="10.3.1", architecture="sm_87")
    assert ask(load(bundle, threads=1, backend="onnxruntime")).token_ids


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy.plan"))


def test_a_bundle_without_engines_says_how_to_make_them(sit, demo_bundle):
    sit("10.3.0")
    with pytest.raises(BundleError, match=r"holds no engines of tensorrt; cm-export build \.\.\. --backend tensorrt"):
        load(demo_bundle, threads=1, backend="tensorrt")


@pytest.mark.parametrize("missing", ["tensorrt", "cuda.bindings.runtime"])
def test_without_the_libraries_the_packages_to_install_are_named(sit, monkeypatch, missing):
    at = sit("10.3.0")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=re.escape(pip_install("tensorrt"))):
        load(at.bundle, threads=1)


def test_without_a_gpu_cudas_own_words_are_told(sit):
    at = sit("10.3.0")
    at.cuda._fail["cudaGetDevice"] = 2
    try:
        with pytest.raises(CmExportError, match="CUDA: cudaGetDevice: the fake says cudaErrorMemoryAllocation"):
            load(at.bundle, threads=1)
    finally:
        at.cuda._fail.clear()


def test_what_needs_an_engine_that_was_not_built_is_refused(sit):
    engine = engines_of(sit("10.3.0", "index", engine__dense=False, engine__turns=False))
    with pytest.raises(InputError, match=r"the guard needs an engine of decode_dense.*--backend onnxruntime"):
        ask(engine, guard=4)
    with pytest.raises(InputError, match="a second question needs an engine of turn"):
        engine.conversation([])


def talked(model):
    """What it says in three turns about a picture."""
    talk = model.conversation([open_image(IMAGES[0])])
    return [talk.ask(text, max_new_tokens=9).token_ids for text in (QUESTION, "is there a circle?", "describe")]


@functools.cache
def talked_on_cpu(bundle: Path):
    return talked(_on_cpu(bundle))


@pytest.mark.parametrize("version", [*SOME[:2], wide(SOME[2])])
def test_the_guard_and_later_questions_answer_as_on_onnx_runtime(sit, version):
    at = sit(version, "index", **FP32)
    ours = engines_of(at)
    found, expected = ask(ours, guard=4), answer_on_cpu(at, guard=4)
    assert found.token_ids == expected.token_ids == ask(ours, dense=True).token_ids
    assert found.stats["guard"]["checks"] > 0, "several tokens were read at once"
    assert talked(ours) == talked_on_cpu(at.made_of)


@pytest.mark.parametrize("version", [*SOME[:2], wide(SOME[2])])
def test_tokens_read_together_have_the_logits_of_tokens_read_one_by_one(sit, version):
    model = engines_of(sit(version, "index", **FP32))
    tokens = list(range(5, 5 + 40))  # more than an engine takes at once
    prefilled = prefilled_of(model, dense=True)
    one, several = prefilled.row(), prefilled.row()
    for token in tokens:
        model.read([one], [[token]])
    model.read([several], [tokens])
    assert several.logits.shape[0] == len(tokens)
    agrees("long answer", several.last, one.last)


def test_a_prompt_beyond_the_profile_is_refused_and_the_limit_named(sit):
    engine = engines_of(sit("10.3.0"))
    request = engine.request(np.full(200, 7), Pictures())
    with pytest.raises(InputError, match=r"prefill engine: \w+: \[.*200.*\] is outside .* to .*192"):
        engine.prefill(request, Budget())
    with pytest.raises(InputError, match="need 301 rows, the cache of these engines has 255"):
        engine.prefill(engine.request(np.full(300, 7), Pictures()), Budget())


def test_a_picture_beyond_the_profile_is_refused_with_the_size_that_would_do(sit):
    engine = engines_of(sit("10.3.0"))
    large = Image.effect_noise((128, 128), 50)
    assert len(engine.see([large]).layouts) == 1
    engine.bundle.__dict__["recipe"] = engine.bundle.recipe.replace(engine__max_patches=512)
    with pytest.raises(InputError, match=r"1024 patches, the vision engine reads up to 512; shrink it to 70% of its"):
        engine.see([large])


@pytest.mark.parametrize("name", ["decode.plan", "libcm_plugins.so"])
def test_an_edited_engine_is_refused_before_the_library_reads_it(sit, tmp_path, name):
    at = sit("10.3.0")
    bundle = copied(at.bundle, tmp_path)
    file = bundle / "engines" / name
    file.write_bytes(file.read_bytes()[::-1])
    before = set(at.trt._calls)
    at.trt._calls.clear()
    with pytest.raises(BundleError, match=rf"{name}: its contents do not match the manifest"):
        ask(load(bundle, threads=1))
    asked = {n for _, n, *_ in at.trt._calls}
    at.trt._calls.update(before)
    assert "deserialize_cuda_engine" not in asked and (name == "decode.plan" or "load_library" not in asked)


def test_a_plan_that_the_library_cannot_read_is_named_with_what_it_said(sit, tmp_path):
    at = sit("10.3.0")
    bundle = copied(at.bundle, tmp_path)
    (bundle / "engines" / "decode.plan").write_bytes(b"something else")
    reseal(bundle)
    with pytest.raises(BundleError, match=r"decode.plan: .*cannot read this engine \(.*Serialization assertion failed"):
        ask(load(bundle, threads=1))


def test_where_dense_engines_were_left_out_it_is_said(sit):
    engine = engines_of(sit("10.3.0", "index", engine__dense=False, engine__turns=False))
    assert ask(engine).token_ids
    with pytest.raises(BundleError, match="has no tensorrt engine of prefill_dense"):
        ask(engine, dense=True)


# ---------------------------------------------------------------------------------------------------- the verbs
def test_run_takes_the_bundles_own_backend_or_the_one_that_is_asked_for(sit, capsys):
    at = sit("rtx-1.7.1")
    command = ["run", str(at.bundle), "--image", str(IMAGES[0]), "--prompt", QUESTION, "--json", "--threads", "1"]
    launched = len(at.cuda._log)
    assert main([*command, "--backend", "onnxruntime"]) == 0 and len(at.cuda._log) == launched
    assert main(command) == main([*command, "--backend", "tensorrt-rtx"]) == 0 and len(at.cuda._log) > launched
    found = [json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\n\0{").split("\0")]
    assert len(found) == 3 and found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
    assert main([*command, "--backend", "tensort"]) == 2 and "did you mean 'tensorrt'?" in capsys.readouterr().err


def test_bench_times_engines_and_says_on_what(sit):
    at = sit("10.16.1.11")
    report = bench.measure(at.bundle, prompt_tokens=9, image_tokens=64, new_tokens=3, repeats=1, threads=1, vision=True)
    assert report["backend"] == "tensorrt" and report["environment"]["gpu"] == "Fake GPU"
    assert (report["environment"]["architecture"], report["environment"]["tensorrt"]) == ("sm_86", "10.16.1.11")
    assert {r["phase"] for r in report["rows"]} == {"vision", "prefill", "gather", "decode"}


def test_eval_runs_the_recipe_on_engines_and_says_which_controls_did_not(sit):
    at = sit("10.3.0")
    task = _task.load("easy-vqa".replace("-", "_"), ("sentence",), 2, 0)
    sweep = _compare.Sweep(neuron_shares=(0.6,))
    ours = _compare.compare(at.bundle, task, sweep, threads=1)
    theirs = _compare.compare(at.bundle, task, sweep, threads=1, backend="onnxruntime")
    for name in ("dense", "sparse", "random"):
        assert ours[name]["right"] == theirs[name]["right"]
        assert ours[name]["kl"] == pytest.approx(theirs[name]["kl"], abs=0.02)
    assert ours["backend"] == "tensorrt" and theirs["backend"] == "onnxruntime"
    told = [n for n in ours["notes"] if "ran on ONNX Runtime" in n]
    assert len(told) == 1 and "random" in told[0] and not any("ran on" in n for n in theirs["notes"])


def test_the_rows_of_an_engine_are_its_own_business(sit, monkeypatch):
    """With a plugin nothing is gathered on the host; without one, rows go up once per request."""
    gathered, real = [], CoreRows.gather
    monkeypatch.setattr(CoreRows, "gather", lambda self, cores: gathered.append(len(cores)) or real(self, cores))
    assert len(ask(engines_of(sit("10.3.0"))).token_ids) > 5 and gathered == []
    assert len(ask(engines_of(sit("rtx-1.7.1"))).token_ids) > 5 and gathered == [1]


def test_a_machine_is_what_the_versions_table_says():
    """The fake has what a version has, and only that."""
    old, new, rtx = (machine(v).trt for v in ("10.3.0", "11.4.0", "rtx-1.7.1"))
    assert old.BuilderFlag.FP16.name and old.NetworkDefinitionCreationFlag.EXPLICIT_BATCH.name
    for name in ("FP16", "BF16"):
        with pytest.raises(AttributeError):
            getattr(new.BuilderFlag, name)
    with pytest.raises(AttributeError):
        old.Builder(old.Logger()).create_builder_config().num_compute_capabilities = 1
    rtx.Builder(rtx.Logger()).create_builder_config().num_compute_capabilities = 1
