"""CoreFFN: a gated FFN that computes only the neurons listed for it.

    z[b,s,k] = act(x[b,s] . w_gate[n]) * (x[b,s] . w_up[n])         n = neuron k of the list of b, or of (b, s)
    y[b,s]   = sum_k z[b,s,k] * w_down_t[n]

    y[B,S,D], z[B,S,N] = CoreFFN(x[B,S,D], w_gate[F,D], w_up[F,D], w_down_t[F,D][, scales][, core_neurons int32])

All weights are neuron-major, so a neuron is one contiguous row of each. Without core_neurons every neuron counts, N = F
(prefill: z feeds the policies). core_neurons is [B,K] or [B,S,K] and lists blocks: id i stands for the neurons
i*block .. i*block+block-1, in this order in z, N = K*block. Ids are distinct within a row, 0..F/block-1, in any order:
one given twice is summed twice. An id below 0 lists nothing, its z are 0: so requests with lists of unequal length share a call.

bits = 0: weights in x's type. bits = 8 or 4: weights are int32 words [F,D*bits/32] (pack.py) and three more inputs come
after them, gate_scale, up_scale, down_scale [F,D/group] in x's type; a weight is its integer times its group's scale.
Form "active": instead of core_neurons, norms [D] and [F] and thresholds [B,1] of both sides, all float32. Channels of x with
|x_d| * x_norm_d below x_threshold count as zero, then neurons with |z_n| * z_norm_n below z_threshold; z is what is left.
Float weights only.

An output that nobody reads is named "", not left out: ONNX shape inference refuses a shorter list.
Source: CoreMatching, arXiv 2505.19235, section 3 (sparse decode); CoreInfer, arXiv 2410.18311.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contract import Arrays, Op
from ..threshold import between
from .body import ACTIVATIONS, FORMS, LIMITS, LISTED, SCALES, WEIGHTS, function
from .pack import quantize


# ---------------------------------------------------------------------------------------------------- oracle
def _sigmoid(g):
    return np.exp(-np.logaddexp(0, -g))


def _gelu_tanh(g):
    return g / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


# The same activations written from their definitions, in float64.
MEANINGS = {
    "silu": lambda g: g * _sigmoid(g),
    "swish": lambda g: g * _sigmoid(g),
    "gelu": lambda g: g / 2 * (1 + np.vectorize(math.erf, otypes=[float])(g / math.sqrt(2))),
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "quick_gelu": lambda g: g * _sigmoid(1.702 * g),
    "relu": lambda g: np.where(g > 0, g, 0.0),
    "relu2": lambda g: np.where(g > 0, g, 0.0) ** 2,
    "leaky_relu": lambda g: np.where(g > 0, g, 0.01 * g),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "mish": lambda g: g * np.tanh(np.logaddexp(0, g)),
}


def _numbers(feeds: Arrays, weight: str, attributes: Mapping[str, Any]) -> np.ndarray:
    """A weight [F,D] in float64; words are read one element at a time."""
    stored, bits = feeds[weight], attributes["bits"]
    if not bits:
        return stored.astype(np.float64)
    scale, per_word = feeds[dict(zip(WEIGHTS, SCALES, strict=True))[weight]].astype(np.float64), 32 // bits
    out = np.empty((len(stored), stored.shape[1] * per_word))
    for f, d in np.ndindex(out.shape):
        code = int(stored[f, d // per_word]) >> (d % per_word * bits) & (2**bits - 1)
        out[f, d] = (code - 2**bits if code >= 2 ** (bits - 1) else code) * scale[f, d // attributes["group"]]
    return out


def _without_low(values: np.ndarray, norm: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """One channel at a time: zero where it weighs less than the request's threshold."""
    out = values.copy()
    for b, s, n in np.ndindex(values.shape):
        if abs(values[b, s, n]) * norm[n] < threshold[b, 0]:
            out[b, s, n] = 0
    return out


def oracle(feeds: Arrays, attributes: Mapping[str, Any]) -> Arrays:
    """Law (e): the dense FFN with the z of every neuron that is not listed set to zero. Gathers no weight."""
    x, block = feeds["x"].astype(np.float64), attributes["block"]
    w_gate, w_up, w_down_t = (_numbers(feeds, n, attributes) for n in WEIGHTS)
    if "x_threshold" in feeds:
        x = _without_low(x, feeds["x_norm"], feeds["x_threshold"])
    dense = MEANINGS[attributes["activation"]](np.einsum("bsd,fd->bsf", x, w_gate)) * np.einsum("bsd,fd->bsf", x, w_up)
    if "z_threshold" in feeds:
        dense = _without_low(dense, feeds["z_norm"], feeds["z_threshold"])
    if "core_neurons" not in feeds:
        return {"y": np.einsum("bsf,fd->bsd", dense, w_down_t), "z": dense}
    ids = feeds["core_neurons"]
    mask, z = np.zeros_like(dense), np.zeros((*dense.shape[:2], ids.shape[-1] * block))
    for b, s in np.ndindex(dense.shape[:2]):
        for k, i in enumerate(ids[b] if ids.ndim == 2 else ids[b, s]):
            for j in range(block if i >= 0 else 0):
                mask[b, s, i * block + j], z[b, s, k * block + j] = 1, dense[b, s, i * block + j]
    return {"y": np.einsum("bsf,fd->bsd", dense * mask, w_down_t), "z": z}


