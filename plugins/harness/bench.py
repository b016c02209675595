"""How fast the kernels are beside dense products, in the same process and against the same copy bandwidth.

    one figure = a CUDA graph of one call per weight set, replayed; its time / sets

There are so many weight sets that they exceed the second-level cache several times: a set that was just read would be
read from there, as no model's layer is. Dense is torch.matmul (cuBLAS), as it stands and through torch.compile.
A step is one token through all layers: our kernels or dense ones, cuBLAS for the projections in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .library import Library, Tensor
from .timing import HALF, CudaMachine, Kernel, Machine, quartiles


@dataclass(frozen=True)
class Sizes:
    """One decoder: hidden D, neurons F, heads H, Hk of d numbers, layers, rows of the cache P."""

    name: str
    D: int
    F: int
    H: int
    Hk: int
    layers: int
    d: int = 128
    P: int = 4096


MODELS = (Sizes("qwen2-vl-2b", 1536, 8960, 12, 2, 28), Sizes("qwen2-vl-7b", 3584, 18944, 28, 4, 28))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
BLOCKS = (1, 8, 32)
GROUP = 64  # columns per scale of low-bit weights
TOKEN_SHARES = (0.1, 0.25, 0.5, 1.0)
STEP_SHARES = ((0.4, 0.5), (0.2, 0.25))  # of neurons and of cached tokens


def measure(
    library: Library,
    machine: Machine | None = None,
    models: tuple[Sizes, ...] = MODELS,
    shares: tuple[float, ...] = SHARES,
    compiled: bool = True,
) -> dict[str, Any]:
    """All figures, in microseconds: medians with quartiles; bandwidths in GB/s."""
    machine = machine or CudaMachine()
    copy = copy_bandwidth(machine)
    out: dict[str, Any] = {"copy_gb_s": copy, "ffn": [], "attention": [], "step": []}
    with torch.inference_mode():
        for sizes in models:
            out["ffn"] += list(_ffn(library, machine, sizes, shares, compiled, copy["median"]))
            out["attention"] += list(_attention(library, machine, sizes, copy["median"]))
            out["step"] += list(_steps(library, machine, sizes))
    return out


def copy_bandwidth(machine: Machine) -> dict[str, float]:
    """Bytes read and written per second by a copy that is far larger than the cache."""
    size = max(8 * machine.cache_bytes, 2**22)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    return quartiles([2 * size / t for t in machine.seconds(partial(target.copy_, source))], 1e-9)


# ---------------------------------------------------------------------------------------------------- one FFN
def _half(machine: Machine, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16, device=machine.device) * shape[-1] ** -0.5


def _sets(machine: Machine, whole: float, least_share: float) -> int:
    """How many weights of `whole` bytes, of which a share is read, exceed the cache four times; at most 256, and what
    fits in half of the memory."""
    wanted = int(-(-4 * machine.cache_bytes // (whole * least_share)))
    return max(1, min(wanted, 256, int(machine.memory_bytes / 2 // whole)))


def _ids(machine: Machine, available: int, count: int) -> torch.Tensor:
    return torch.randperm(available, device=machine.device)[:count].sort().values.to(torch.int32)[None]


def dense_ffn(x, w_gate, w_up, w_down_t):
    return (torch.nn.functional.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down_t


def _record(times: list[float], calls: int, read: float, copy_gb_s: float, **what: Any) -> dict[str, Any]:
    each = quartiles([t / calls for t in times], 1e6)
    gb_s = read / each["median"] * 1e-3
    return what | {"us": each, "bytes": int(read), "gb_s": gb_s, "share_of_copy": gb_s / copy_gb_s, "calls": calls}


def _ffn(library, machine, sizes, shares, compiled, copy_gb_s) -> Iterator[dict[str, Any]]:
    """Dense products and CoreFFN; `speedup` is against torch.matmul on all neurons in half precision."""
    x = _half(machine, 1, 1, sizes.D) * sizes.D**0.5
    functions = {"torch.matmul": dense_ffn} | ({"torch.compile": torch.compile(dense_ffn)} if compiled else {})
    dense = 0.0
    for bits in (0, 8, 4):
        whole = 3 * sizes.F * _row_bytes(sizes, bits)
        count = _sets(machine, whole, min(shares))
        if bits:
            sets = [_packed(machine, sizes, bits) for _ in range(count)]
        else:
            sets = [[_half(machine, sizes.F, sizes.D) for _ in range(3)] for _ in range(count)]
            for name, function in functions.items():
                times = machine.seconds(partial(_each, function, x, sets))
                found = _record(times, count, whole, copy_gb_s, model=sizes.name, kernel=name, share=1.0)
                dense = dense or found["us"]["median"]
                yield found | {"speedup": dense / found["us"]["median"]}
        for block in BLOCKS:
            for share in shares:
                count = max(1, round(share * sizes.F / block))
                found = _core_ffn(library, machine, sizes, x, sets, bits, block, count, copy_gb_s)
                yield found | {"share": share, "speedup": dense / found["us"]["median"]}


def _row_bytes(sizes: Sizes, bits: int) -> float:
    """Of one neuron in one matrix, with its scales."""
    return sizes.D * bits / 8 + sizes.D / GROUP * 2 if bits else sizes.D * 2


def _each(function, x, sets, *more):
    return [function(x, *weights, *more) for weights in sets]


def _packed(machine, sizes, bits):
    """Random words and scales: how fast they are read does not depend on what they mean."""
    words = (sizes.F, sizes.D * bits // 32)
    low = [torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=machine.device) for _ in range(3)]
    scale = 0.8 / 2 ** (bits - 1)  # so that sums of the products stay in the range of half precision
    return low + [_half(machine, sizes.F, sizes.D // GROUP) * scale for _ in range(3)]


def ffn_kernel(library, machine, sizes, bits, block, count) -> Kernel:
    weight = Tensor("int32", (sizes.F, sizes.D * bits // 32)) if bits else Tensor(HALF, (sizes.F, sizes.D))
    scales = [Tensor(HALF, (sizes.F, sizes.D // GROUP))] * (3 if bits else 0)
    x, ids = Tensor(HALF, (1, 1, sizes.D)), Tensor("int32", (1, count))
    attributes = {"activation": "silu", "block": block, "bits": bits, "group": GROUP if bits else 0}
    outputs = [x, Tensor(HALF, (1, 1, count * block))]
    return Kernel(library, machine, "CoreFFN", attributes, [x, *[weight] * 3, *scales, ids], outputs)


def _core_ffn(library, machine, sizes, x, sets, bits, block, count, copy_gb_s):
    kernel = ffn_kernel(library, machine, sizes, bits, block, count)
    ids = _ids(machine, sizes.F // block, count)
    error = _error(kernel(x, *sets[0], ids), x, sets[0], ids, bits, block)
    times = machine.seconds(partial(_each, kernel, x, sets, ids))
    what = {"model": sizes.name, "kernel": "CoreFFN", "bits": bits or 16, "block": block, "neurons": count * block}
    found = _record(times, len(sets), 3 * count * block * _row_bytes(sizes, bits), copy_gb_s, **what)
    return found | {"relative_error": error}


def _error(y, x, weights, ids, bits, block) -> float:
    """|y - r| / |r| with r in float32 from the same weights. Raises RuntimeError above what half precision explains."""
    rows = (ids[0].long()[:, None] * block + torch.arange(block, device=ids.device)).flatten()
    gate, up, down = (
        _unpacked(weights[i][rows], weights[3 + i][rows], bits) if bits else weights[i][rows].float() for i in range(3)
    )
    expected = dense_ffn(x.float(), gate, up, down)
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < 1e-3:
        raise RuntimeError(f"CoreFFN of {len(rows)} neurons in {bits or 16} bits is off by {error:.2g} of its norm")
    return error


def _unpacked(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Low-bit weights [N,D] in float32, lowest bits first."""
    codes = torch.stack([words << (32 - bits - at) >> (32 - bits) for at in range(0, 32, bits)], -1)
    return codes.flatten(1).float() * scales.float().repeat_interleave(GROUP, 1)


