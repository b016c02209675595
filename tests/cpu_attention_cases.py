"""Calls of CachedAttention with their meaning in float64, and how far sums in float32 may take an answer from it.

A narrow cache is widened here; a new row may be off by half a step: of float16 2^-11 of each number, of bytes scale / 2, scale =
max |x| / 127 of 32 numbers, rounded to a bfloat16.
"""

from dataclasses import dataclass

import numpy as np
from cpu_cases import Call

LEAST = np.finfo(np.float32).min
EPSILON = 1e-5
FLOAT32 = 1e-6  # relative error of a sum, of an exponential
TOGETHER = 32  # numbers of a row that share a scale
BFLOAT16 = 2**-8  # relative error of a scale
# Of float16: relative error of a number, that of those below 2^-14, and the largest one.
FLOAT16, LEAST_STEP, MOST = 2**-11, 2**-25, 65504


def widened(rows: np.ndarray, d: int) -> np.ndarray:
    """float32 [...,d] of float16, or of rows of bytes [...,w]: int8 codes, then the upper halves of their float32 scales."""
    if rows.dtype != np.uint8:
        return rows.astype(np.float32)
    scales = np.ascontiguousarray(rows[..., d:]).view(np.uint16).astype(np.uint32) << 16
    of_each = np.repeat(scales.view(np.float32), TOGETHER, -1)[..., :d]
    return rows[..., :d].view(np.int8).astype(np.float32) * of_each


def half_a_step(x: np.ndarray, form: str) -> np.ndarray:
    """How far rounding takes each number of float64 [...,d]."""
    if form == "fp16":
        return np.maximum(np.abs(x) * FLOAT16, LEAST_STEP)
    out = np.empty_like(x)
    for begin in range(0, x.shape[-1], TOGETHER):
        part = slice(begin, begin + TOGETHER)
        out[..., part] = np.abs(x[..., part]).max(-1, keepdims=True) / 127 / 2 * (1 + BFLOAT16)
    return out


@dataclass(frozen=True)
class NarrowCall(Call):
    """Its answer: y and the bits of each cell of keys and values, flat; what is expected: y and their numbers."""

    def check(self, y: np.ndarray, instructions: str = "") -> None:
        cache = self.inputs["past_key"]
        ends = np.cumsum([y.size - 2 * cache.size, cache.size])
        of_y, *both = np.split(y, ends)
        cells = [part.astype(f"uint{8 * cache.itemsize}").view(cache.dtype).reshape(cache.shape) for part in both]
        numbers = [widened(rows, self.attributes["d"]).ravel() for rows in cells]
        super().check(np.concatenate([of_y, *numbers]), instructions)


@dataclass(frozen=True)
class Sizes:
    """B requests read N tokens over C rows of a cache; `past` rows are there already, those before `pad` are hidden.

    `turned`: halves (cos and sin of half a head), whole, or nothing; `side`: q, k and v are columns of one product.
    """

    B: int = 1
    N: int = 1
    heads: int = 4
    kv_heads: int = 2
    d: int = 24
    past: int = 5
    room: int = 3
    pad: int = 0
    holes: float = 0.0
    turned: str = "halves"
    rotary: int = 0  # 0: d, where anything is turned
    bias: bool = False
    norm: bool = False
    side: bool = False
    listed: int = 0  # rows of the past that are listed, besides the new ones; 0: no list
    shared: bool = False  # one mask, one row of cos and sin for all requests
    form: str = "fp32"  # of the cache

    @property
    def capacity(self) -> int:
        return self.past + self.N + self.room

    @property
    def numbers_turned(self) -> int:
        return 0 if self.turned == "nothing" else self.rotary or self.d // 2 * 2


