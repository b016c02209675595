"""Keys and values of requests on the device, in buffers of a fixed number of rows: what decode engines read and write.

    prefill present [1,Hk,T,d] --copied--> past [1,Hk,C,d]        regroup: rows of several such caches side by side [B,Hk,C,d]
    in_place: one set, present is past                            copy: two sets that change places at each step

Rows up to a request's length never change, so an older cache of the same request stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ...base.errors import CmExportError
from ...host.backend import Cache
from .cuda import Buffer, Cuda
from .session import Held

_DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Set = dict[str, Buffer]  # by name of the past input


class CacheMemory:
    """Sets of buffers for caches of B requests; one that nobody uses any more is given to the next of its size."""

    def __init__(self, cuda: Cuda, engines: Mapping[str, Any]):
        """`engines`: the manifest's, which says names, shapes and types of the decode engine's inputs."""
        self.cuda, self.in_place = cuda, engines["kv"] == "in_place"
        inputs = [v for v in engines["graphs"]["decode"]["inputs"] if v["name"].startswith("past.")]
        self.shapes = {v["name"]: tuple(v["shape"][1:]) for v in inputs}  # [Hk,C,d]
        self.dtypes = {v["name"]: np.dtype(_DTYPES[v["dtype"]]) for v in inputs}
        self._spare: dict[int, list[list[Set]]] = {}

    def take(self, batch: int) -> Owned:
        """Sets for a cache of `batch` requests. New memory is zero: rows that no mask lets through must not be NaN."""
        spare = self._spare.get(batch)
        return Owned(self, batch, spare.pop() if spare else [self._new(batch) for _ in range(2 - self.in_place)])

    def _new(self, batch: int) -> Set:
        out = {}
        for name, shape in self.shapes.items():
            out[name] = Buffer(self.cuda, batch * math.prod(shape) * self.dtypes[name].itemsize)
            self.cuda.clear(out[name])
        return out

    def give_back(self, batch: int, sets: list[Set]) -> None:
        """Keep one group of sets of each size; more is freed."""
        self._spare[batch] = [sets]


class Owned:
    """The sets of buffers of a cache and of all that come after it; given back when none of them is left."""

    def __init__(self, memory: CacheMemory, batch: int, sets: list[Set]):
        self._memory, self._batch, self.sets = memory, batch, sets

    def __del__(self) -> None:
        self._memory.give_back(self._batch, self.sets)


@dataclass(frozen=True, eq=False)
class StaticCache:
    """Rows of B requests: the first lengths[b] of request b are its own, in the set that is current."""

    memory: CacheMemory
    owned: Owned
    lengths: tuple[int, ...]
    current: int = 0

    @classmethod
    def filled(cls, memory: CacheMemory, present: Mapping[str, Held]) -> StaticCache:
        """The rows that a prefill put on the device, copied: the next prefill writes to the same place."""
        owned = memory.take(1)
        rows = 0
        for past, shape in memory.shapes.items():
            given = present[past.replace("past", "present", 1)].checked()
            batch, heads, rows, width = given.shape
            if (batch, heads, width) != (1, shape[0], shape[2]) or given.dtype != memory.dtypes[past]:
                what = f"{given.dtype}{list(given.shape)} does not fit into {memory.dtypes[past]}{[1, *shape]}"
                raise CmExportError(what, where=f"decode engine: {past}", fix="build the engines again")
            size = given.dtype.itemsize * width
            args = owned.sets[0][past].address, size * shape[1], given.address, size * rows, size * rows, heads
            memory.cuda.copy_rows(*args)
        memory.cuda.wait()
        return cls(memory, owned, (rows,))

    @classmethod
    def regrouped(cls, memory: CacheMemory, rows: Sequence[tuple[Cache, int]]) -> StaticCache:
        """The requests at these places of other caches, together."""
        parts = [(cache, place) for cache, place in rows if isinstance(cache, StaticCache)]
        if len(parts) != len(rows):
            raise TypeError("a cache of another backend")
        first = parts[0][0]
        if len(parts) == 1 and len(first.lengths) == 1:
            return first
        owned = memory.take(len(parts))
        for past, (heads, capacity, width) in memory.shapes.items():
            size = memory.dtypes[past].itemsize * width
            for b, (cache, place) in enumerate(parts):
                source = cache.buffer(past).address + place * heads * capacity * size
                to = owned.sets[0][past].address + b * heads * capacity * size
                length = size * cache.lengths[place]
                memory.cuda.copy_rows(to, size * capacity, source, size * capacity, length, heads)
        memory.cuda.wait()
        return cls(memory, owned, tuple(cache.lengths[place] for cache, place in parts))

    def buffer(self, past: str) -> Buffer:
        """Where the rows of an input lie."""
        return self.owned.sets[self.current][past]

    @property
    def following(self) -> int:
        """The set that the next step writes."""
        return (self.current + 1) % len(self.owned.sets)

    def stepped(self) -> StaticCache:
        """After a step, which has written one more row of every request."""
        return replace(self, lengths=tuple(n + 1 for n in self.lengths), current=self.following)

    def truncated(self, lengths: Sequence[int]) -> StaticCache:
        """The same without the rows after the first `lengths` of each request; they are written over."""
        return replace(self, lengths=tuple(lengths))
