"""The pools from which the C library hands out memory: few of them, for a process whose threads come and go with requests."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # of glibc's malloc.h


def few_pools() -> None:
    """Let all threads of this process take memory from two pools of glibc; to be called before they begin.

    Each pool keeps what it held at its most, and left to itself there is one for every thread.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has no such pools
        libc.mallopt(_M_ARENA_MAX, 2)
