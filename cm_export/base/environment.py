"""What a measured figure depends on besides the program: processor, cores, threads, versions, day."""

import os
import platform
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
