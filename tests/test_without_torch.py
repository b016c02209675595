"""Running a bundle needs neither torch nor transformers: the verbs run where they cannot be imported."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ONE_THREAD, cm_export

from cm_export.base.errors import InputError
from cm_export.base.install import pip_install
from cm_export.cli import main
from cm_export.cli.verbs import doctor
from cm_export.recipe.aliases import DEMO
from cm_export.source import needs

ROOT = Path(__file__).parent.parent
EXPORT = ("torch", "transformers", "huggingface_hub", "onnxscript")
PICTURE = DEMO.parent / "images" / "teal-circle.png"
ASKED = ("--image", PICTURE, "--prompt", "what color is the shape?")
BLOCKER = f"""
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXPORT!r}:
            raise ImportError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict[str, str]:
    """An environment in which no Python process can import what the extra `export` brings."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return ONE_THREAD | {"PYTHONPATH": path}


@pytest.mark.parametrize("name", EXPORT)
def test_the_environment_of_these_tests_really_lacks_it(name, without):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], env=without, capture_output=True, text=True)
    assert done.returncode == 1 and f"ImportError: No module named '{name}'" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("run", *ASKED, "--overlay", "kept.png"),
        ("run", *ASKED, "--dense", "--json"),
        ("inspect",),
        ("bench", "--repeats", "1", "--new-tokens", "2", "--image-tokens", "16"),
        # The controls are graphs rewritten in memory; these two count votes and predict, which other policies do not.
        ("eval", "--task", "easy-vqa", "--limit", "1", "--neurons", "predicted,coreinfer", "--tokens", "overlap"),
        ("report", "--task", "easy-vqa", "--limit", "1", "--examples", "1", "--out", "report.html"),
    ],
    ids=lambda args: args[0],
)
def test_a_verb_that_runs_a_bundle_does_its_work(args, without, demo_bundle, tmp_path):
    verb, *options = args
    done = cm_export(verb, demo_bundle, *options, cwd=tmp_path, env=without)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_answer_is_that_of_a_machine_with_torch(without, demo_bundle):
    here, there = (cm_export("run", demo_bundle, *ASKED, "--json", env=env) for env in (ONE_THREAD, without))
    assert json.loads(here.stdout)["token_ids"] == json.loads(there.stdout)["token_ids"] != []


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("build", "--recipe", "demo"), "building"),
        (("build", "--model", "no-such-model"), "building"),  # the first thing to be told
        (("calibrate", "--model", "demo"), "calibrating a checkpoint"),
        (("check-family", "qwen2_vl"), "checking a family"),
    ],
    ids=["build", "build of a mistyped model", "calibrate", "check-family"],
)
def test_a_verb_that_makes_a_bundle_says_in_one_line_which_command_brings_what_it_needs(args, what, without, tmp_path):
    out = () if args[0] == "check-family" else ("--out", tmp_path / "out")
    done = cm_export(*args, *out, env=without)
    line = f"cm-export: error: {what} needs {', '.join(EXPORT)}, which are not installed; {pip_install('export')}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert os.listdir(tmp_path) == []


def test_what_making_a_bundle_asks_for_is_what_the_extra_brings(monkeypatch):
    assert needs.MODULES and set(needs.MODULES) == set(EXPORT) == {
        re.match(r"\w+", line)[0] for line in extra("export")
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match="building needs onnxscript, which is not installed; pip install"):
        needs.check_installed("building")


# ---------------------------------------------------------------- doctor


def extra(name: str) -> list[str]:
    """Requirements of an extra in pyproject.toml; "" of the base install."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][name] if name else project["dependencies"]


def test_doctor_is_content_without_the_extra_export_and_says_what_it_enables(monkeypatch, capsys):
    here = metadata.version

    def version(name: str) -> str:
        if name in EXPORT:
            raise metadata.PackageNotFoundError(name)
        return here(name)

    lines = [*extra(""), *(f'{line}; extra == "export"' for line in extra("export"))]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr("importlib.metadata.version", version)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {library["name"] for library in found["required"]}
    assert {"numpy", "onnxruntime", "tokenizers"} <= names and not names & set(EXPORT)
    assert "tomli" not in names or sys.version_info < (3, 11)
    assert not found["extras"]["export"]["ok"] and "cm-export build" in found["extras"]["export"]["enables"]
    assert main(["doctor"]) == 0
    assert f"{pip_install('export')} makes bundles" in " ".join(capsys.readouterr().out.split())


def test_doctor_knows_every_extra_of_pyproject():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])


# ---------------------------------------------------------------- what a run imports

SLOW = (
    "torch",
    "transformers",
    "scipy",
    "pandas",
    "onnxscript",
    "huggingface_hub",
    "onnx_graphsurgeon",
    "rich",
    "sympy",
)


def test_an_answer_imports_nothing_that_only_makes_it_wait(demo_bundle):
    """With everything installed. Imports are counted where a time would depend on the machine."""
    code = (
        "import sys; from cm_export.cli import main; code = main(sys.argv[1:]);"
        f"print('LOADED', [m for m in {SLOW!r} if m in sys.modules]); sys.exit(code)"
    )
    words = ["run", str(demo_bundle), *map(str, ASKED)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=True)
    answer, loaded = done.stdout.splitlines()
    assert answer and loaded == "LOADED []"
