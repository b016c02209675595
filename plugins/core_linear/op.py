"""CoreLinear: a product that reads only the channels of x that weigh something for this token.

    y[b,s] = sum over kept d of x[b,s,d] * w[:,d]         kept: unless |x[b,s,d]| * norm[d] < threshold[b]

    y[B,S,N] = CoreLinear(x[B,S,D], w, norm[D], threshold[B,1])          norm and threshold float32

w is [N,D], as in the checkpoint, or, with by_inputs = 1, [D,N]: a row for each input, so that a row that is left out is not
read. Only then there may be bits 8 or 4: w is int32 words [D,N*bits/32] and after it comes w_scale [D,N/group] in x's type
(core_ffn/pack.py). Products that read the same x under the same norm and threshold (q, k and v) keep the same channels.
What is kept is decided as in plugins/threshold.py, which names the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cm_export.base.errors import SurgeryError
from cm_export.base.onnx_text import function as parse

from ..contract import Arrays, Op, declared
from ..core_ffn.body import rows_of, unpacking
from ..core_ffn.pack import quantize
from ..threshold import above, between

ATTRIBUTES = ("by_inputs", "bits", "group")
LIMITS = ("norm", "threshold")
BY_INPUTS = "/by_inputs"  # behind the name of a weight [N,D] that is held as [D,N]
AS_STORED = {"by_inputs": 0, "bits": 0, "group": 0}  # of a node whose weight is the checkpoint's


def function(by_inputs: bool = False, bits: int = 0) -> onnx.FunctionProto:
    """The body of CoreLinear: (x, w[, w_scale], norm, threshold) => (y). Float32 or float16.

    Raises SurgeryError for bits without by_inputs.
    """
    if bits and not by_inputs:
        raise SurgeryError(f"weights of {bits} bits as in the checkpoint", where="CoreLinear", fix="turn them")
    inputs = ["x", "w", *(["w_scale"] if bits else []), *LIMITS]
    rows = rows_of("w", "w", listed=False, bits=bits) if by_inputs else "w_rows = Transpose <perm = [1, 0]> (w)"
    return parse(f"""CoreLinear {declared(*ATTRIBUTES)} ({", ".join(inputs)}) => (y) {{
        {above("x", "norm", "threshold", "x_kept")}
        last = Constant <value_ints = [-1]> ()
        {unpacking(bits, 1) if bits else ""}
        {rows}
        y = MatMul (x_kept, w_rows)
    }}""")


def oracle(feeds: Arrays, attributes: Mapping[str, Any]) -> Arrays:
    """One product of two numbers at a time, over the channels that are kept."""
    x, bits = feeds["x"].astype(np.float64), attributes["bits"]
    rows = feeds["w"].astype(np.float64) if attributes["by_inputs"] else feeds["w"].astype(np.float64).T
    if bits:
        per_word = 32 // bits
        rows = np.empty((len(feeds["w"]), feeds["w"].shape[1] * per_word))
        for d, n in np.ndindex(rows.shape):
            code = int(feeds["w"][d, n // per_word]) >> (n % per_word * bits) & (2**bits - 1)
            signed = code - 2**bits if code >= 2 ** (bits - 1) else code
            rows[d, n] = signed * float(feeds["w_scale"][d, n // attributes["group"]])
    y = np.zeros((*x.shape[:2], rows.shape[1]))
    for b, s, d in np.ndindex(x.shape):
        if not abs(x[b, s, d]) * feeds["norm"][d] < feeds["threshold"][b, 0]:
            y[b, s] += x[b, s, d] * rows[d]
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
    by_inputs: bool = False
    bits: int = 0
    group: int = 0

    @property
    def form(self) -> dict[str, Any]:
        return {"by_inputs": self.by_inputs, "bits": self.bits}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"by_inputs": int(self.by_inputs), "bits": self.bits, "group": self.group}

    @property
    def axes(self) -> dict[str, str]:
        w = {"w": "D,W", "w_scale": "D,G"} if self.bits else {"w": "D,N" if self.by_inputs else "N,D"}
        return {"x": "B,S,D", **w, "norm": "D", "threshold": "B,1", "y": "B,S,N"}

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal((self.B, self.S, self.D)).astype(self.dtype)
        norm = rng.uniform(0.5, 2, self.D).astype(np.float32)
        weights = np.abs(x.astype(np.float64)) * norm
        threshold = between(weights, self.kept) if self.kept else np.full((self.B, 1), 1e4)
        w = (rng.standard_normal((self.N, self.D)) * self.D**-0.5).astype(self.dtype)
        out = {"x": x, "w": np.ascontiguousarray(w.T) if self.by_inputs else w}
        if self.bits:
            out["w"], out["w_scale"] = quantize(out["w"], self.bits, self.group)
        return out | {"norm": norm, "threshold": threshold.astype(np.float32)}


_SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"B": 3, "S": 5, "D": 17, "N": 29},
    {"D": 1, "N": 1, "kept": 1},
    {"B": 2, "D": 130, "N": 7, "kept": 0.1},
    {"B": 2, "S": 3, "D": 40, "kept": 0.0},
    {"S": 4, "D": 33, "N": 65, "kept": 1},
    {"B": 2, "S": 2, "D": 64, "dtype": "float16"},
)
_PACKED: tuple[dict[str, Any], ...] = (
    {"B": 2, "D": 40, "N": 64, "group": 32},
    {"S": 3, "D": 21, "N": 24, "group": 12},
    {"B": 2, "S": 2, "D": 64, "N": 64, "group": 64, "kept": 0.2, "dtype": "float16"},
)
OP = Op(
    name="CoreLinear",
    version="1",
    attributes=ATTRIBUTES,
    body=function,
    oracle=oracle,
    cases=(
        *(Case(by_inputs=turned, **sizes) for turned in (False, True) for sizes in _SIZES),
        *(Case(by_inputs=True, bits=bits, **sizes) for bits in (8, 4) for sizes in _PACKED),
    ),
    decides=LIMITS,
)
