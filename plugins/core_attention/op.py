"""CoreAttention: grouped-query attention that reads only the listed rows of the KV cache.

    y[b,h,s] = sum_p softmax_p(scale * q[b,h,s] . k[b,g,p] + mask[b,0,s,p]) * v[b,g,p]      g = h // (H / Hk)
               over p in core_tokens[b], or over all P rows without it

    y[B,H,S,d] = CoreAttention(q[B,H,S,d], k[B,Hk,P,d], v[B,Hk,P,d], mask[B|1,1,S,P][, core_tokens[B,M] int32]; scale)

Causality, padding and windows are in the additive mask (type of q); an index in any order keeps it right, because the
mask's columns are picked with the rows. Every query must see at least one listed row: a softmax over nothing has no
meaning. A row listed twice counts twice unless its mask is -inf, so a shorter request pads its list with a masked row.
Source: Attention of ONNX opset 23; the core-token view of the cache, CoreMatching, arXiv 2505.19235, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from cm_export.base.onnx_text import function as parse

from ..contract import Arrays, Op, declared

# GatherND with two batch axes copies rows of d from where they lie: no transposed copy of the cache; it takes int64.
_READ_LISTED_ROWS = """
    one = Constant <value_ints = [1]> ()
    around_heads = Constant <value_ints = [1, 3]> ()
    around_queries = Constant <value_ints = [1, 2]> ()
    batch = Shape <start = 0, end = 1> (q)
    queries = Shape <start = 2, end = 3> (q)
    kv_heads = Shape <start = 1, end = 2> (k)
    ids_BM = Cast <to = 7> (core_tokens)

    ids_B1M1 = Unsqueeze (ids_BM, around_heads)
    per_head = Concat <axis = 0> (one, kv_heads, one, one)
    rows_BGM1 = Expand (ids_B1M1, per_head)
    k_read = GatherND <batch_dims = 2> (k, rows_BGM1)
    v_read = GatherND <batch_dims = 2> (v, rows_BGM1)

    ids_B11M = Unsqueeze (ids_BM, around_queries)
    per_query = Concat <axis = 0> (one, one, queries, one)
    columns_B1SM = Expand (ids_B11M, per_query)
    per_request = Concat <axis = 0> (batch, one, one, one)
    mask_B1SP = Expand (mask, per_request)
    mask_read = GatherElements <axis = 3> (mask_B1SP, columns_B1SM)
    y = Attention <scale: float = @scale> (q, k_read, v_read, mask_read)"""


def function(index: bool) -> onnx.FunctionProto:
    """The body of CoreAttention for a graph, whose nodes all share it: (q, k, v, mask[, core_tokens]) => (y).

    `index`: whether core_tokens [B,M] is an input. Float32 or float16; the attribute `scale` is the factor on q . k.
    """
    inputs = "q, k, v, mask" + (", core_tokens" if index else "")
    body = _READ_LISTED_ROWS if index else "y = Attention <scale: float = @scale> (q, k, v, mask)"
    return parse(f"CoreAttention {declared('scale')} ({inputs}) => (y) {{ {body} }}")


def oracle(feeds: Arrays, attributes: Mapping[str, Any]) -> Arrays:
    """Dense attention, one query at a time, with weight zero for every cache row that is not listed."""
    q, k, v, mask = (feeds[n].astype(np.float64) for n in ("q", "k", "v", "mask"))
    ids = feeds.get("core_tokens", np.broadcast_to(np.arange(k.shape[2]), (len(q), k.shape[2])))
    y = np.empty_like(q)
    for b, h, s in np.ndindex(q.shape[:3]):
        g = h * k.shape[1] // q.shape[1]
        score = attributes["scale"] * (k[b, g] @ q[b, h, s]) + mask[b % len(mask), 0, s]
        score[~np.isin(np.arange(len(score)), ids[b])] = -np.inf
        weight = np.exp(score - score.max())
        y[b, h, s] = weight @ v[b, g] / weight.sum()
    return {"y": y}


@dataclass(frozen=True)
class Case:
    """Sizes and form. The last S of the P rows are the queries' own; the mask is causal with holes.

    Rows differ per request, and each list holds one row that every query sees. `mask_rows`: "B" or "1" masks per batch.
    """

    index: bool
    B: int = 1
    H: int = 2
    Hk: int = 2
    S: int = 1
    P: int = 9
    M: int = 4
    d: int = 8
    mask_rows: str = "B"
    dtype: str = "float32"
    ascending: bool = True
    seed: int = 0

    @property
    def form(self) -> dict[str, Any]:
        return {"index": self.index}

    @property
    def attributes(self) -> dict[str, Any]:
        return {"scale": 1.25 * self.d**-0.5}  # not the default of Attention, which a lost attribute would give

    @property
    def axes(self) -> dict[str, str]:
        axes = {"q": "B,H,S,d", "k": "B,Hk,P,d", "v": "B,Hk,P,d", "mask": f"{self.mask_rows},1,S,P"}
        return axes | ({"core_tokens": "B,M"} if self.index else {}) | {"y": "B,H,S,d"}

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(self.seed)
        cache = (self.B, self.Hk, self.P, self.d)
        sizes = {"q": (self.B, self.H, self.S, self.d), "k": cache, "v": cache}
        out = {n: rng.standard_normal(shape).astype(self.dtype) for n, shape in sizes.items()}
        seen = rng.random((self.B if self.mask_rows == "B" else 1, 1, self.S, self.P)) < 0.7
        seen &= np.arange(self.P) <= np.arange(self.S)[:, None] + self.P - self.S
        seen[..., 0] = True
        out["mask"] = np.where(seen, 0, np.finfo(self.dtype).min).astype(self.dtype)
        if self.index:
            others = np.broadcast_to(np.arange(1, self.P), (self.B, self.P - 1))
            ids = np.pad(rng.permuted(others, axis=-1)[:, : self.M - 1], ((0, 0), (1, 0)))
            ids = np.sort(ids, axis=-1) if self.ascending else rng.permuted(ids, axis=-1)
            out["core_tokens"] = ids.astype(np.int32)
        return out


_SIZES = (
    {},
    {"B": 3, "H": 6, "Hk": 3, "S": 5, "P": 11, "M": 7, "d": 5},
    {"B": 2, "H": 6, "Hk": 1, "S": 1, "P": 13, "M": 6},
    {"B": 3, "H": 14, "Hk": 2, "S": 5, "P": 17, "M": 9, "mask_rows": "1"},
    {"B": 2, "M": 1},
    {"B": 3, "S": 3, "M": 9},
    {"P": 1, "M": 1, "d": 1},
    {"B": 2, "H": 4, "S": 2, "P": 33, "M": 16, "d": 64, "ascending": False},
    {"B": 3, "H": 12, "Hk": 2, "S": 5, "P": 21, "M": 10, "dtype": "float16"},
)
OP = Op(
    name="CoreAttention",
    version="1",
    attributes=("scale",),
    body=function,
    oracle=oracle,
    cases=tuple(Case(index, **sizes) for index in (False, True) for sizes in _SIZES),
)
