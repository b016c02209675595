"""How a server divides the cores of its machine: threads of one step, and lanes, which step side by side (lane.py).

given          threads, lanes of 8 cores
nothing        1, 8      of a tiny model: its step is too short to be divided among threads, and its weights stay in caches
nothing        8, 1      of any other: a step waits for its weights, which one lane reads once for all of its rows
lanes 2        4, 2
threads 2      2, 1
"""

from __future__ import annotations

from ..base import environment
from ..bundle.bundle import Bundle
from ..recipe.recipe import TINY

_SIDE_BY_SIDE = "onnxruntime"  # others take one call at a time: their lanes would wait for each other


def divided(bundle: Bundle, backend: str | None, threads: int, lanes: int, at_once: int) -> tuple[int, int]:
    """(threads, lanes), where 0 is left open, and stays 0 for all cores. `backend` None: what the bundle was built for.

    More lanes than requests `at_once` would have nothing to do.
    """
    cores = environment.default_threads()
    if threads or lanes:
        return threads or (max(1, cores // lanes) if lanes > 1 else 0), lanes or 1
    if (backend or bundle.recipe.backend) == _SIDE_BY_SIDE and bundle.shape.weights < TINY:
        return 1, min(cores, at_once)
    return 0, 1
