"""Every tolerance of the tests, once, with its reason: name -> (largest absolute difference, why it may be that large).

A difference is divided by max(1, |expected|) first; `agrees(name, got, expected)` is the only comparison.
"""

import numpy as np

from cm_export.plugins.harness.limits import LIMITS

TOLERANCES = {
    "op float32": (1e-5, "sums of at most 130 float32 products against float64; measured 2e-6"),
    "op float16": (5e-3, "float16 has 2^-11 relative error and each operator rounds once; measured 2e-3"),
    "activation float32": (
        1e-6,
        "ONNX Runtime's Sigmoid is 1e-7 off, times a gate of 8; a wrong formula is 1e-4 off",
    ),
    "activation float64": (1e-13, "the same formula in float64, written by somebody else"),
    "export": (1e-5, "float32 through 2-3 layers, summed in another order than PyTorch; measured 2e-6"),
    "long answer": (1e-4, "float32, 90 steps over keys and values that earlier steps computed; measured 2e-5"),
    "same numbers": (2e-6, "the same float32 products summed in another order"),
    "rounded x": (
        0.02,
        "x in 8 bits with a scale per group, through 8 layers, of the largest logit; a wrong weight is .3 off",
    ),
    "four bits of a head": (
        0.06,
        "of the largest logit, as far below it as nothing is chosen: half a step of 4 bits, summed over 128 inputs",
    ),
    # the harness takes these along to machines with a GPU, so they stand there
    **{f"kernel {dtype}": limit for dtype, limit in LIMITS.items()},
}


def agrees(name: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Asserts equal shape, no NaN, and a difference within TOLERANCES[name]."""
    limit, reason = TOLERANCES[name]
    assert got.shape == expected.shape
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    worst = float(np.max(np.abs(got - expected) / np.maximum(1, np.abs(expected))))
    assert worst <= limit, f"differs by {worst:.3g}, allowed {limit} ({reason})"
