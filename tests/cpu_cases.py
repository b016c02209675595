"""Calls of the CPU ops with their meaning in float64, and how far the rounding of x to int8 may take an answer from it.

    y = x_kept W          |error| <= sum over groups of (sum over kept k of |W[k,n]|) * scale / 2      scale = max |x_kept| / 127

With `x_bytes` 2 and weights of 8 bits x has 128 times as many steps. With 0 and no threshold, x and W may as well be bfloat16,
7 bits behind the first: each is off by at most a 256th of itself.

The weights are made here from codes, scales and zero points; nothing of the packer's inverse is used.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper

from cm_export.quant import rows

DOMAIN = "com.cm_export.native"
TILES = "amx-bf16"
BFLOAT16 = 2**-7 * 1.01  # of a product of two numbers that were rounded by up to 2^-8 each
FLOAT32 = 1e-6  # relative error of a float32 sum as the kernels take it (measured 2e-7), times the sum of magnitudes


@dataclass(frozen=True)
class Weight:
    """A random weight: `packed` for the op, `numbers` float64 [K,N] for the meaning."""

    packed: rows.PackedRows
    numbers: np.ndarray


@dataclass(frozen=True)
class Call:
    """One call of an op: its attributes, its inputs in order, what must come out and how far away it may be."""

    op: str
    attributes: dict[str, int | str]
    inputs: dict[str, np.ndarray]
    expected: np.ndarray
    bound: np.ndarray
    read: int = 0  # bytes of weights
    dense: int = 0
    constants: tuple[str, ...] = field(default=())
    outputs: tuple[str, ...] = ("y",)  # of several, `expected` has the numbers one after the other
    in_tiles: np.ndarray | None = None  # the bound where the processor multiplies tiles of bfloat16; none: the same

    def check(self, y: np.ndarray, instructions: str = "") -> None:
        assert y.shape == self.expected.shape
        undefined = ~np.isfinite(self.expected)
        assert not np.isfinite(y[undefined]).any(), "a number that is not one was hidden"
        error = np.abs(y.astype(np.float64) - self.expected)[~undefined]
        bound = self.bound if self.in_tiles is None or instructions != TILES else self.in_tiles
        limit = bound[~undefined]
        worst = int(np.argmax(error - limit)) if error.size else 0
        assert (error <= limit).all(), f"off by {error[worst]:.3g}, allowed {limit[worst]:.3g}"


def weight(rng: np.random.Generator, K: int, N: int, bits: int, group: int, zeros: bool) -> Weight:
    if bits == 32:
        floats = (rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
        return Weight(rows.pack_float(floats), floats.astype(np.float64))
    groups, top = -(-K // group), (1 << bits) - 1
    codes = rng.integers(0, top, (K, N), dtype=np.uint8, endpoint=True)
    scale = ((rng.random((groups, N)) - 0.3) / top / np.sqrt(K) * 4).astype(np.float16)
    zero = rng.integers(0, top, (groups, N), dtype=np.uint8, endpoint=True) if zeros else None
    middle = np.full((groups, N), 1 << (bits - 1)) if zero is None else zero
    numbers = np.empty((K, N))
    for k in range(K):
        numbers[k] = scale[k // group].astype(np.float64) * (codes[k].astype(np.float64) - middle[k // group])
    return Weight(rows.pack(codes, scale, zero, bits, group), numbers)


def kept(x: np.ndarray, norm: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """bool like x [B,S,K]; the product of magnitude and norm is rounded to float32, as the op does it."""
    if norm.size == 0:
        return np.ones(x.shape, bool)
    with np.errstate(invalid="ignore", over="ignore"):
        return ~(np.abs(x) * norm < threshold.reshape(-1, 1, 1))


def product(x: np.ndarray, keep: np.ndarray, w: Weight, x_bytes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(y, bound) of x [B,S,K] in float64, with what is not kept left out."""
    used = np.where(keep, x, 0).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        y = used @ w.numbers
        size = np.abs(w.numbers)
        bound = FLOAT32 * (np.abs(used) @ size) + 1e-30
        if w.packed.bits == 32:
            return y, bound
        steps = 127 * 128 if w.packed.bits == 8 and x_bytes == 2 else 127
        for begin in range(0, x.shape[-1], w.packed.group):
            part = slice(begin, begin + w.packed.group)
            # x below 1e-36 counts as 0; a millionth more than a half, since scale and quotient are rounded themselves
            step = np.maximum(np.abs(used[..., part]).max(-1, keepdims=True) / steps, 2e-36) / 2 * (1 + 1e-6)
            bound += step * (keep[..., part] @ size[part])
        if x_bytes == 0 and keep.all():
            # codes become floats as (256 + code) * scale - (256 + zero) * scale
            scale = np.repeat(w.packed.scale[:, : size.shape[1]].astype(np.float64), w.packed.group, 0)[: len(size)]
            bound = np.maximum(bound, np.abs(used) @ (BFLOAT16 * size + 512 * 2**-23 * np.abs(scale)))
    undefined = ~np.isfinite(used).all(-1)
    y[undefined] = np.nan
    return y, bound


