"""The kernels, run on the CPU as they stand: every call equals its op's function, twice to the byte, within its buffers."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import plugin_builds
import pytest

from cm_export.plugins.core_attention.op import Case as AttentionCase
from cm_export.plugins.core_ffn.op import Case as FfnCase
from cm_export.plugins.harness.cases import OPS, Call, calls
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.run import Cpu, run

FFN, ATTENTION, LINEAR = OPS
LARGE = FfnCase("request", D=264, F=200, K=130)


@pytest.fixture(scope="module")
def library():
    return Library(plugin_builds.emulated())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_call_equals_the_function_of_its_op(library, op):
    """Also that a second run, with all blocks and threads in reverse, gives the same bytes, and that no byte behind
    an output or the workspace is written."""
    outcomes = [run(library, call, Cpu()) for call in calls() if call.op is op]
    assert len(outcomes) > (50 if op is LINEAR else 70)
    assert [f"{o.call}: {o.problem}" for o in outcomes if o.problem] == []


def test_the_calls_take_every_path_of_the_kernels():
    """Sizes for which the work is cut differently: few, 4 and 8 rows at once; with and without splits; odd addresses."""
    ffn = [c for c in calls() if c.op is FFN]
    rows = {c.case.B * c.case.S if c.case.index == "none" else 1 if c.case.index == "token" else c.case.S for c in ffn}
    assert {1, 2, 3, 5, 16} <= rows
    assert {(c.case.bits, c.case.block, c.dtype) for c in ffn} >= {
        (bits, block, dtype) for bits in (0, 4, 8) for block in (1, 8, 32) for dtype in ("float16", "bfloat16")
        if (bits, block) != (4, 32) or dtype == "float16"
    }  # fmt: skip
    assert any(c.shifted for c in ffn)
    attention = [c.case for c in calls() if c.op is ATTENTION]
    assert {c.H // c.Hk * c.S for c in attention} >= {1, 6, 7}
    assert max(c.d for c in attention) == 256


@pytest.mark.parametrize(
    "call", [Call(FFN, LARGE, "float16"), Call(ATTENTION, AttentionCase(True), "float16")], ids=str
)
def test_an_index_out_of_range_is_an_error_where_indices_are_checked(library, call, capfd):
    name = list(call.feeds)[-1]
    assert call.expected  # while its ids are right
    for wrong in (-1, 10_000) if call.op is ATTENTION else (10_000,):  # of neurons, what is below 0 lists nothing
        call.feeds[name].flat[-1] = wrong
        assert "enqueue returned" in run(library, call, Cpu()).problem
        assert "is not a row of" in capfd.readouterr().err


def test_a_call_before_its_shapes_are_known_is_an_error(library):
    call = Call(FFN, LARGE, "float16")
    plugin = library.creators["CoreFFN"].create(call.case.attributes)
    assert plugin.enqueue(call.inputs, call.outputs, [0] * 5, [0, 0], 0) != 0


@pytest.mark.parametrize("blocks", [1, 7, 5000])
def test_an_engine_of_another_gpu_gives_right_results(library, blocks):
    """However few or many blocks the work was cut for: no split of a sum, some, one for every few rows."""
    attention = AttentionCase(True, B=2, H=4, Hk=2, P=200, M=150, d=16, ascending=False)
    for call in (
        Call(FFN, LARGE, "float16"),
        Call(FFN, replace(LARGE, S=9), "float16"),
        Call(ATTENTION, attention, "float16"),
    ):
        assert run(library, call, Cpu(), grid_blocks=blocks).problem == ""


def test_heads_of_more_than_256_numbers_are_refused(library):
    for d, accepted in ((256, True), (264, False)):
        call = Call(ATTENTION, AttentionCase(True, d=d), "float16")
        plugin = library.creators["CoreAttention"].create(call.case.attributes)
        assert plugin.shapes(call.inputs, call.outputs) is accepted
    assert "1 to 256" in library.log()


def test_the_workspace_of_a_large_shape_serves_every_smaller_one(library):
    """One engine runs all shapes of its profile with the workspace of the largest; more rows need fewer splits."""
    plugin = library.creators["CoreFFN"].create(LARGE.attributes)
    largest = None
    for tokens in (64, 17, 16, 8, 5, 3, 1):
        call = Call(FFN, replace(LARGE, S=tokens), "float16")
        size = plugin.workspace(call.inputs, call.outputs)
        largest = largest or size
        assert 0 < size <= largest


def test_rows_that_are_not_listed_are_not_read(library):
    """NaN in every row that no list names reaches no output."""
    call = Call(FFN, replace(LARGE, D=64, K=20), "float16")
    expected = call.expected
    rest = np.setdiff1d(np.arange(call.case.F), call.feeds["core_neurons"])
    for weight in ("w_gate", "w_up", "w_down_t"):
        call.feeds[weight][rest] = np.nan
    assert not any(np.isnan(a).any() for a in expected.values())
    assert run(library, call, Cpu()).problem == ""


def test_ids_that_mean_nothing_read_nothing_outside():
    """Builders time plugins on whatever lies in memory; debug builds and the emulator stop there, release builds go on."""
    quiet = {"native/device.h": [("if (!ok) emulator::fail(what);", "")]}
    rebuilt = ["core_ffn/run_half.cu", "core_attention/run_half.cu"]
    library = Library(
        plugin_builds.changed("any_ids", quiet, rebuilt), plugin_builds.emulated().parent / "libcm_harness.so"
    )
    attention = AttentionCase(True, B=2, H=4, Hk=2, P=40, M=30, d=16)
    for call, ids, count, least in (
        (Call(FFN, replace(LARGE, D=64, K=20), "float16"), "core_neurons", LARGE.F, -1),
        (Call(ATTENTION, attention, "float16"), "core_tokens", 40, 0),
    ):
        anything = np.random.default_rng(0).integers(-(2**31), 2**31, call.feeds[ids].shape).astype(np.int32)
        anything.flat[0] = 0  # a row that every query sees
        call.feeds[ids] = np.clip(anything, least, count - 1)
        assert set(call.expected) and (anything != call.feeds[ids]).any()
        call.feeds[ids] = anything
        assert run(library, call, Cpu()).problem == ""


SANITIZED = """
import sys
from dataclasses import replace
from pathlib import Path
from cm_export.plugins.harness.cases import calls
from cm_export.plugins.harness.library import Library
from cm_export.plugins.harness.run import Cpu, run
library = Library(Path(sys.argv[1]), Path(sys.argv[2]))
chosen = [c for c in calls() if c.dtype == "float16" and c.case.dtype == "float32"]
chosen = [c for c in chosen if getattr(c.case, "activation", "silu") == "silu"][::5]
# The longest of them with a quarter of its neurons, which take the same paths.
chosen = [replace(c, case=replace(c.case, F=50, K=37)) if c.op.name == "CoreFFN" and c.case.S == 40 else c for c in chosen]
wrong = [f"{o.call}: {o.problem}" for o in (run(library, c, Cpu()) for c in chosen) if o.problem]
print(len(chosen), "calls", *wrong, sep="\\n")
sys.exit(bool(wrong))
"""


# Checks as calls see the same and leave a fifth less to compile.
SANITIZER = ("-g1", "-fno-sanitize-recover=undefined", "--param", "asan-instrumentation-with-call-threshold=0")


def sanitized(name, replaced, *rebuilt, kinds="address,undefined", level="-O1"):
    """A fifth of the float16 calls in a process with AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = (level, f"-fsanitize={kinds}", *SANITIZER)
    library = plugin_builds.changed(name, replaced, [*rebuilt, "emulator/emulator.cpp"], flags)
    preload = []
    for runtime in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
        preload.append(found.stdout.strip())
    environment = (
        os.environ
        | {
            "LD_PRELOAD": " ".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks; fibers have stacks of their own
            "OMP_NUM_THREADS": "1",
        }
    )
    harness = plugin_builds.emulated().parent / "libcm_harness.so"
    command = [sys.executable, "-c", SANITIZED, str(library), str(harness)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_no_kernel_reads_or_writes_outside_its_arrays():
    done = sanitized("sanitized", {}, "core_ffn/run_half.cu", "core_attention/run_half.cu")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_a_kernel_that_reads_behind_a_row_is_seen():
    tail = ("first + i < columns ? to_float(row[first + i]) : 0.0f", "to_float(row[first + i])")
    file = "core_ffn/run_half.cu"  # not optimised: the first calls see it
    done = sanitized("reads_behind", {"native/numbers.h": [tail]}, file, kinds="address", level="-O0")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
