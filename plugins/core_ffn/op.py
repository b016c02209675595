"""CoreFFN: a gated FFN that computes only the neurons listed for it.

    z[b,s,k] = act(x[b,s] . w_gate[n]) * (x[b,s] . w_up[n])         n = core_neurons[b,k]  or  core_neurons[b,s,k]
    y[b,s]   = sum_k z[b,s,k] * w_down_t[n]

    y[B,S,D], z[B,S,K] = CoreFFN(x[B,S,D], w_gate[F,D], w_up[F,D], w_down_t[F,D][, core_neurons int32])

All weights are neuron-major, so a neuron is one contiguous row of each. Without core_neurons every neuron counts, K = F
(prefill: z feeds the policies). Ids are distinct within a row, 0..F-1, in any order: one given twice is summed twice.
An output that nobody reads is named "", not left out: ONNX shape inference refuses a shorter list.
Source: CoreMatching, arXiv 2505.19235, section 3 (sparse decode); CoreInfer, arXiv 2410.18311.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cm_export.by_name import nearest
from cm_export.errors import InputError, SurgeryError
from cm_export.onnx_text import function as parse

from ..contract import Arrays, Op, declared

# ONNX text that reads gate_out and writes activated, named as in transformers.activations.ACT2FN. ONNX Runtime and
# TensorRT know these ops as they stand; CastLike keeps the text free of the element type.
_SILU = "gate_sigmoid = Sigmoid (gate_out)  activated = Mul (gate_out, gate_sigmoid)"
_GELU_TANH = 'activated = Gelu <approximate = "tanh"> (gate_out)'
ACTIVATIONS: dict[str, str] = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": "activated = Gelu (gate_out)",
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "quick_gelu": """
        slope_f32 = Constant <value_float = 1.702> ()
        slope = CastLike (slope_f32, gate_out)
        gate_steep = Mul (gate_out, slope)
        gate_sigmoid = Sigmoid (gate_steep)
        activated = Mul (gate_out, gate_sigmoid)""",
    "relu": "activated = Relu (gate_out)",
    "relu2": "gate_relu = Relu (gate_out)  activated = Mul (gate_relu, gate_relu)",
    "leaky_relu": "activated = LeakyRelu <alpha = 0.01> (gate_out)",
    "sigmoid": "activated = Sigmoid (gate_out)",
    "tanh": "activated = Tanh (gate_out)",
    "mish": "gate_plus = Softplus (gate_out)  gate_tanh = Tanh (gate_plus)  activated = Mul (gate_out, gate_tanh)",
}

_FORMS = {  # index form: (how gate_out and up_out are made, how y is made from z)
    "none": (
        """
        gate_DF = Transpose <perm = [1, 0]> (w_gate)
        up_DF = Transpose <perm = [1, 0]> (w_up)
        gate_out = MatMul (x, gate_DF)
        up_out = MatMul (x, up_DF)""",
        "y = MatMul (z, w_down_t)",
    ),
    "request": (
        """
        gate_BKD = Gather <axis = 0> (w_gate, core_neurons)
        up_BKD = Gather <axis = 0> (w_up, core_neurons)
        gate_BDK = Transpose <perm = [0, 2, 1]> (gate_BKD)
        up_BDK = Transpose <perm = [0, 2, 1]> (up_BKD)
        gate_out = MatMul (x, gate_BDK)
        up_out = MatMul (x, up_BDK)""",
        """
        down_BKD = Gather <axis = 0> (w_down_t, core_neurons)
        y = MatMul (z, down_BKD)""",
    ),
    "token": (
        """
        last = Constant <value_ints = [-1]> ()
        x_BSD1 = Unsqueeze (x, last)
        gate_BSKD = Gather <axis = 0> (w_gate, core_neurons)
        up_BSKD = Gather <axis = 0> (w_up, core_neurons)
        gate_BSK1 = MatMul (gate_BSKD, x_BSD1)
        up_BSK1 = MatMul (up_BSKD, x_BSD1)
        gate_out = Squeeze (gate_BSK1, last)
        up_out = Squeeze (up_BSK1, last)""",
        """
        row = Constant <value_ints = [2]> ()
        down_BSKD = Gather <axis = 0> (w_down_t, core_neurons)
        z_BS1K = Unsqueeze (z, row)
        y_BS1D = MatMul (z_BS1K, down_BSKD)
        y = Squeeze (y_BS1D, row)""",
    ),
}


def function(index: str, activation: str) -> onnx.FunctionProto:
    """The body of CoreFFN for a graph, whose nodes all share it: (x, w_gate, w_up, w_down_t[, core_neurons]) => (y, z).

    `index`: "none" (all neurons), "request" (core_neurons [B,K]) or "token" (core_neurons [B,S,K]).
    Float32 or float16. Raises InputError for an unknown activation, SurgeryError for an unknown form.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}", where="CoreFFN", fix=nearest(activation, [*ACTIVATIONS]))
    if index not in _FORMS:
        raise SurgeryError(f"unknown index form {index!r}", where="CoreFFN", fix=nearest(index, [*_FORMS]))
    project, combine = _FORMS[index]
    inputs = ", ".join(_inputs(index))
    return parse(
        f"""CoreFFN {declared("activation")} ({inputs}) => (y, z) {{
        {project}
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        {combine}
        }}"""
    )