def bytes_of(w: Weight, listed: np.ndarray) -> tuple[int, int]:
    """(read, dense) bytes of one weight when the listed inputs (bool [K]) are read, with scales and zeros of their groups."""
    p = w.packed
    row, scales = p.codes[0].nbytes, p.scale[:1].nbytes + p.zero[:1].nbytes
    groups = {int(k) // p.group for k in np.flatnonzero(listed)} if p.bits != 32 else set()
    return int(listed.sum()) * row + len(groups) * scales, p.inputs * row + p.scale.nbytes + p.zero.nbytes


@dataclass(frozen=True)
class Sizes:
    """Of a product: B requests of S rows of x, `share` of the inputs above the first request's threshold, more in the next."""

    K: int = 100
    N: int = 129
    B: int = 1
    S: int = 1
    bits: int = 4
    group: int = 32
    zeros: bool = False
    share: float = 0.6  # 1: no norm; 0: nothing kept
    x_bytes: int = 1


def thresholds(scores: np.ndarray, share: float) -> np.ndarray:
    """[B,1] that keeps about `share` of the first request's inputs, and more of each following one's."""
    count = len(scores)
    if share <= 0 or scores.size == 0:
        return np.full((count, 1), np.inf, np.float32)
    levels = [np.quantile(scores[b], 1 - min(1, share + b * (1 - share) / count)) for b in range(count)]
    return np.array(levels, np.float32).reshape(-1, 1)


def matmul(s: Sizes, seed: int = 0, x: np.ndarray | None = None) -> Call:
    rng = np.random.default_rng(seed)
    w = weight(rng, s.K, s.N, s.bits, s.group, s.zeros)
    if x is None:
        x = (rng.standard_normal((s.B, s.S, s.K)) * np.exp(rng.standard_normal(s.K))).astype(np.float32)
    norm = np.linalg.norm(w.numbers, axis=1).astype(np.float32)[: 0 if s.share >= 1 else s.K]
    threshold = thresholds(np.nan_to_num(np.abs(x)) * norm, s.share) if norm.size else np.zeros((s.B, 1), np.float32)
    keep = kept(x, norm, threshold)
    y, bound = product(x, keep, w, s.x_bytes)
    return Call(
        "PackedMatMul",
        {"bits": s.bits, "group": s.group, "N": s.N, "x_bytes": s.x_bytes},
        {"x": x, **_stored("w", w), "norm": norm, "threshold": threshold},
        y,
        bound,
        *bytes_of(w, keep.reshape(-1, s.K).any(0)),
        constants=("w_codes", "w_scale", "w_zero", "norm"),
    )


def _stored(name: str, w: Weight) -> dict[str, np.ndarray]:
    return {f"{name}_codes": w.packed.codes, f"{name}_scale": w.packed.scale, f"{name}_zero": w.packed.zero}


def beside(gate: Weight, up: Weight) -> Weight:
    """Gate and up as one weight, each padded to whole panels."""
    g, u = gate.packed, up.packed
    parts = [np.concatenate([getattr(g, n), getattr(u, n)], axis=-1) for n in ("codes", "scale", "zero")]
    packed = rows.PackedRows(*parts, g.bits, g.group, g.inputs, 2 * g.outputs)
    return Weight(packed, np.concatenate([gate.numbers, up.numbers], axis=1))


def _sigmoid(g):
    return 1 / (1 + np.exp(-g))


def _erf(g):
    import math

    return np.vectorize(math.erf)(g)


# name -> (meaning, largest slope where |gate| <= 6)
ACTIVATIONS = {
    "silu": (lambda g: g * _sigmoid(g), 1.1),
    "swish": (lambda g: g * _sigmoid(g), 1.1),
    "gelu": (lambda g: g / 2 * (1 + _erf(g / np.sqrt(2))), 1.13),
    "gelu_pytorch_tanh": (lambda g: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))), 1.13),
    "gelu_new": (lambda g: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))), 1.13),
    "quick_gelu": (lambda g: g * _sigmoid(1.702 * g), 1.1),
    "relu": (lambda g: np.maximum(g, 0), 1.0),
    "relu2": (lambda g: np.maximum(g, 0) ** 2, 12.0),
    "leaky_relu": (lambda g: np.where(g < 0, 0.01 * g, g), 1.0),
    "sigmoid": (_sigmoid, 0.25),
    "tanh": (np.tanh, 1.0),
    "mish": (lambda g: g * np.tanh(np.log1p(np.exp(g))), 1.1),
}
ACTIVATION = 1e-6  # error of an activation's formula in float32, where |gate| <= 6