def attention(s: Sizes, seed: int = 0, **changed: np.ndarray) -> Call:
    """`changed`: inputs that replace the random ones."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    widths, first = [n * s.d for n in (s.heads, s.kv_heads, s.kv_heads)], [0, 0, 0]
    if s.side:
        both = normal(s.B, s.N, 3 + sum(widths))
        first = [3, 3 + widths[0], 3 + sum(widths[:2])]
        inputs = dict.fromkeys("qkv", both)
    else:
        inputs = {name: normal(s.B, s.N, w) for name, w in zip("qkv", widths, strict=True)}
    cache = (s.B, s.kv_heads, s.capacity, s.d)
    inputs |= {"past_key": normal(*cache), "past_value": normal(*cache)}
    if s.form != "fp32":
        narrow = _in_bytes if s.form == "int8" else _in_halves
        inputs |= {name: narrow(rng, inputs[name]) for name in ("past_key", "past_value")}
    slots = np.moveaxis(np.indices((s.B, s.kv_heads, s.N)), 0, -1).copy()
    slots[..., 2] += s.past
    mask_of = 1 if s.shared else s.B
    seen = rng.random((mask_of, 1, s.N, s.capacity)) >= s.holes
    at = np.arange(s.capacity)
    seen &= (at >= s.pad) & (at <= s.past + np.arange(s.N)[:, None])
    seen |= at == s.past + np.arange(s.N)[:, None]  # itself
    inputs |= {"slots": slots, "mask": np.where(seen, rng.uniform(-2, 2, seen.shape), LEAST).astype(np.float32)}
    turned = s.numbers_turned
    if turned:
        angle = rng.uniform(-9, 9, (mask_of, s.N, turned // 2 if s.turned == "halves" else turned))
        inputs |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
        if s.turned == "whole":
            inputs |= {n: inputs[n][:, None] for n in ("cos", "sin")}
    if s.bias:
        inputs |= {f"{name}_bias": normal(w) for name, w in zip("qkv", widths, strict=True)}
    if s.norm:
        inputs |= {f"{name}_norm": normal(s.d) for name in "qk"}
    if s.listed:
        own = [[*rng.permutation(s.past)[: s.listed], *range(s.past, s.past + s.N)] for _ in range(s.B)]
        inputs["listed"] = np.array(own, np.int32)
    inputs |= changed
    attributes = dict(heads=s.heads, kv_heads=s.kv_heads, d=s.d, rotary=turned, scale=0.3, epsilon=EPSILON)
    attributes |= dict(zip(("q_first", "k_first", "v_first"), first, strict=True))
    expected, bound = meaning(s, first, inputs)
    outputs = ("y", "present_key", "present_value")
    kind = Call if s.form == "fp32" else NarrowCall
    return kind("CachedAttention", attributes, inputs, expected, bound, outputs=outputs)


def _in_halves(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """float16 of all sizes, some below 2^-14."""
    return (rows * 2.0 ** rng.integers(-20, 2, rows.shape)).astype(np.float16)


def _in_bytes(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Rows of bytes of the same shape: random codes, and scales that differ from one 32 numbers to the next."""
    d = rows.shape[-1]
    scales = (rng.uniform(0.2, 2, (*rows.shape[:-1], -(-d // TOGETHER))) / 127).astype(np.float32)
    upper = np.ascontiguousarray((scales.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    codes = rng.integers(-127, 127, rows.shape, np.int8, endpoint=True)
    return np.concatenate([codes.view(np.uint8), upper], -1)


def _row(inputs: dict[str, np.ndarray], name: str, place: int, s: Sizes, first: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [B,N,d] of one head of q, k or v as it is read, and the size of its error."""
    columns = slice(first + place * s.d, first + (place + 1) * s.d)
    x = inputs[name][..., columns].astype(np.float64)
    if f"{name}_bias" in inputs:
        x = x + inputs[f"{name}_bias"][place * s.d : (place + 1) * s.d]
    size = np.abs(x)
    if f"{name}_norm" in inputs:
        factor = inputs[f"{name}_norm"] / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
        x, size = x * factor, 2 * size * np.abs(factor)
    turned = 0 if name == "v" else s.numbers_turned
    if turned:
        half = turned // 2
        cos, sin = (inputs[n] if inputs[n].ndim == 3 else inputs[n][:, 0] for n in ("cos", "sin"))
        a, b, sizes = x[..., :half].copy(), x[..., half:turned].copy(), size[..., :half] + size[..., half:turned]
        x[..., :half] = a * cos[..., :half] - b * sin[..., :half]
        x[..., half:turned] = b * cos[..., -half:] + a * sin[..., -half:]
        size[..., :turned] = np.concatenate([sizes, sizes], -1)
    return x, FLOAT32 * size


def meaning(s: Sizes, first: list[int], inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """y, keys and values one after the other, flat, and how far away each number may be."""
    memory = {n: inputs[f"past_{n}"] for n in ("key", "value")}
    memory = {n: widened(a, s.d).astype(np.float64) for n, a in memory.items()}
    error = {n: np.zeros_like(a) for n, a in memory.items()}
    for h in range(s.kv_heads):
        for name, part in (("key", "k"), ("value", "v")):
            rows, errors = _row(inputs, part, h, s, first["qkv".index(part)])
            if s.form == "fp16":
                rows = np.clip(rows, -MOST, MOST)
            if s.form != "fp32":
                errors = errors + half_a_step(np.abs(rows) + errors, s.form)
            for b, n in np.ndindex(s.B, s.N):
                memory[name][b, h, inputs["slots"][b, h, n, 2]] = rows[b, n]
                error[name][b, h, inputs["slots"][b, h, n, 2]] = errors[b, n]
    y = np.zeros((s.B, s.N, s.heads, s.d))
    y_error = np.zeros_like(y)
    mask = np.broadcast_to(inputs["mask"], (s.B, 1, s.N, s.capacity))
    for h in range(s.heads):
        q, q_error = _row(inputs, "q", h, s, first[0])
        kv = h * s.kv_heads // s.heads
        for b, n in np.ndindex(s.B, s.N):
            read = np.flatnonzero(mask[b, 0, n] > LEAST)
            if s.listed:
                read = np.array([row for row in inputs["listed"][b] if row in read])
            keys, values = memory["key"][b, kv][read], memory["value"][b, kv][read]
            with np.errstate(invalid="ignore"):
                score = 0.3 * keys @ q[b, n] + mask[b, 0, n][read].astype(np.float64)
                sizes = 0.3 * (np.abs(keys) @ (np.abs(q[b, n]) * FLOAT32 + q_error[b, n]))
                sizes += 0.3 * (error["key"][b, kv][read] @ np.abs(q[b, n])) + FLOAT32 * np.abs(score)
                share = np.exp(score - score.max())
                share /= share.sum()
                y[b, n, h] = share @ values
                grown = np.expm1(2 * sizes.max()) + 3 * FLOAT32  # by which a share may be off
                y_error[b, n, h] = grown * (share @ np.abs(values))
                y_error[b, n, h] += (1 + grown) * (share @ error["value"][b, kv][read])
    parts = [(y, y_error), *((memory[n], error[n]) for n in ("key", "value"))]
    return tuple(np.concatenate([part[i].ravel() for part in parts]) for i in (0, 1))


CASES = [
    Sizes(), Sizes(turned="nothing"), Sizes(d=1, heads=1, kv_heads=1), Sizes(d=64, heads=9, kv_heads=3, past=130, holes=0.3),
    Sizes(N=7, B=2, past=40, pad=11, bias=True), Sizes(N=16, heads=7, kv_heads=1, d=40, turned="whole"),
    Sizes(d=128, heads=14, kv_heads=2, past=70, rotary=32, B=3, shared=True), Sizes(past=0, room=0), Sizes(B=0), Sizes(N=0),
    Sizes(N=3, B=2, norm=True, bias=True, side=True, d=80), Sizes(heads=40, kv_heads=1, d=8, past=20),
    Sizes(B=2, N=3, past=60, holes=0.2, listed=25, pad=9), Sizes(N=5, heads=6, kv_heads=6, d=70, turned="whole", norm=True),
    *(Sizes(form=form, **more) for form in ("int8", "fp16") for more in (
        {}, dict(d=64, heads=9, kv_heads=3, past=130, holes=0.3), dict(d=1, heads=1, kv_heads=1), dict(B=0),
        dict(B=2, N=7, past=70, pad=11, bias=True, d=70, heads=6, kv_heads=6),
        dict(B=2, N=3, d=128, heads=14, kv_heads=2, past=80, rotary=32, listed=25, norm=True, side=True),
    )),
]  # fmt: skip
