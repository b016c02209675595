"""How fast this machine reads memory: the ceiling of a decode step, which reads every weight that it needs once.

256 MB of numbers, a part for each thread, np.max over each  ->  bytes / seconds, the best of a few rounds
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 2**28  # far more than any cache holds


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that so many threads read together."""
    parts = np.array_split(np.arange(BYTES // 8, dtype=np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return BYTES / best
