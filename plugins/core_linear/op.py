"""CoreLinear: a product that reads only the channels of x that weigh something for this token.

    y[b,s] = sum over kept d of x[b,s,d] * w[:,d]         kept: unless |x[b,s,d]| * norm[d] < threshold[b]

    y[B,S,N] = CoreLinear(x[B,S,D], w[N,D], norm[D], threshold[B,1])          norm and threshold float32

w is stored as in the checkpoint. Products that read the same x under the same norm and threshold (q, k and v) keep the same
channels. What is kept is decided as in plugins/threshold.py, which names the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cm_export.base.onnx_text import function as parse

from ..contract import Arrays, Op, declared
from ..threshold import above, between


def function() -> onnx.FunctionProto:
    """The body of CoreLinear: (x, w, norm, threshold) => (y). Float32 or float16."""
    return parse(f"""CoreLinear {declared()} (x, w, norm, threshold) => (y) {{
        {above("x", "norm", "threshold", "x_kept")}
        w_DN = Transpose <perm = [1, 0]> (w)
        y = MatMul (x_kept, w_DN)
    }}""")


def oracle(feeds: Arrays, attributes: Mapping[str, Any]) -> Arrays:
    """One product of two numbers at a time, over the channels that are kept."""
    x, w = feeds["x"].astype(np.float64), feeds["w"].astype(np.float64)
    y = np.zeros((*x.shape[:2], len(w)))
    for b, s, d in np.ndindex(x.shape):
        if not abs(x[b, s, d]) * feeds["norm"][d] < feeds["threshold"][b, 0]:
            y[b, s] += x[b, s, d] * w[:, d]
    return {"y": y}


@dataclass(frozen=True)
class Case:
    """Sizes; `kept`: about the share of channels that each request keeps."""

    B: int = 1
    S: int = 1
    D: int = 16
    N: int = 24
    kept: float = 0.5
    dtype: str = "float32"
    seed: int = 0

    @property
    def form(self) -> dict[str, Any]:
        return {}

    @property
    def attributes(self) -> dict[str, Any]:
        return {}

    @property
    def axes(self) -> dict[str, str]:
        return {"x": "B,S,D", "w": "N,D", "norm": "D", "threshold": "B,1", "y": "B,S,N"}

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal((self.B, self.S, self.D))
        norm = rng.uniform(0.5, 2, self.D)
        weights = np.abs(x.astype(self.dtype).astype(np.float64)) * norm.astype(np.float32)
        threshold = between(weights, self.kept) if self.kept else np.full((self.B, 1), 1e4)
        w = rng.standard_normal((self.N, self.D)) * self.D**-0.5
        limits = {"norm": norm.astype(np.float32), "threshold": threshold.astype(np.float32)}
        return {"x": x.astype(self.dtype), "w": w.astype(self.dtype), **limits}


OP = Op(
    name="CoreLinear",
    version="1",
    attributes=(),
    body=function,
    oracle=oracle,
    cases=(
        Case(),
        Case(B=3, S=5, D=17, N=29),
        Case(D=1, N=1, kept=1),
        Case(B=2, D=130, N=7, kept=0.1),
        Case(B=2, S=3, D=40, kept=0.0),
        Case(S=4, D=33, N=65, kept=1),
        Case(B=2, S=2, D=64, N=24, dtype="float16"),
    ),
)
