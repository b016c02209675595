"""What a measured figure depends on besides the program: processor, cores, threads, versions, day.

A container may allow less than the machine has:  taskset, cpuset -> affinity;  docker --cpus, Kubernetes -> a quota
"""

import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

_LEVEL2_CACHE_SIZE = 191  # of sysconf in Linux's C library, for which Python has no name


def describe(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """For reports; `versions` are those the bundle was made with, `threads` 0 means all cores."""
    return {
        "processor": _processor(),
        "cores": processors(),
        "threads": usable(threads) or default_threads(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processors(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many processors this process may use: of those it may run on, what its control groups allow."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([here, *(math.ceil(share) for share in _quotas(groups, own))]))


def usable(threads: int) -> int:
    """As many threads as were asked, at most one for each processor: more wait for each other. 0 stays 0, all of them."""
    return min(threads, processors()) if threads else 0


def default_threads() -> int:
    """Threads where none were asked: a core computes no faster with two, though it may pass for two processors."""
    return min(psutil.cpu_count(logical=False) or processors(), processors())


def worked(threads: int) -> float:
    """Seconds that this process has computed with so many threads (0: all cores), however busy the machine was meanwhile."""
    return time.process_time() / (usable(threads) or default_threads())


def threads_note(asked: int) -> list[str]:
    """A remark where more threads were asked than are used."""
    used = usable(asked)
    return (
        [] if used == asked else [f"{asked} threads were asked, {used} are used: no more processors are allowed here"]
    )


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Processors that the control groups of this process allow it: its own one, and those that it lies in."""
    for line in _lines(own):
        # Version 1 has a group for each kind of limit, version 2 one without a name.
        _, kinds, path = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        base = groups / "cpu" if kinds else groups
        folder = base / path.lstrip("/")  # a container may see its own group at the root
        for at in [base, *(f for f in (folder, *folder.parents) if base in f.parents)]:
            yield from _quota(" ".join(_lines(at / "cpu.max")))
            yield from _quota(" ".join([*_lines(at / "cpu.cfs_quota_us"), *_lines(at / "cpu.cfs_period_us")]))


def _quota(limit: str) -> list[float]:
    """ "150000 100000" -> [1.5]; "max 100000", "-1 100000" and "" -> []."""
    numbers = [int(word) for word in limit.split() if word.isdigit()]
    return [numbers[0] / numbers[1]] if len(numbers) == 2 and all(numbers) else []


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no control groups, or a system that shows none
        return []


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def attends_in_blocks() -> bool:
    """Whether ONNX Runtime's MultiHeadAttention without a mask keeps no scores, as it does where it knows the L2 cache's size.

    Linux does not say it on some ARM machines. Source: onnxruntime/contrib_ops/cpu/bert/multihead_attention.cc.
    """
    return sys.platform != "linux" or os.sysconf(_LEVEL2_CACHE_SIZE) > 0


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far.

    Linux hands the figure of getrusage on to a program that a large process starts, so its own one is read where there
    is one.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
