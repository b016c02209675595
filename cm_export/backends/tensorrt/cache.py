"""Keys and values of requests on the device, in buffers of a fixed number of rows: what decode engines read and write.

    prefill present [1,Hk,T,d] --copied--> past [1,Hk,C,d]        regroup: rows of several such caches side by side [B,Hk,C,d]
    in_place: one set, present is past                            copy: two sets that change places at each step

A cache is a value. Those that come one after the other share their memory; one that reads on from a place where another
has already gone on, and that other is still held, gets memory of its own first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import ml_dtypes
import numpy as np

from ...base.errors import CmExportError
from ...host.backend import Cache
from .cuda import Buffers, Cuda, Loan, Pool, laid_out
from .session import Held

_DTYPES = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class CacheMemory:
    """Where caches get their memory; what one leaves is given to the next."""

    def __init__(self, cuda: Cuda, engines: Mapping[str, Any]):
        """`engines`: the manifest's, which says names, shapes and types of the decode engine's inputs."""
        self.cuda, self._pool, self.sets = cuda, Pool(cuda), 1 if engines["kv"] == "in_place" else 2
        inputs = [v for v in engines["graphs"]["decode"]["inputs"] if v["name"].startswith("past.")]
        self.shapes = {v["name"]: tuple(v["shape"][1:]) for v in inputs}  # [Hk,C,d]
        self.dtypes = {v["name"]: np.dtype(_DTYPES[v["dtype"]]) for v in inputs}
        self.bytes = {n: math.prod(s) * self.dtypes[n].itemsize for n, s in self.shapes.items()}  # of one request

    def take(self, places: int) -> Loan:
        """A set for so many requests. New memory is zero: rows that no mask lets through must not be NaN."""
        return self._pool.take(laid_out({n: places * size for n, size in self.bytes.items()})[1], cleared=True)


class Owned:
    """The memory of caches that come one after the other, given back when none of them is held any more."""

    def __init__(self, memory: CacheMemory, places: int):
        self._memory, self._places, self._sets = memory, places, [memory.take(places)]
        self._at, _ = laid_out({n: places * size for n, size in memory.bytes.items()})
        self.caches: WeakSet[StaticCache] = WeakSet()

    def address(self, which: int, past: str, place: int) -> int:
        """Of the rows of one request in set `which`; the second set is taken when first asked for."""
        if which == len(self._sets):
            self._sets.append(self._memory.take(self._places))
        return self._sets[which].address + self._at[past] + place * self._memory.bytes[past]


@dataclass(frozen=True, eq=False)
class StaticCache:
    """Rows of B requests at places `first`, `first` + 1, ..: of request b the first lengths[b], in the set `current`."""

    memory: CacheMemory
    owned: Owned
    lengths: tuple[int, ...]
    first: int = 0
    current: int = 0

    def __post_init__(self) -> None:
        self.owned.caches.add(self)

    @classmethod
    def filled(cls, memory: CacheMemory, present: Mapping[str, Held]) -> StaticCache:
        """The rows that a prefill put on the device, copied: the next prefill writes to the same place."""
        owned, rows = Owned(memory, 1), 0
        for past, shape in memory.shapes.items():
            given = present[past.replace("past", "present", 1)].checked()
            batch, heads, rows, width = given.shape
            if (batch, heads, width) != (1, shape[0], shape[2]) or given.dtype != memory.dtypes[past]:
                what = f"{given.dtype}{list(given.shape)} does not fit into {memory.dtypes[past]}{[1, *shape]}"
                raise CmExportError(what, where=f"decode engine: {past}", fix="build the engines again")
            size = given.dtype.itemsize * width
            args = owned.address(0, past, 0), size * shape[1], given.address, size * rows, size * rows, heads
            memory.cuda.copy_rows(*args)
        memory.cuda.wait()
        return cls(memory, owned, (rows,))

    @classmethod
    def regrouped(cls, memory: CacheMemory, rows: Sequence[tuple[Cache, int]]) -> StaticCache:
        """The requests at these places of other caches, together; neighbours that stay neighbours are not copied."""
        parts = [(own(cache), place) for cache, place in rows]
        one, place = parts[0]
        here = [(c.owned, c.current, c.first + i) for c, i in parts]
        if here == [(one.owned, one.current, one.first + place + b) for b in range(len(parts))]:
            lengths = tuple(c.lengths[i] for c, i in parts)
            return cls(memory, one.owned, lengths, one.first + place, one.current)
        return cls._copied(memory, parts)

    @classmethod
    def _copied(cls, memory: CacheMemory, parts: Sequence[tuple[StaticCache, int]]) -> StaticCache:
        owned = Owned(memory, len(parts))
        for past, (heads, capacity, width) in memory.shapes.items():
            size = memory.dtypes[past].itemsize * width
            for b, (cache, i) in enumerate(parts):
                to, source = owned.address(0, past, b), cache.address(past, i)
                memory.cuda.copy_rows(to, size * capacity, source, size * capacity, size * cache.lengths[i], heads)
        memory.cuda.wait()
        return cls(memory, owned, tuple(cache.lengths[i] for cache, i in parts))

    def address(self, past: str, place: int = 0) -> int:
        """Where the rows of an input begin, of all requests from `place` on."""
        return self.owned.address(self.current, past, self.first + place)

    def address_after(self, past: str) -> int:
        """Where the next step writes them."""
        return self.owned.address(self._following, past, self.first)

    @property
    def _following(self) -> int:
        return (self.current + 1) % self.memory.sets

    def writable(self) -> StaticCache:
        """This cache, or a copy of it where its next row would be written over a row of another that is still held."""
        if any(other is not self and other.goes_beyond(self) for other in self.owned.caches):
            return self._copied(self.memory, [(self, place) for place in range(len(self.lengths))])
        return self

    def goes_beyond(self, other: StaticCache) -> bool:
        """Whether this cache has more rows of a request than `other`, in the same memory."""
        ours = {self.first + i: n for i, n in enumerate(self.lengths)}
        return any(ours.get(other.first + i, 0) > n for i, n in enumerate(other.lengths))

    def stepped(self, new: int) -> StaticCache:
        """After a step, which has written so many more rows of every request."""
        return replace(self, lengths=tuple(n + new for n in self.lengths), current=self._following)

    def alone(self, memory: Buffers, name: str) -> dict[str, Held]:
        """The rows of one request as [1,Hk,P,d] without room behind them, copied into buffers of that name."""
        (rows,), cuda, out = self.lengths, self.memory.cuda, {}
        for past, (heads, capacity, width) in self.memory.shapes.items():
            dtype, size = self.memory.dtypes[past], self.memory.dtypes[past].itemsize * width
            there = memory.get(f"{name}/{past}", heads * rows * size)
            cuda.copy_rows(there.address, size * rows, self.address(past), size * capacity, size * rows, heads)
            out[past] = Held(there.address, (1, heads, rows, width), dtype, lambda: True)
        return out

    def truncated(self, lengths: Sequence[int]) -> StaticCache:
        """The same without the rows after the first `lengths` of each request."""
        return replace(self, lengths=tuple(lengths))


def own(cache: Cache) -> StaticCache:
    """A cache that this backend made."""
    if not isinstance(cache, StaticCache):
        raise TypeError(f"a cache of {type(cache).__name__}")
    return cache
