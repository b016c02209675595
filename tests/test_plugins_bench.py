"""The benchmark of the kernels runs from end to end (emulated, tiny), and says at once that it needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_proof
import plugin_builds
import pytest
import torch

from cm_export.plugins.harness.bench import Sizes, measure
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.timing import CpuMachine

ROOT = Path(__file__).parent.parent
TINY = Sizes("tiny", D=64, F=96, H=4, Hk=2, layers=2, d=16, P=40)


def test_every_figure_is_measured_beside_dense_and_the_copy():
    library = Library(plugin_builds.emulated())
    page = json.loads(json.dumps(measure(library, CpuMachine(), (TINY,), (0.5, 1.0), compiled=False)))
    kinds = {(r["kernel"], r.get("bits"), r.get("block")) for r in page["ffn"]}
    assert kinds == {("torch.matmul", None, None)} | {("CoreFFN", b, k) for b in (16, 8, 4) for k in (1, 8, 32)}
    half = next(r for r in page["ffn"] if r.get("block") == 8 and r["share"] == 0.5 and r["bits"] == 16)
    assert half["neurons"] == 48 and half["bytes"] == 3 * 48 * 64 * 2
    for row in (*page["ffn"], *page["attention"], *page["step"]):
        assert row["us"]["q1"] <= row["us"]["median"] <= row["us"]["q3"]
    assert [r["kernel"] for r in page["step"]] == ["dense", "sparse", "sparse"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so():
    command = [sys.executable, str(ROOT / "benchmarks/kernels.py"), "--library", "none.so", "--out", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, says",
    [
        (("--device", "cuda"), "does not run on cuda"),
        (("--bench",), "add --device cuda"),
        (("--only", "x"), "problems"),
    ],
)
def test_the_harness_command_refuses_what_it_cannot_do(options, says):
    command = [sys.executable, "-m", "cm_export.plugins.harness", "--library", str(plugin_builds.emulated())]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert says in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_harness_command_runs_the_calls_that_it_is_asked_for():
    command = [sys.executable, "-m", "cm_export.plugins.harness", "--library", str(plugin_builds.emulated())]
    done = subprocess.run([*command, "--device", "cpu", "--only", "mish"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "interface: 0 problems\ncalls: 0 of 4 wrong" in done.stdout


def test_the_page_of_the_gpu_shows_its_report(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_bytes((ROOT / "docs/gpu.md").read_bytes())
    gpu_proof.document(ROOT / "benchmarks/gpu/h100.json", page)
    assert page.read_text() == (ROOT / "docs/gpu.md").read_text()


def test_a_part_of_the_proof_that_fails_hangs_or_is_missing_is_told_and_stops_no_other(tmp_path):
    python = [sys.executable, "-c"]
    told = {
        name: gpu_proof.run(gpu_proof.Part(name, command, 2), dict(os.environ), tmp_path)
        for name, command in {
            "fails": [*python, "print('why'); raise SystemExit(3)"],
            "hangs": [*python, "import time; print('soon', flush=True); time.sleep(60)"],
            "missing": ["no-such-sanitizer"],
            "works": [*python, "print('done')"],
        }.items()
    }
    assert {name: part["status"] for name, part in told.items()} == {
        "fails": 3,
        "hangs": None,
        "missing": 127,
        "works": 0,
    }
    assert [part["says"][-1] for part in told.values()][:2] == ["why", "soon"] and told["works"]["says"] == ["done"]
    shown = list(gpu_proof.table({"parts": told, "rehearsal": True}))
    assert [line.split()[1] for line in shown] == ["FAILED", "FAILED", "FAILED", "ok"]


def test_the_parts_of_a_rehearsal_are_those_of_the_proof_and_say_nothing_of_this_machine(tmp_path):
    real = [part.name for part in gpu_proof.parts(tmp_path, "90", False, None)]
    rehearsed = list(gpu_proof.parts(tmp_path, "90", True, None))
    assert [part.name for part in rehearsed if part.name != "build, emulated"] == real
    site = gpu_proof.importable(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(site)}
    told = [sys.executable, "-c", "import cm_export.plugins.harness as h; print(h.__file__)"]
    part = gpu_proof.run(gpu_proof.Part("import", told, 60), environment, tmp_path)
    assert part["says"] == ["OUT/site/cm_export/plugins/harness/__init__.py"]
    for one in rehearsed:
        assert str(tmp_path) not in gpu_proof.plain(" ".join(one.command), tmp_path)
