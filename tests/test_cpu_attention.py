"""CachedAttention inside ONNX Runtime: as near to its meaning in float64 as float32 allows, and each token by itself."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from cpu_attention_cases import CASES, LEAST, Sizes, attention
from cpu_cases import Call
from test_cpu_ops import INSTRUCTIONS, best_instructions, compiled, session, use  # noqa: F401 (fixtures)


def run(call: Call, threads: int = 1) -> list[np.ndarray]:
    feeds = {n: a for n, a in call.inputs.items() if n not in call.constants}
    return session(call, threads).run(None, feeds)


def flat(outputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in outputs])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_it_is_attention_over_the_cache_with_the_new_rows(name):
    use(name)
    for seed, sizes in enumerate(CASES):
        call = attention(sizes, seed)
        call.check(flat(run(call)))