def ffn(
    s: Sizes, activation: str = "silu", bits_out: int = 4, group_out: int = 32, seed: int = 0, z_share: float = 0.6
) -> Call:
    """s.K is D, s.N is F. The bound follows the errors of gate, up and z to y; neurons at the threshold may go either way."""
    rng = np.random.default_rng(seed)
    D, F = s.K, s.N
    gate, up = (weight(rng, D, F, s.bits, s.group, s.zeros) for _ in range(2))
    down = weight(rng, F, D, bits_out, group_out, s.zeros)
    x = rng.standard_normal((s.B, s.S, D)).astype(np.float32)
    x_norm = (rng.random(D) + 0.5).astype(np.float32)[: 0 if s.share >= 1 else D]
    x_threshold = thresholds(np.abs(x) * x_norm, s.share) if x_norm.size else np.zeros((s.B, 1), np.float32)
    x_keep = kept(x, x_norm, x_threshold)
    (g, g_error), (u, u_error) = (product(x, x_keep, w, s.x_bytes) for w in (gate, up))
    assert np.abs(g).max() <= 6, "the slopes of the activations are those up to 6"
    meaning, slope = ACTIVATIONS[activation]
    a, a_error = meaning(g), slope * g_error + ACTIVATION
    z, z_error = a * u, a_error * (np.abs(u) + u_error) + np.abs(a) * u_error + 1e-6 * np.abs(a * u)
    z_norm = (rng.random(F) + 0.5).astype(np.float32)[: 0 if z_share >= 1 else F]
    z_threshold = thresholds(np.abs(z) * z_norm, z_share) if z_norm.size else np.zeros((s.B, 1), np.float32)
    scores, limit = np.abs(z) * (z_norm if z_norm.size else 1), z_threshold.reshape(-1, 1, 1)
    z_keep = ~(scores < limit) if z_norm.size else np.ones(z.shape, bool)
    margin = z_error * (z_norm if z_norm.size else 0) * (1 + 1e-6) + 1e-7 * scores
    unsure = np.abs(scores - limit) <= margin if z_norm.size else np.zeros(z.shape, bool)
    y, _ = product(z, z_keep, down)
    _, bound = product(np.abs(z) + z_error, z_keep | unsure, down, s.x_bytes)  # rounding of z
    bound += np.where(z_keep | unsure, z_error, 0) @ np.abs(down.numbers)
    bound += np.where(unsure, np.abs(z), 0) @ np.abs(down.numbers)
    both = beside(gate, up)
    return Call(
        "PackedFFN",
        {
            "bits_in": s.bits, "group_in": s.group, "bits_out": bits_out, "group_out": group_out,
            "activation": activation, "D": D, "F": F, "x_bytes": s.x_bytes,
        },
        {
            "x": x, **_stored("in", both), **_stored("out", down),
            "x_norm": x_norm, "z_norm": z_norm, "x_threshold": x_threshold, "z_threshold": z_threshold,
        },
        y,
        bound,
        constants=(*(f"{w}_{n}" for w in ("in", "out") for n in ("codes", "scale", "zero")), "x_norm", "z_norm"),
    )  # fmt: skip


