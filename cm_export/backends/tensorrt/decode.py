"""Decode on an engine whose cache has a fixed number of rows: keys and values never leave the device.

Several tokens at once go through the engine's profile for them, in pieces where they are more, and one by one where it has none.
Per step one copy up (embeddings, positions, masks, rows to write, listed rows), one launch, one copy down (logits).
What stays the same for all steps (core neurons, rows, bias) lies in memory of the decoder's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ...base.errors import CmExportError
from ...families import Arrays
from ...host.backend import Cache, Tokens
from ...host.core_set import CoreSet, padded
from .cache import StaticCache, own
from .cuda import laid_out, one_at_a_time
from .session import Session

BUCKET = 128  # core_tokens is padded to a multiple of this, so that few shapes occur
_STEP = ("inputs_embeds", "position_ids", "attention_mask", "write_index", "core_tokens")


class Decoder:
    """Reads tokens for some requests."""

    def __init__(self, backend: Any, graph: str, cores: Sequence[CoreSet]):
        """`backend`: backend.Backend."""
        self._backend, self._graph, self._batch = backend, graph, len(cores)
        self._sessions: dict[int, Session] = {}  # by profile: what is dropped meanwhile stays with whoever decodes
        self._session = session = self._for(1)
        self._cuda = session.cuda
        self._several = next((n for n in range(self._most(), 1, -1) if self._at_once(n) is not None), 1)
        self._past = [n for n in session.inputs if n.startswith("past.")]
        given = core_inputs(backend, session, cores)
        absent = [n for n in session.inputs if n not in (*_STEP, *self._past, *given)]
        if absent:
            raise CmExportError(f"nothing is known for its input {absent[0]}", where=f"{session.graph} engine")
        self._give(given)
        self._stage()

    def _most(self) -> int:
        return int(self._backend.largest(self._graph, "inputs_embeds")[1])

    def _at_once(self, new: int) -> int | None:
        profile: int | None = self._backend.profile_for(self._graph, self._batch, new)
        return profile

    def _for(self, new: int) -> Session:
        """The session that reads so many tokens at once. Raises InputError for more requests than the engine takes."""
        profile = self._at_once(new)
        if profile is None:  # the engine says what it takes
            most = self._backend.largest(self._graph, "inputs_embeds")
            self._backend.session(self._graph).shape("inputs_embeds", (self._batch, new, most[2]))
        profile = profile or 0
        if profile not in self._sessions:
            self._sessions[profile] = self._backend.session(self._graph, profile)
        return self._sessions[profile]

    def _give(self, given: Arrays) -> None:
        """What stays the same for all steps, in one piece of memory that is this decoder's alone."""
        types = self._session.dtypes
        places, size = laid_out({n: v.size * types[n].itemsize for n, v in given.items()})
        self._loan = self._backend.for_answers.take(size) if given else None
        self._given: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, value in given.items():
            assert self._loan  # given something, so there is memory for it
            address = self._loan.address + places[name]
            self._cuda.upload(address, np.ascontiguousarray(value, types[name]))
            self._given[name] = address, value.shape

    def _stage(self) -> None:
        """Pinned memory on the host and its like on the device, a part for each input that changes with every step.

        Of the largest batch, so that decoders of any share them: each reads to the end before another does.
        """
        session = self._session
        most = {n: self._backend.largest(self._graph, n) for n in _STEP if session.has(n)}
        self._at, self._size = laid_out({n: math.prod(s) * session.dtypes[n].itemsize for n, s in most.items()})
        step, logits = f"{session.graph}/step", f"{session.graph}/logits"
        self._up, self._step = self._backend.pinned(step, self._size), session.buffers.get(step, self._size)
        batch, new, _ = most["inputs_embeds"]
        self._vocab = session.static_shape("logits")[-1]
        size = batch * new * self._vocab * session.dtypes["logits"].itemsize
        self._down, self._out = self._backend.pinned(logits, size), session.buffers.get(logits, size)

    def read(self, tokens: Tokens, cache: Cache) -> tuple[np.ndarray, StaticCache]:
        """Logits [B,N,V] after each of N new tokens, and the cache. Raises InputError when the cache is full."""
        self._backend.check_rows(self._session, max(own(cache).lengths) + tokens.embeds.shape[1])
        logits, static = [], own(cache)
        for some in pieces(tokens, self._several):
            found, static = self._read(some, static)
            logits.append(found)
        return np.concatenate(logits, 1) if len(logits) > 1 else logits[0], static

    @one_at_a_time
    def _read(self, tokens: Tokens, cache: StaticCache) -> tuple[np.ndarray, StaticCache]:
        new = tokens.embeds.shape[1]
        session = self._for(new)
        changing = self._changing(session, tokens, cache)
        static = cache.writable()
        for name, value in changing.items():
            session.shape(name, value.shape)
            self._up.array(self._at[name], value.shape, session.dtypes[name])[...] = value
            session.bind(name, self._step.address + self._at[name])
        self._cuda.upload_pinned(self._step.address, self._up, self._size)
        for name, (address, shape) in self._given.items():
            session.shape(name, shape)
            session.bind(name, address)
        for past in self._past:
            session.shape(past, (self._batch, *static.memory.shapes[past]))
            session.bind(past, static.address(past))
            session.bind(past.replace("past", "present", 1), static.address_after(past))
        session.bind("logits", self._out.address)
        session.infer()
        session.replay(self._backend.note)
        logits = self._down.array(0, (self._batch, new, self._vocab), session.dtypes["logits"])
        self._cuda.download(self._out.address, logits)
        self._cuda.wait()
        return logits.astype(np.float32), static.stepped(new)  # a copy: the memory is the next step's

    def _changing(self, session: Session, tokens: Tokens, cache: StaticCache) -> Arrays:
        """The inputs of this step as the engine takes them."""
        if tokens.listed is not None and not session.has("core_tokens"):
            what = "it reads every row, not the listed ones"
            raise CmExportError(what, where=f"{session.graph} engine", fix=session.library.elsewhere)
        whole = np.zeros((self._batch, session.static_shape("attention_mask")[1]), np.int64)
        for row, mask in zip(whole, tokens.masks, strict=True):
            row[: len(mask)] = mask
        out = {
            "inputs_embeds": tokens.embeds,
            "position_ids": tokens.positions,
            "attention_mask": whole,
            "write_index": np.array(cache.lengths, np.int64),
        }
        if session.has("core_tokens"):
            out["core_tokens"] = listed_rows(tokens.listed, whole)
        return {n: v for n, v in out.items() if session.has(n)}