# ---------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """Sizes and form. Weights are scaled so that z and y are of order 1; core_neurons differ per request and token.

    K counts ids: with a block, blocks. F is a multiple of the block. `padded`: of K, ids that list nothing, in every other list.
    """

    index: str
    B: int = 1
    S: int = 1
    D: int = 16
    F: int = 24
    K: int = 6
    activation: str = "silu"
    dtype: str = "float32"
    ascending: bool = True
    seed: int = 0
    block: int = 1
    bits: int = 0
    group: int = 0
    padded: int = 0

    @property
    def form(self) -> dict[str, Any]:
        return {"index": self.index, "activation": self.activation, "bits": self.bits}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"activation": self.activation, "block": self.block, "bits": self.bits, "group": self.group}

    @property
    def axes(self) -> dict[str, str]:
        ids = {"request": {"core_neurons": "B,K"}, "token": {"core_neurons": "B,S,K"}}.get(self.index, {})
        limits = dict(zip(LIMITS, ("D", "F", "B,1", "B,1"), strict=True)) if self.index == "active" else {}
        weights = dict.fromkeys(WEIGHTS, "F,W" if self.bits else "F,D")
        scales = dict.fromkeys(SCALES, "F,G") if self.bits else {}
        return {"x": "B,S,D", **weights, **scales, **ids, **limits, "y": "B,S,D", "z": "B,S,N" if ids else "B,S,F"}

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        sizes = {"x": (self.B, self.S, self.D)} | dict.fromkeys(WEIGHTS, (self.F, self.D))
        scale = {"x": 1.0, "w_gate": self.D**-0.5, "w_up": self.D**-0.5, "w_down_t": self.F**-0.5}
        out = {n: (rng.standard_normal(sizes[n]) * scale[n]).astype(self.dtype) for n in sizes}
        if self.bits:
            for weight, scales in zip(WEIGHTS, SCALES, strict=True):
                out[weight], out[scales] = quantize(out[weight], self.bits, self.group)
        if self.index == "active":
            out |= self._limits(out, rng)
        if self.index in LISTED:
            rows, blocks = (self.B, self.S) if self.index == "token" else (self.B,), self.F // self.block
            ids = rng.permuted(np.broadcast_to(np.arange(blocks), (*rows, blocks)), axis=-1)[..., : self.K]
            ids = np.sort(ids, axis=-1) if self.ascending else ids
            ids.reshape(-1, self.K)[::2, self.K - self.padded :] = -1
            out["core_neurons"] = ids.astype(np.int32)
        return out

    def _limits(self, feeds: Arrays, rng: np.random.Generator) -> Arrays:
        """Norms, and thresholds that K of F neurons (and as large a share of the channels) are above, no value at the limit."""
        out = {"x_norm": np.ones(self.D, np.float32), "z_norm": rng.uniform(0.5, 2, self.F).astype(np.float32)}
        kept = self.K / self.F
        out["x_threshold"] = between(np.abs(feeds["x"].astype(np.float64)), kept).astype(np.float32)
        x = _without_low(feeds["x"].astype(np.float64), out["x_norm"], out["x_threshold"])
        w_gate, w_up = (feeds[n].astype(np.float64) for n in WEIGHTS[:2])
        z = MEANINGS[self.activation](np.einsum("bsd,fd->bsf", x, w_gate)) * np.einsum("bsd,fd->bsf", x, w_up)
        out["z_threshold"] = between(np.abs(z) * out["z_norm"], kept).astype(np.float32)
        return out


_SIZES = (
    {},
    {"B": 3, "S": 5, "D": 17, "F": 29, "K": 11},
    {"K": 1},
    {"B": 2, "F": 13, "K": 13},
    {"D": 1, "F": 1, "K": 1},
    {"B": 3, "D": 72, "F": 130, "K": 67},
    {"B": 2, "S": 3, "K": 7, "ascending": False},
    {"B": 2, "S": 5, "D": 33, "F": 65, "K": 32, "dtype": "float16"},
)
_PACKED = (  # a row and its groups fit the kernels' loads; they do not; many groups; float16
    {"B": 2, "D": 64, "F": 40, "K": 9, "group": 32},
    {"S": 3, "D": 24, "F": 21, "K": 8, "group": 12, "ascending": False},
    {"B": 2, "D": 96, "F": 48, "K": 5, "block": 8, "group": 16, "ascending": False},
    {"S": 2, "D": 64, "F": 64, "K": 1, "block": 32, "group": 64, "dtype": "float16"},
    {"B": 3, "D": 64, "F": 96, "K": 40, "group": 32, "padded": 17},
)
_BLOCKS = (
    {"B": 2, "S": 2, "F": 64, "K": 3, "block": 8, "ascending": False},
    {"B": 3, "D": 19, "F": 96, "K": 2, "block": 32},
    {"S": 2, "F": 30, "K": 10, "block": 3, "ascending": False},
    {"B": 3, "S": 2, "D": 24, "F": 64, "K": 5, "block": 8, "padded": 2},
    {"B": 3, "S": 2, "F": 70, "K": 37, "padded": 36},
    {"B": 2, "D": 24, "F": 64, "K": 5, "block": 8, "dtype": "float16"},
)
OP = Op(
    name="CoreFFN",
    version="1",
    attributes=("activation", "block", "bits", "group"),
    body=function,
    oracle=oracle,
    cases=(
        *(Case(index, **sizes) for index in FORMS for sizes in _SIZES),
        *(Case("request", S=2, activation=name, dtype=t) for name in ACTIVATIONS for t in ("float32", "float16")),
        *(Case(index, **sizes) for index in LISTED for sizes in _BLOCKS),
        *(Case(index, bits=bits, **sizes) for index in ("none", *LISTED) for bits in (8, 4) for sizes in _PACKED),
    ),
)
