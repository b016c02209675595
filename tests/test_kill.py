"""A build may be killed at any moment: what stands at --out is whole, and the next build goes on from there."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ONE_THREAD, PROCESSORS, here, session, wide

from cm_export.bundle.bundle import Bundle

STAGES = ["weights", "trace", "graphs", "gates"]
# Where kills fall: the first after one of these lines was announced and a random part of the seconds behind it; the stage
# that runs then. Stages finished before stay finished, so every build gets further than the one before; the last dies assembling.
MOMENTS = (
    ("check the checkpoint", 2.0, None),
    ("load the checkpoint", 2.0, "weights"),
    ("trace the graphs", 2.0, "trace"),
    ("prove the graphs", 0.2, "gates"),
    ("assemble the bundle", 0.01, None),
)


def command(bare_checkpoint: Path, out: Path, *options: str) -> list[str]:
    program = str(Path(sys.executable).parent / "cm-export")
    own = ["--neurons", "griffin", "--prune-layer", "1"]  # as the fixture bare_bundle was built
    return [program, "build", "--model", str(bare_checkpoint), "--out", str(out), *own, *options]


def finish(bare_checkpoint: Path, out: Path, *options: str) -> dict:
    words = command(bare_checkpoint, out, *options)[1:]
    done = here(*words, "--json", threads=1, places=256)  # as many places as of the real command, which is killed
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(out: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def on_all_processors() -> None:
    """With one alone a build starts no processes that trace."""
    if PROCESSORS:
        os.sched_setaffinity(0, PROCESSORS)


def killed(arguments: list[str], moment: str, delay: float, group: bool = True) -> bool:
    """Start a build and kill it `delay` seconds after it announced `moment`; whether it was still running then.

    group: all its processes at once, or only the one that was started.
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    build = subprocess.Popen(arguments, start_new_session=True, env=ONE_THREAD, preexec_fn=on_all_processors, **pipes)
    for line in build.stderr:
        if moment in line:
            break
    time.sleep(delay)
    running = build.poll() is None
    if running:
        (os.killpg if group else os.kill)(build.pid, signal.SIGKILL)
    build.wait()
    build.stderr.close()
    for _ in range(300):
        if not (left := session(build.pid)):
            return running
        time.sleep(0.1)
    raise AssertionError(f"processes outlived the build: {left}")


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".tmp", ".old"))]


@pytest.fixture
def place(bare_bundle, tmp_path) -> Path:
    """A finished bundle with its stages, as the build left it, in a folder of its own."""
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(bare_bundle.with_name(name), tmp_path / name)
    return tmp_path / "x.plan"


@pytest.mark.parametrize(("seed", "traces"), [(0, False), wide(1, True)])
def test_killed_at_random_moments_a_build_leaves_nothing_or_a_whole_bundle_and_goes_on(
    bare_checkpoint, bare_bundle, tmp_path, seed, traces
):
    """traces: the build that follows the one killed while tracing traces anew; without, it finds that stage finished.

    Nor is that one killed while it loads the checkpoint, which the next test does.
    """
    moments = [m for m in MOMENTS if traces or m[2] != "weights"]
    rng, out, hits = random.Random(seed), tmp_path / "x.plan", 0
    stages = tmp_path / ".x.plan.stages"
    only_parent = rng.randrange(1, len(moments) - 2)  # while the processes that trace are running
    for i, (moment, seconds, stage) in enumerate(moments):
        delay = rng.uniform(0, seconds)
        for _ in range(8):  # a fast machine may be done before the kill: that stage again, and sooner
            hit = killed(command(bare_checkpoint, out), moment, delay, group=i != only_parent)
            if out.exists():
                Bundle(out).wait_verified()
                assert contents(out) == contents(bare_bundle)
            if hit:
                break
            delay /= 4
            if stage:
                shutil.rmtree(stages / stage, ignore_errors=True)
        hits += hit
        if stage == "trace" and hit and not traces:
            shutil.copytree(bare_bundle.with_name(".x.plan.stages") / "trace", stages / "trace")
    assert hits >= len(moments) - 1, "only assembling may be too short to be hit"
    summary = finish(bare_checkpoint, out)
    assert summary["stages_reused"][:2] == ["weights", "trace"]
    assert contents(out) == contents(bare_bundle)
    assert leftovers(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == [".x.plan.stages", "x.plan"]
    assert sorted(os.listdir(tmp_path / ".x.plan.stages")) == sorted([*STAGES, "lock"])


def test_a_good_bundle_survives_killed_rebuilds(bare_checkpoint, place):
    before = contents(place)
    for moment, delay, options in (
        ("load the checkpoint", 1.0, ("--force",)),
        ("assemble the bundle", 0.0, ("--neuron-share", "0.9")),
    ):
        was_running = killed(command(bare_checkpoint, place, *options), moment, delay)
        Bundle(place).wait_verified()
        if options == ("--force",):
            assert was_running
        if was_running and contents(place) != before:  # it was killed after the swap: the new one is whole
            assert Bundle(place).manifest["recipe"]["neurons"]["share"] == 0.9
    assert finish(bare_checkpoint, place)["recipe"]["neurons"]["share"] == 0.6
    assert contents(place) == before and leftovers(place.parent) == []


def test_a_rebuild_redoes_only_what_changed(bare_checkpoint, place):
    before = contents(place)
    assert finish(bare_checkpoint, place)["stages_reused"] == STAGES
    assert contents(place) == before
    other = finish(bare_checkpoint, place, "--neuron-share", "0.25", "--seed", "7")
    assert other["stages_reused"] == ["weights", "trace"] and all(g["passed"] for g in other["gates"])
    changed = {n for n, digest in contents(place).items() if before.get(n) != digest}
    assert "weights.safetensors" not in changed and "manifest.json" in changed


def test_a_damaged_bundle_is_replaced_by_building_again(bare_checkpoint, place):
    """The weights live in the bundle alone, so a rebuild must notice the damage and make them again."""
    before, file = contents(place), place / "weights.safetensors"
    assert file.stat().st_nlink == 1, "readers of external data refuse a file with several hard links"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "weights" not in finish(bare_checkpoint, place)["stages_reused"]
    assert contents(place) == before
