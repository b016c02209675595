"""What a measured figure depends on besides the program: processor, cores, threads, versions, day."""

import os
import platform
import resource
from datetime import datetime, timezone
from typing import Any


def describe(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """For reports; `versions` are those the bundle was made with, `threads` 0 means all cores."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads or os.cpu_count(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