def _inputs(index: str) -> list[str]:
    return ["x", "w_gate", "w_up", "w_down_t"] + (["core_neurons"] if index != "none" else [])


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


def oracle(feeds: Arrays, attributes: Mapping[str, Any]) -> Arrays:
    """Law (e): the dense FFN with the z of every neuron that is not listed set to zero. Gathers no weight."""
    x, w_gate, w_up, w_down_t = (feeds[n].astype(np.float64) for n in ("x", "w_gate", "w_up", "w_down_t"))
    dense = MEANINGS[attributes["activation"]](np.einsum("bsd,fd->bsf", x, w_gate)) * np.einsum("bsd,fd->bsf", x, w_up)
    if "core_neurons" not in feeds:
        return {"y": np.einsum("bsf,fd->bsd", dense, w_down_t), "z": dense}
    ids = feeds["core_neurons"]
    mask, z = np.zeros_like(dense), np.empty((*dense.shape[:2], ids.shape[-1]))
    for b, s in np.ndindex(dense.shape[:2]):
        for k, n in enumerate(ids[b] if ids.ndim == 2 else ids[b, s]):
            mask[b, s, n], z[b, s, k] = 1, dense[b, s, n]
    return {"y": np.einsum("bsf,fd->bsd", dense * mask, w_down_t), "z": z}


# ---------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """Sizes and form. Weights are scaled so that z and y are of order 1; core_neurons differ per request and token."""

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

    @property
    def form(self) -> dict[str, Any]:
        return {"index": self.index, "activation": self.activation}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"activation": self.activation}

    @property
    def axes(self) -> dict[str, str]:
        ids = {"none": {}, "request": {"core_neurons": "B,K"}, "token": {"core_neurons": "B,S,K"}}[self.index]
        weights = dict.fromkeys(("w_gate", "w_up", "w_down_t"), "F,D")
        return {"x": "B,S,D", **weights, **ids, "y": "B,S,D", "z": "B,S,K" if ids else "B,S,F"}

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        sizes = {"x": (self.B, self.S, self.D)} | dict.fromkeys(("w_gate", "w_up", "w_down_t"), (self.F, self.D))
        scale = {"x": 1.0, "w_gate": self.D**-0.5, "w_up": self.D**-0.5, "w_down_t": self.F**-0.5}
        out = {n: (rng.standard_normal(sizes[n]) * scale[n]).astype(self.dtype) for n in sizes}
        if self.index != "none":
            rows = (self.B, self.S) if self.index == "token" else (self.B,)
            ids = rng.permuted(np.broadcast_to(np.arange(self.F), (*rows, self.F)), axis=-1)[..., : self.K]
            out["core_neurons"] = (np.sort(ids, axis=-1) if self.ascending else ids).astype(np.int32)
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
OP = Op(
    name="CoreFFN",
    version="1",
    attributes=("activation",),
    body=function,
    oracle=oracle,
    cases=(
        *(Case(index, **sizes) for index in _FORMS for sizes in _SIZES),
        *(Case("request", S=2, activation=name, dtype=t) for name in ACTIVATIONS for t in ("float32", "float16")),
    ),
)
