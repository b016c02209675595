"""The benchmark of the kernels runs from end to end (emulated, tiny), and says at once that it needs a GPU."""

import json
import subprocess
import sys
from pathlib import Path

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
