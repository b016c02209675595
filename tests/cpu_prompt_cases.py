"""Calls of PromptAttention with their meaning in float64, and how far sums in float32 may take an answer from it."""

from dataclasses import dataclass

import numpy as np
from cpu_cases import BFLOAT16, Call

LEAST = np.finfo(np.float32).min
FLOAT32 = 1e-6  # relative error of a sum, of an exponential


@dataclass(frozen=True)
class Sizes:
    """N queries see M keys. `seen`: all (no mask), causal, pieces (two pictures), holes; `mask`: float, infinite or bool.

    `shape`: axes of [B,H,N,M] that the mask has; others are 1, and leading ones are left out.
    """

    B: int = 1
    heads: int = 4
    kv_heads: int = 2
    N: int = 9
    M: int = 9
    d: int = 24
    seen: str = "causal"
    mask: str = "float"
    shape: str = "BNM"
    pad: int = 0  # keys before it are hidden


def prompt(s: Sizes, seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((s.B, s.heads, s.N, s.d)).astype(np.float32)
    k, v = (rng.standard_normal((s.B, s.kv_heads, s.M, s.d)).astype(np.float32) for _ in "kv")
    inputs = {"q": q, "k": k, "v": v}
    mask = np.zeros((1, 1, 1, 1))
    if s.seen != "all":
        n, m = np.arange(s.N)[:, None], np.arange(s.M)
        at = {"causal": m <= n + s.M - s.N, "pieces": (n < s.N // 2) == (m < s.M // 3), "holes": m >= 0}[s.seen]
        size = [x if axis in s.shape else 1 for axis, x in zip("BHNM", (s.B, s.heads, s.N, s.M), strict=True)]
        shown = np.broadcast_to(at & (m >= s.pad), (s.B, s.heads, s.N, s.M))[tuple(slice(0, x) for x in size)].copy()
        if s.seen == "holes":
            shown &= rng.random(shown.shape) < 0.6
        shown[..., -1] |= s.seen == "holes"  # every query sees a key
        if s.mask == "bool":
            inputs["mask"], mask = shown, np.where(shown, 0.0, -np.inf)
        else:
            hidden = LEAST if s.mask == "float" else -np.inf
            inputs["mask"] = np.where(shown, rng.uniform(-2, 2, shown.shape), hidden).astype(np.float32)
            mask = np.where(shown, inputs["mask"].astype(np.float64), -np.inf)
        while inputs["mask"].shape and inputs["mask"].shape[0] == 1 and inputs["mask"].ndim > 2:
            inputs["mask"] = inputs["mask"][0]
    group = s.heads // s.kv_heads
    keys, values = (np.repeat(a.astype(np.float64), group, 1) for a in (k, v))
    scale = 0.3
    scores = scale * q.astype(np.float64) @ keys.swapaxes(-1, -2) + mask
    sizes = 2 * FLOAT32 * scale * np.abs(q).astype(np.float64) @ np.abs(keys).swapaxes(-1, -2)
    sizes += FLOAT32 * np.abs(np.where(np.isfinite(scores), scores, 0))
    with np.errstate(invalid="ignore"):
        share = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    total = share.sum(-1, keepdims=True)
    share = np.divide(share, total, out=np.zeros_like(share), where=total > 0)
    size = share @ np.abs(values)
    error = (2 * sizes.max(-1, keepdims=True, initial=0) + 3 * FLOAT32) * size
    # q and k in two parts of bfloat16 each, of which the product of the second ones is left out; shares and values in one
    rest = (
        2**-14
        * scale
        * (np.abs(q).astype(np.float64) @ np.abs(keys).swapaxes(-1, -2)).max(-1, keepdims=True, initial=0)
    )
    tiles = error + (2 * rest + BFLOAT16) * size
    return Call("PromptAttention", {"scale": scale}, inputs, share @ values, error + 1e-30, in_tiles=tiles + 1e-30)


CASES = [
    Sizes(), Sizes(seen="all"), Sizes(N=1, M=1, d=1, heads=1, kv_heads=1),
    Sizes(N=70, M=70, d=64, heads=6, kv_heads=2, B=2, pad=3),
    Sizes(N=33, M=100, d=80, seen="all", heads=3, kv_heads=3), Sizes(N=40, M=130, d=72, seen="pieces", mask="bool", shape="NM"),
    Sizes(N=5, M=60, mask="infinite", seen="holes", shape="BHNM", B=2),
    Sizes(N=37, M=37, d=17, seen="holes", mask="bool", shape="HNM"),
    Sizes(N=8, M=90, seen="holes", shape="M"), Sizes(N=64, M=200, d=128, heads=8, kv_heads=1, shape="NM", mask="infinite"),
    Sizes(N=0, M=4), Sizes(B=0), Sizes(N=50, M=50, seen="pieces", mask="infinite", shape="NM"),
]  # fmt: skip
