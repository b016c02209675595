"""Keys and values of requests: one block of memory for all layers, with room behind the last row for those to come.

    past.i.key, past.i.value [B,Hk,C,d]     each request's own rows end at `width`; before them padding, behind them room
                               C >= width   a step writes its rows there and copies nothing; a block that is full moves

Where the native library alone reads it in decode, a row may be bytes instead, [B,Hk,C,w] uint8: rounded when a prompt hands it
over or a step writes it, and numbers again for whoever asks for arrays.

A cache is a value. Those that come one after the other share their memory; one that reads on from a place where another
has already gone on, and that other is still held, gets memory of its own first. A block on a device never leaves it (place.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from ...families import Arrays
from ...host.backend import Cache, Tokens
from ...plugins.cpu import library as native
from .in_place import BIAS, SLOTS
from .place import Held, Place

HERE = Place()
_LEAST_ROOM, _SHARE_OF_ROOM = 64, 8  # rows of room in new memory: 64, and an eighth of those that are there
_STEP = 16
_HIDDEN = np.finfo(np.float32).min


class Memory:
    """A block, and the caches that lie in it."""

    def __init__(self, place: Place, like: Mapping[str, Held], batch: int, width: int):
        """`like`: [any,Hk,any,d] of every input; `width`: rows that are needed at once. New memory is zero, never NaN."""
        # Whole steps of the products' loops over rows: masked ones at the end then change no sum.
        self.capacity = -(-(width + _LEAST_ROOM + width // _SHARE_OF_ROOM) // _STEP) * _STEP
        shapes = {n: (batch, one.shape[1], self.capacity, one.shape[3]) for n, one in like.items()}
        self.place, self.held = place, {n: place.zeros(shape, like[n].dtype) for n, shape in shapes.items()}
        self.caches: WeakSet[Rows] = WeakSet()
        self.changing = threading.RLock()


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of B requests in a block: of request b those in [width - lengths[b], width)."""

    memory: Memory
    lengths: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        with self.memory.changing:
            self.memory.caches.add(self)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray | ort.OrtValue], place: Place = HERE, in_bytes: bool = False) -> Rows:
        """Keys and values of requests that all have as many rows: past.i.key/value or present.i.key/value, copied.

        `in_bytes`: rounded to rows of bytes.
        """
        given = {
            n.replace("present", "past", 1): place.hold(a) if isinstance(a, np.ndarray) else place.held(a)
            for n, a in arrays.items()
        }
        if in_bytes:
            given = {n: place.hold(native.rounded(_array(held))) for n, held in given.items()}
        batch, _, width, _ = next(iter(given.values())).shape
        memory = Memory(place, given, batch, width)
        for name, source in given.items():
            for b in range(batch):
                place.copy_rows(memory.held[name], (b, 0), source, (b, 0), width)
        return cls(memory, (width,) * batch, width)

    def arrays(self) -> Arrays:
        """The rows as arrays [B,Hk,width,d]: views of the memory, or copies of what is in bytes or lies on a device."""
        found = {n: _array(h)[:, :, : self.width] for n, h in self.memory.held.items()}
        return {n: native.widened(a) if a.dtype == np.uint8 else a for n, a in found.items()}

    def alone(self) -> dict[str, ort.OrtValue]:
        """The rows of one request as values [1,Hk,width,d], for a graph that takes no room behind them."""
        place, out = self.memory.place, {}
        for name, held in self.memory.held.items():
            if held.array is not None:
                rows = held.array[:, :, : self.width]
                numbers = native.widened(rows) if rows.dtype == np.uint8 else np.ascontiguousarray(rows)
                out[name] = place.hold(numbers).value
                continue
            one = place.zeros((1, held.shape[1], self.width, held.shape[3]), held.dtype)
            place.copy_rows(one, (0, 0), held, (0, 0), self.width)
            out[name] = one.value
        return out

    def truncated(self, lengths: Sequence[int]) -> Rows:
        """The same without the rows after the first `lengths` of each request."""
        if len(self.lengths) == 1:
            return Rows(self.memory, tuple(lengths), self.width - self.lengths[0] + lengths[0])
        return Rows.regrouped([(self, place) for place in range(len(self.lengths))], lengths)

    @classmethod
    def regrouped(cls, rows: Sequence[tuple[Rows, int]], lengths: Sequence[int] | None = None) -> Rows:
        """The first `lengths` rows (None: all) of these requests together.

        Several are padded to one row more than the longest has: a list of core tokens that is shorter than another is
        filled up with a row that no mask lets through.
        """
        first = rows[0][0]
        had = [cache.lengths[i] for cache, i in rows]
        lengths = list(lengths or had)
        if len(rows) == 1 and len(first.lengths) == 1 and lengths == had:
            return first
        width = lengths[0] if len(rows) == 1 else max(lengths) + 1
        return cls(_copied(rows, had, lengths, width), tuple(lengths), width)

    def going_on(self, new: int) -> tuple[Rows, Rows]:
        """(this cache where `new` rows can be written behind it, the cache with them), both in the same memory."""
        with self.memory.changing:
            is_last = all(other is self or other.width <= self.width for other in self.memory.caches)
            if is_last and self.width + new <= self.memory.capacity:
                return self, Rows(self.memory, tuple(n + new for n in self.lengths), self.width + new)
        places = [(self, place) for place in range(len(self.lengths))]
        moved = Rows(_copied(places, self.lengths, self.lengths, self.width, new), self.lengths, self.width)
        return moved, Rows(moved.memory, tuple(n + new for n in self.lengths), self.width + new)

    def feeds(self, tokens: Tokens) -> Arrays:
        """Where a step that reads these tokens writes its rows, which rows they see, and those that are listed."""
        batch, new, _ = tokens.embeds.shape
        heads, capacity = next(iter(self.memory.held.values())).shape[1:3]
        width = self.width + new
        slots = np.empty((batch, heads, new, 3), np.int64)  # of each new row: request, head, place
        slots[..., 0] = np.arange(batch)[:, None, None]
        slots[..., 1] = np.arange(heads)[:, None]
        slots[..., 2] = np.arange(self.width, width)
        bias = np.full((batch, 1, new, capacity), _HIDDEN, np.float32)
        pads = [width - len(mask) for mask in tokens.masks]
        for b, (pad, mask) in enumerate(zip(pads, tokens.masks, strict=True)):
            bias[b, :, :, pad:width] = np.where(mask, np.float32(0), _HIDDEN)
        if new > 1:  # of the new rows each sees those before it
            bias[..., self.width : width][..., ~np.tri(new, dtype=bool)] = _HIDDEN
        out = {SLOTS: slots, BIAS: bias}
        if tokens.listed is not None:
            most = max(len(ids) for ids in tokens.listed)
            listed = np.zeros((batch, most), np.int32)  # row 0 is padding wherever a list is shorter
            for b, (pad, ids) in enumerate(zip(pads, tokens.listed, strict=True)):
                listed[b, most - len(ids) :] = ids + pad
            out["core_tokens"] = listed
        return out


def _copied(
    rows: Sequence[tuple[Rows, int]], had: Sequence[int], lengths: Sequence[int], width: int, new: int = 0
) -> Memory:
    """New memory with the first `lengths` of the rows that requests `had`, ending at `width`; `new`: more to come at once."""
    first = rows[0][0].memory
    memory = Memory(first.place, first.held, len(rows), width + new)
    for name, there in memory.held.items():
        for b, (cache, i) in enumerate(rows):
            source, start = cache.memory.held[name], cache.width - had[b]
            first.place.copy_rows(there, (b, width - lengths[b]), source, (i, start), lengths[b])
    return memory


def _array(held: Held) -> np.ndarray:
    return held.value.numpy() if held.array is None else held.array


def own(cache: Cache) -> Rows:
    """A cache that this backend made."""
    if not isinstance(cache, Rows):
        raise TypeError(f"a cache of {type(cache).__name__}")
    return cache