# ---------------------------------------------------------------------------------------------------- attention
def attention_kernel(library, machine, sizes, rows) -> Kernel:
    q, cache = Tensor(HALF, (1, sizes.H, 1, sizes.d)), Tensor(HALF, (1, sizes.Hk, sizes.P, sizes.d))
    inputs = [q, cache, cache, Tensor(HALF, (1, 1, 1, sizes.P)), Tensor("int32", (1, rows))]
    return Kernel(library, machine, "CoreAttention", {"scale": sizes.d**-0.5}, inputs, [q])


def dense_attention(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _caches(machine, sizes):
    return [_half(machine, 1, sizes.Hk, sizes.P, sizes.d) for _ in range(2)]


def _attention(library, machine, sizes, copy_gb_s) -> Iterator[dict[str, Any]]:
    q, mask = (
        _half(machine, 1, sizes.H, 1, sizes.d),
        torch.zeros(1, 1, 1, sizes.P, dtype=torch.float16, device=machine.device),
    )
    whole = 2 * sizes.Hk * sizes.P * sizes.d * 2
    caches = [_caches(machine, sizes) for _ in range(_sets(machine, whole, min(TOKEN_SHARES)))]
    times = machine.seconds(partial(_each, dense_attention, q, caches, mask))
    yield _record(times, len(caches), whole, copy_gb_s, model=sizes.name, kernel="torch sdpa", share=1.0)
    for share in TOKEN_SHARES:
        rows = max(1, round(share * sizes.P))
        kernel, ids = attention_kernel(library, machine, sizes, rows), _ids(machine, sizes.P, rows)
        times = machine.seconds(partial(_each, kernel, q, caches, mask, ids))
        what = {"model": sizes.name, "kernel": "CoreAttention", "share": share, "rows": rows}
        yield _record(times, len(caches), whole * rows / sizes.P, copy_gb_s, **what)


# ---------------------------------------------------------------------------------------------------- a whole step
def _steps(library, machine, sizes) -> Iterator[dict[str, Any]]:
    """One token through the layers (norms, rotary embedding and vocabulary left out of both), sparse beside dense."""
    D, heads, kv = sizes.D, sizes.H * sizes.d, sizes.Hk * sizes.d
    per_layer = 2 * (3 * sizes.F * D + D * (2 * heads + 2 * kv) + 2 * sizes.P * kv)
    layers = max(1, min(sizes.layers, int(0.6 * machine.memory_bytes // per_layer)))
    weights = [
        {
            "qkv": _half(machine, heads + 2 * kv, D),
            "out": _half(machine, D, heads),
            "cache": _caches(machine, sizes),
            "ffn": [_half(machine, sizes.F, D) for _ in range(3)],
        }
        for _ in range(layers)
    ]
    mask = torch.zeros(1, 1, 1, sizes.P, dtype=torch.float16, device=machine.device)
    start = _half(machine, 1, 1, D)

    def step(attend, ffn):
        x = start
        for w in weights:
            q = (x @ w["qkv"].T)[..., :heads].view(1, 1, sizes.H, sizes.d).transpose(1, 2).contiguous()
            x = x + attend(q, *w["cache"], mask).transpose(1, 2).reshape(1, 1, heads) @ w["out"].T
            x = x + ffn(x, *w["ffn"])
        return x

    def timed(attend, ffn):
        return quartiles(machine.seconds(partial(step, attend, ffn)), 1e6)

    dense = timed(dense_attention, dense_ffn)
    what = {"model": sizes.name, "layers": layers, "of_layers": sizes.layers}
    yield what | {"kernel": "dense", "us": dense}
    for neurons, tokens in STEP_SHARES:
        count, rows = max(1, round(neurons * sizes.F)), max(1, round(tokens * sizes.P))
        core_ffn = ffn_kernel(library, machine, sizes, 0, 1, count)
        core_attention = attention_kernel(library, machine, sizes, rows)
        neuron_ids, token_ids = _ids(machine, sizes.F, count), _ids(machine, sizes.P, rows)

        def sparse_ffn(x, *w, kernel=core_ffn, ids=neuron_ids):
            return kernel(x, *w, ids)

        def sparse_attention(*tensors, kernel=core_attention, ids=token_ids):
            return kernel(*tensors, ids)

        us = timed(sparse_attention, sparse_ffn)
        shares = {"neurons": neurons, "tokens": tokens}
        yield what | {"kernel": "sparse", **shares, "us": us, "speedup": dense["median"] / us["median"]}