def residual_norm(rows: int, width: int, seed: int = 0) -> Call:
    """Sums of numbers of all sizes: squares of a row lie up to eight orders apart."""
    rng = np.random.default_rng(seed)
    x, added = (
        (rng.standard_normal((1, rows, width)) * 10 ** rng.uniform(-2, 2, width)).astype(np.float32) for _ in "xa"
    )
    weight = rng.standard_normal(width).astype(np.float32)
    total = x.astype(np.float64) + added
    y = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * weight
    sizes = np.abs(x).astype(np.float64) + np.abs(added)  # of which the sum is rounded
    y_bound = FLOAT32 * (np.abs(y) + sizes * np.abs(np.divide(y, total, out=np.zeros_like(y), where=total != 0)))
    expected, bound = (np.concatenate([a.ravel() for a in two]) for two in ((y, total), (y_bound, FLOAT32 * sizes)))
    inputs = {"x": x, "added": added, "weight": weight}
    return Call("ResidualNorm", {"epsilon": 1e-5}, inputs, expected, bound, constants=("weight",), outputs=("y", "sum"))


@dataclass(frozen=True)
class Head:
    """Of a call of RefineLogits. `spread`: of the logits; `left_out`: how large the remainder's numbers are."""

    K: int = 100
    N: int = 300
    B: int = 1
    S: int = 1
    share: float = 1.0  # of x above the threshold; 1: no norm
    spread: float = 6.0
    left_out: float = 0.02


def refine(s: Head, seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (s.N, -(-s.K // 32), 32), dtype=np.uint8)
    scale = (rng.random(codes.shape[:2]) * s.left_out).astype(np.float16)
    rest = ((codes.astype(np.float64) - 8) * scale[..., None]).reshape(s.N, -1)[:, : s.K]
    both = [codes[..., j] | codes[..., j + 16] << 4 for j in range(16)]
    halves = np.ascontiguousarray(scale.astype("<f2")).view(np.uint8)
    remainder = np.concatenate([np.stack(both, -1).reshape(s.N, -1), halves], axis=1)
    x = rng.standard_normal((s.B, s.S, s.K)).astype(np.float32)
    logits = (rng.standard_normal((s.B, s.S, s.N)) * s.spread).astype(np.float32)
    norm = (rng.random(s.K) + 0.5).astype(np.float32)[: 0 if s.share >= 1 else s.K]
    threshold = thresholds(np.abs(x) * norm, s.share) if norm.size else np.zeros((s.B, 1), np.float32)
    used = np.where(kept(x, norm, threshold), x, 0).astype(np.float64)
    change, size = used @ rest.T, np.abs(used) @ np.abs(rest).T
    # The codes are multiplied before 8 is taken away from them.
    wide = np.abs(used) @ np.repeat(scale.astype(np.float64), 32, axis=1)[:, : s.K].T * 15
    sample = [s.N * i // min(32, s.N) for i in range(min(32, s.N))]
    margin = 16 * np.sqrt((change[..., sample] ** 2).mean(-1, keepdims=True))
    refined = logits >= logits.max(-1, keepdims=True) - margin.astype(np.float32)
    read = remainder.shape[1] * (int(refined.sum()) + s.B * s.S * len(sample))
    return Call(
        "RefineLogits",
        {},
        {"logits": logits, "x": x, "remainder": remainder, "norm": norm, "threshold": threshold},
        np.where(refined, logits + change, logits),
        np.where(refined, FLOAT32 * (size + wide + np.abs(logits)), 0),
        read,
        read,
        constants=("remainder", "norm"),
    )


TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
TYPES |= {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}


# Of CachedAttention, in this order.
OPTIONAL = ("cos", "sin", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "listed")


def names(call: Call) -> list[str]:
    """The inputs of its node, "" where an optional one is left out."""
    required = [n for n in call.inputs if n not in OPTIONAL]
    left_out = [n if n in call.inputs else "" for n in OPTIONAL] if call.op == "CachedAttention" else []
    return required + left_out


def model(call: Call) -> bytes:
    """One node; weights and norms are initialisers."""
    node = helper.make_node(call.op, names(call), call.outputs, domain=DOMAIN, **call.attributes)
    given = [
        helper.make_tensor_value_info(n, TYPES[str(a.dtype)], [None] * a.ndim)
        for n, a in call.inputs.items()
        if n not in call.constants
    ]
    stored = [onnx.numpy_helper.from_array(call.inputs[n], n) for n in call.constants]
    rank = {"y": 4 if call.op == "PromptAttention" else 3, "sum": 3}
    kinds = {
        f"present_{n}": TYPES[str(call.inputs[f"past_{n}"].dtype)]
        for n in ("key", "value")
        if f"past_{n}" in call.inputs
    }
    out = [
        helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), [None] * rank.get(n, 4)) for n in call.outputs
    ]
    graph = helper.make_graph([node], "one", given, out, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