def pieces(tokens: Tokens, most: int) -> Iterator[Tokens]:
    """The same tokens, at most so many at a time: each piece sees the rows of those before it."""
    new = tokens.embeds.shape[1]
    for begin in range(0, new, most):
        end = min(begin + most, new)
        behind = new - end  # rows at the end of masks and lists that are not there yet
        yield Tokens(
            embeds=tokens.embeds[:, begin:end],
            positions=tokens.positions[:, :, begin:end],
            masks=tuple(mask[: len(mask) - behind] for mask in tokens.masks),
            listed=tokens.listed and tuple(rows[: len(rows) - behind] for rows in tokens.listed),
        )


def listed_rows(core_tokens: Sequence[np.ndarray] | None, mask: np.ndarray) -> np.ndarray:
    """[B,M] int32: the rows to read, ascending; M a multiple of BUCKET, at most C. None lists every row of mask [B,C].

    Behind the listed ones stands the last row of the cache, whose mask is 0: see Backend.check_rows.
    """
    capacity = mask.shape[1]
    rows = [np.flatnonzero(m) for m in mask] if core_tokens is None else list(core_tokens)
    size = min(capacity, -(-max(len(r) for r in rows) // BUCKET) * BUCKET)
    out = np.full((len(rows), size), capacity - 1, np.int32)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = ids
    return out


class Takes(Protocol):
    """What runs a decode graph: a session here, or a model of a server."""

    @property
    def inputs(self) -> Collection[str]:
        """Their names."""

    def has(self, name: str) -> bool:
        """Whether it has an input of that name."""


def core_inputs(backend: Any, session: Takes, cores: Sequence[CoreSet]) -> Arrays:
    """Inputs of the whole answer that core sets decide, under the names that the engine has for them.

    core_neurons [L,B,K] where layers are alike, core_neurons.i [B,K_i] where they differ in number; ffn.i.* [B,K_i,D]
    where no plugin reads rows; core_bias [L,B,D]; core_thresholds [B,4L+1].
    """
    out: Arrays = {}
    for name in session.inputs:
        if name == "core_neurons":
            layers = range(len(cores[0].counts))
            out[name] = padded([[core.of_layer(layer) for core in cores] for layer in layers], backend.block)
        elif name.startswith("core_neurons."):
            out[name] = padded([[core.of_layer(int(name.rpartition(".")[2])) for core in cores]], backend.block)[0]
        elif name.startswith("core_slots."):  # read for its length
            out[name] = np.zeros(cores[0].counts[int(name.rpartition(".")[2])] // backend.block, np.int32)
    if any(name.startswith("ffn.") for name in session.inputs):
        gathered = backend.rows.gather(cores).rows.items()
        out |= {n: np.broadcast_to(v, (len(cores), *v.shape[1:])) for n, v in gathered if session.has(n)}
    if session.has("core_bias"):
        out["core_bias"] = np.stack([core.bias(backend.down) for core in cores], 1)
    if session.has("core_thresholds"):
        out["core_thresholds"] = np.stack([core.least for core in cores])
    return out
