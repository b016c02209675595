"""Threads at work on one op: phases follow each other, errors reach the caller, nobody waits for ever (cpu_ops/team.cpp)."""

import functools
import subprocess
from pathlib import Path

import pytest
from conftest import wide
from cpu_builds import HERE, changed, compiled, folder, linked

from cm_export.plugins.cpu import build

RACES = ("-O0", "-g1", "-fsanitize=thread")
DONE = "fetch_add(1, std::memory_order_release)"
BUGS = {
    "threads do not wait for each other": ("load(std::memory_order_acquire) < count", "load() < 0"),
    "what one thread writes is not there for another": (DONE, DONE.replace("release", "relaxed")),
    "others wait for one that has failed": ("if (shared_.failed) throw Stopped{};", ""),
    "an error is lost": ("if (shared.failed) std::rethrow_exception(shared.failure);", ""),
    "nobody does the share of a thread that comes late": ("(home_ + turn) % shared_.homes, begin", "home_, begin"),
    "the share of another": ("while (first_of(home + 1, count) <= i) ++home;", ""),
}  # fmt: skip


@functools.cache
def program(sources: Path, name: str) -> Path:
    made = compiled(HERE / "team.cpp", RACES, folder() / f"{name}.o", sources)
    return linked([made], folder() / name, RACES)


def failure(run: Path, threads: int) -> str:
    """What was wrong; "": nothing."""
    try:
        done = subprocess.run([run, str(threads)], capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return "it waits for ever"
    return (done.stdout + done.stderr).strip() or ("" if done.returncode == 0 else f"exit status {done.returncode}")


@pytest.mark.parametrize("threads", [1, 2])
def test_phases_follow_each_other_and_errors_reach_the_caller(threads):
    assert failure(program(build.SOURCES, "team"), threads) == ""


@pytest.mark.parametrize("bug", [next(iter(BUGS)), *map(wide, list(BUGS)[1:])])
def test_a_wrong_team_is_seen(bug):
    name = f"team-{bug.replace(' ', '-')}"
    wrong = program(changed(name, "team.h", *BUGS[bug]), name)
    assert failure(wrong, 2) or failure(wrong, 1)
