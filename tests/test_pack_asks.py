"""A packed archive answers: packed, unpacked, built on a fake device, and asked by the host loop that it carries.

The device is that of fake_jetson.py with a workshop: trtexec writes plans of fake_tensorrt, and its Python runs them. So what
is proven is everything on our side, from the archive's files to the text; no engine of a real device has been asked.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import conftest
import pytest
import shared
from conftest import wide
from fake_jetson import Jetson
from fake_workshop import Workshop
from old_pythons import find_python310

from cm_export.bundle.bundle import Bundle
from cm_export.cli import main
from cm_export.deploy.jetson import carried
from cm_export.deploy.jetson import devices as jetson
from cm_export.host.loaded import load
from cm_export.recipe.aliases import DEMO

ROOT = Path(__file__).parent.parent
PICTURES = sorted((DEMO.parent / "images").glob("*.png"))
QUESTION = "describe : what shape is in the image?"
DEVICES = {"6.2": "jetson-orin-nano", "7.1": "jetson-thor", "7.2": "jetson-orin"}
SUMS = "SHA256SUMS"


@pytest.fixture(scope="session")
def workshop():
    with Workshop() as shop:
        yield shop


@pytest.fixture(scope="session")
def packed_demo(demo_bundle, tmp_path_factory):
    """JetPack, precision -> the archive of the demo model, unpacked; packed once."""
    made = {}

    def one(folder: Path, jetpack: str, precision: str = "fp16", bundle: Path = demo_bundle) -> Path:
        key = jetpack, precision, bundle
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "demo.tar.gz"
            options = ["--target", DEVICES[jetpack], "--jetpack", jetpack, "--precision", precision, "-q"]
            assert main(["pack", str(bundle), *options, "--capacity", "256", "--out", str(made[key])]) == 0
        with tarfile.open(made[key]) as tar:
            tar.extractall(folder, filter="data")
        return folder / "demo"

    return one


@pytest.fixture(scope="session")
def built(packed_demo, workshop, tmp_path_factory):
    """JetPack, Python, precision, bundle -> (unpacked archive whose engines are built, its device), made once."""
    made = {}

    def one(jetpack: str, python: str = sys.executable, **how) -> tuple[Path, Jetson]:
        key = jetpack, python, *how.items()
        if key not in made:
            folder = tmp_path_factory.mktemp("device")
            archive = packed_demo(folder, jetpack, **how)
            device = Jetson(folder, jetpack, available_gb=60, workshop=workshop, python=python)
            done = device.run(archive, "--no-bench")
            assert done.returncode == 0, done.stderr
            made[key] = archive, device
        return made[key]

    return one


@pytest.fixture
def copied(built, tmp_path):
    """The same for JetPack 7.2, to be damaged."""
    archive, device = built("7.2")
    shutil.copytree(archive, tmp_path / "demo")
    return tmp_path / "demo", Jetson(tmp_path, "7.2", available_gb=60, workshop=device.workshop)


def as_json(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert (done.returncode, len(told)) == (code, 1) and "bug" not in told[0], done.stderr
    for word in words:
        assert word in told[0], told[0]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("jetpack", ["6.2", wide("7.1"), "7.2"])
def test_the_device_answers_as_the_bundle_does_on_its_own_graphs(built, demo_bundle, jetpack, request):
    """Tokens kept and cut, neurons chosen, text: of JetPack 6 in Python 3.10, without ONNX and ONNX Runtime."""
    python = sys.executable
    if jetpack == "6.2" and find_python310():
        python = request.getfixturevalue("python310")
    archive, device = built(jetpack, python)
    model = load(demo_bundle, threads=1)
    budgets = [{}, {"token_share": 0.25, "neuron_share": 0.3}] if jetpack == "6.2" else [{}]
    for picture, budget in zip(PICTURES, budgets, strict=False):
        theirs = model.generate(QUESTION, [picture], max_new_tokens=20, **budget)
        options = [word for name, share in budget.items() for word in (f"--{name.replace('_', '-')}", share)]
        asked = ("--image", picture, "--prompt", QUESTION, "--max-new-tokens", 20, "--json", *options)
        ours = as_json(device.ask(archive, *asked))
        assert ours["token_ids"] == theirs.token_ids and len(ours["token_ids"]) > 5
        assert ours["text"] == theirs.text and ours["notes"] == []
        assert theirs.stats["image_tokens_kept"] < theirs.stats["image_tokens"]
        assert theirs.stats["neurons_kept"] < theirs.stats["neurons"]
        for same in ("image_tokens_kept", "kept_tokens", "neurons_kept", "prompt_tokens", "stopped"):
            assert ours[same] == theirs.stats[same], same
    made_of = json.loads((device.folder / "calls.modules").read_text())
    own = {Path(file) for name, file in made_of.items() if name.split(".")[0] == "cm_export"}
    assert own and all(archive / "host" in file.parents for file in own)
    heavy = {"onnx", "onnxruntime", "torch", "transformers", "rich"}
    assert not heavy & {name.split(".")[0] for name in made_of}
    report = json.loads((archive / "report.json").read_text())
    assert report["asking"] == {"ready": True, "needs": None} and report["device"]["cma_bytes"] == str(256 << 20)


def test_the_answer_streams_as_text_and_a_summary(built):
    archive, device = built("7.2")
    done = device.ask(archive, "--image", PICTURES[0], "--prompt", QUESTION, "--max-new-tokens", "4")
    assert done.returncode == 0 and len(done.stdout.split()) >= 3, done.stderr
    assert "image tokens" in done.stderr and "cut at 4 tokens" in done.stderr


def test_the_bundle_of_a_device_says_what_the_packed_one_says_and_takes_no_room_twice(built, demo_bundle):
    archive, _ = built("7.2")
    bundle = archive / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    theirs = json.loads((demo_bundle / "manifest.json").read_text())
    for same in ("model", "generation", "links"):
        assert manifest[same] == theirs[same], same
    for table in ("neurons", "tokens"):
        assert manifest["recipe"][table] == theirs["recipe"][table]
    assert sorted(manifest["graphs"]) == ["decode", "prefill", "vision"] and not list(bundle.glob("*.onnx"))
    table = json.loads((archive / "manifest.json").read_text())["embedding"]
    assert 0 <= (bundle / "weights.safetensors").stat().st_size - table["length"] < 8192
    assert (bundle / "engines" / "decode.plan").samefile(archive / "engines" / "decode.plan")


def test_help_names_the_options_before_there_are_engines(copied):
    archive, device = copied
    shutil.rmtree(archive / "bundle")
    for options in ([], ["--help"]):
        done = device.ask(archive, *options)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Asks the model of this archive")
        assert "--token-share" in done.stdout


@pytest.fixture(scope="session")
def filled(demo_bundle) -> Path:
    """The demo model with a fill, and a cache that stays whole."""

    def make(folder: Path) -> None:
        conftest.take_stages(demo_bundle, folder / "demo.plan")
        conftest.built(folder / "demo.plan", "--recipe", "demo", "--fill", "prompt", "--token-cache", "index")

    return shared.once("filled", make) / "demo.plan"


@pytest.mark.wide
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_fill_and_a_whole_cache_answer_on_the_device_as_on_the_graphs(built, filled, precision):
    """The host makes the bias of the fill from rows that low-bit engines do not hold."""
    archive, device = built("6.2", precision=precision, bundle=filled)
    theirs = load(filled, threads=1).generate(QUESTION, [PICTURES[0]], max_new_tokens=20, neuron_share=0.3)
    asked = ("--image", PICTURES[0], "--prompt", QUESTION, "--max-new-tokens", 20, "--neuron-share", 0.3, "--json")
    assert as_json(device.ask(archive, *asked))["token_ids"] == theirs.token_ids
    places = {w["tensor"]: w["file"] for w in json.loads((archive / "manifest.json").read_text())["host_weights"]}
    down = {file for name, file in places.items() if "down_proj" in name}
    assert len(places) == 9 and down == {f"onnx/{'weights.fp16' if precision == 'fp16' else 'host'}.safetensors"}


# ---------------------------------------------------------------- what is refused

CANNOT = {
    "dense": (["--dense"], "has no tensorrt engine of prefill_dense", "ask the bundle that was packed"),
    "a later question": (
        ["--prompt", "and now?"],
        "drops the cache of cut tokens",
        "build it with --token-cache index",
    ),
    "the guard": (["--guard"], "drops the cache of cut tokens", "build it with --token-cache index"),
    "another backend": (["--backend", "onnxruntime"], "known: tensorrt"),
    "no such option": (["--tokenshare", "0.2"], "--tokenshare"),
    "a long answer": (["--max-new-tokens", "4000", "--min-new-tokens", "4000"], "the cache of these engines has"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_engines_do_not_do_is_one_line_that_says_what_does(name, built):
    archive, device = built("7.2")
    options, *words = CANNOT[name]
    done = device.ask(archive, "--image", PICTURES[0], "--prompt", QUESTION, *options)
    refused(done, *words)
    assert "onnxruntime" not in done.stderr or name == "another backend"


def test_verbs_that_need_graphs_refuse_the_bundle_of_a_device(built, capsys):
    bundle = str(built("7.2")[0] / "bundle")
    assert main(["run", bundle, "--image", str(PICTURES[0]), "--prompt", QUESTION, "--backend", "onnxruntime"]) == 2
    assert "holds engines of one device and no graphs" in capsys.readouterr().err
    assert main(["inspect", bundle]) == 2
    assert "ask the bundle that was packed" in capsys.readouterr().err
    assert main(["pack", bundle, "--target", "jetson-orin", "--out", "x.tar.gz", "-q"]) == 2
    assert "ask the bundle that was packed" in capsys.readouterr().err


def edit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # it may have a second name
    file.write_bytes(content)


DAMAGE = {
    "an edited engine": (lambda a: edit(a / "bundle/engines/decode.plan"), "decode.plan", "run build_on_device.sh again"),
    "an engine that is gone": (lambda a: (a / "bundle/engines/decode.plan").unlink(), "decode.plan", "missing"),
    "edited weights": (lambda a: edit(a / "bundle/weights.safetensors"), "weights.safetensors", "sha256"),
    "an edited manifest": (
        lambda a: (a / "bundle/manifest.json").write_text(
            (a / "bundle/manifest.json").read_text().replace('"kv": "in_place"', '"kv": "copy"')
        ),
        "the manifest was edited", "run build_on_device.sh again",
    ),
    "an edited program": (lambda a: edit(a / "host/cm_export/host/decode.py"), "host/cm_export/host/decode.py", "unpack"),
    "the bundle of another archive": (
        lambda a: (a / "manifest.json").write_text(
            (a / "manifest.json").read_text().replace('"capacity": 256', '"capacity": 512')
        ),
        "bundle is of another archive", "bash build_on_device.sh",
    ),
    "no bundle": (lambda a: shutil.rmtree(a / "bundle"), "bash build_on_device.sh"),
    "half an archive": (lambda a: (a / SUMS).unlink(), SUMS, "unpack it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_before_any_answer(name, copied):
    archive, device = copied
    damage, *words = DAMAGE[name]
    damage(archive)
    done = device.ask(archive, "--image", PICTURES[0], "--prompt", QUESTION)
    refused(done, *words)
    assert done.stdout == ""


def test_an_engine_that_was_edited_is_built_again(copied):
    archive, device = copied
    edit(archive / "engines" / "decode.plan")
    assert device.run(archive, "--no-bench").returncode == 0
    assert device.built() == ["decode"]
    as_json(device.ask(archive, "--image", PICTURES[0], "--prompt", QUESTION, "--json", "--max-new-tokens", 1))


def test_another_tensorrt_than_the_engines_were_built_with_is_one_line(copied):
    archive, device = copied
    device.module = "10.14.1.48"
    asked = device.ask(archive, "--image", PICTURES[0], "--prompt", QUESTION)
    refused(asked, "built for version 10.16.2.10, this machine has 10.14.1.48", "run build_on_device.sh again")
    refused(device.run(archive, "--no-bench"), "the engines were built with 10.16.2.10", "10.14.1.48", code=1)


def test_missing_packages_are_one_line_with_the_command(built, tmp_path):
    archive, _ = built("7.2")
    bare = Jetson(tmp_path, "7.2", available_gb=60)  # its Python has the standard library only
    refused(bare.ask(archive, "--prompt", "hello"), "no package tensorrt", "apt-get install python3-libnvinfer")
    (tmp_path / "tensorrt.py").touch()
    bare.faults = {"PYTHONPATH": str(tmp_path)}
    told = bare.ask(archive, "--prompt", "hello", "--json")
    refused(
        told,
        "lacks click, jinja2",
        "python3 -m pip install 'click>=8.1'",
        "'tokenizers>=0.22'",
        "'cuda-bindings>=13,<14'",
    )
    assert json.loads(told.stdout)["error"]["exit_code"] == 2


def test_where_the_system_keeps_its_python_to_itself_an_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(carried.__file__).parent / "device")
    import packages

    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(packages, "lacks", lambda module, _: module == "PIL")
    told = {"cannot_ask": None, "packages": {"PIL": "pillow>=10.1", "numpy": "numpy>=1.26"}}
    for base, words in ((sys.prefix, "; python3 -m venv --system-site-packages"), ("/usr", "; python3 -m pip install")):
        monkeypatch.setattr(packages.sys, "base_prefix", base)
        line = packages.problem(told)
        assert words in line and line.startswith("python3 lacks pillow (") and line.endswith("install 'pillow>=10.1'")


def test_a_package_of_the_wrong_version_is_named_with_the_one_that_fits(copied):
    archive, device = copied
    device.bindings = "12.9.0"  # of another CUDA than this JetPack has
    refused(device.ask(archive, "--prompt", "hello"), "lacks cuda-bindings (", "pip install 'cuda-bindings>=13,<14'")


# ---------------------------------------------------------------- memory in one piece


def test_a_piece_of_memory_that_cuda_does_not_give_is_told_before_anything_is_built(packed_demo, tmp_path):
    archive, device = packed_demo(tmp_path, "6.2"), Jetson(tmp_path, "6.2")
    largest = json.loads((archive / "manifest.json").read_text())["memory"]["largest"]
    device.largest_gb = (largest["bytes"] - 1) / 1e9
    done = device.run(archive)
    refused(done, "memory: CUDA does not give one piece of", largest["what"], "cudaMalloc: out of memory (code 2)")
    assert device.built() == [] and "36.5" not in done.stderr
    device.release = "# R36 (release), REVISION: 4.7, GCID: 1"
    refused(device.run(archive), "Jetson Linux 36.4.7 is reported to refuse large pieces: update to 36.5")
    assert device.run(archive, "--dry-run", "--ignore-memory").returncode == 0
    device.largest_gb = largest["bytes"] / 1e9
    assert device.run(archive, "--dry-run").returncode == 0


def test_without_a_cuda_library_the_piece_is_not_tried_and_a_warning_says_so(packed_demo, tmp_path):
    archive, device = packed_demo(tmp_path, "6.2"), Jetson(tmp_path, "6.2", without=("libcudart",))
    done = device.run(archive, "--dry-run")
    assert done.returncode == 0 and "warning: memory: there is no libcudart.so, so one piece of" in done.stderr


# ---------------------------------------------------------------- what is carried


def test_the_packages_are_asked_for_as_in_pyproject(demo_bundle):
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in carried.PACKAGES.values():
        assert f'"{requirement}"' in text, requirement
    least = re.search(r'"cuda-bindings>=([\d.]+)"', text)[1]
    old, new = (carried.packages(Bundle(demo_bundle), jetson.find(DEVICES[name], name)[1]) for name in ("6.2", "7.1"))
    assert (old["cuda.bindings"], new["cuda.bindings"]) == (f"cuda-bindings>={least},<13", "cuda-bindings>=13,<14")
    assert "safetensors" not in old  # without a calibration there is nothing that it reads


def test_a_family_that_is_not_carried_is_told_at_both_ends(demo_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(carried, "GROUP", "cm_export.backends")  # where no family lies
    options = ["--target", "jetson-orin", "--capacity", "256", "--out", str(tmp_path / "demo.tar.gz")]
    assert main(["pack", str(demo_bundle), *options]) == 0
    assert "but not ask them: the family qwen2_vl comes from another distribution" in capsys.readouterr().out
    with tarfile.open(tmp_path / "demo.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    refused(
        Jetson(tmp_path, "6.2").ask(tmp_path / "demo", "--prompt", "hello"), "the family qwen2_vl", "ask the bundle"
    )


def test_the_program_is_carried_without_what_builds_and_measures():
    names = {Path(place).parts[2] for place in carried.modules() if len(Path(place).parts) > 3}
    assert {"host", "bundle", "families", "recipe", "backends"} <= names
    assert not names & {"surgery", "source", "evals", "build", "tune", "report", "calibrating", "recipes"}
    inside = {p for p in carried.modules() if "/backends/" in p or "/verbs/" in p}
    assert "host/cm_export/cli/verbs/run.py" in inside and not [p for p in inside if "onnxruntime" in p or "build" in p]
