"""Decode on an engine whose cache has a fixed number of rows: one token a step, keys and values never leave the device.

    prefill present [B,Hk,T,d] --copied once--> past [B,Hk,C,d]     row write_index is written at each step
    in_place: present is past        copy: two sets that change places at each step

Per step one copy up (embedding, position, mask, row, listed rows), one launch, one copy down (logits).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.errors import CmExportError, InputError
from .cuda import Pinned
from .session import ELSEWHERE, Held, Session

if TYPE_CHECKING:
    from .backend import Backend

BUCKET = 128  # core_tokens is padded to a multiple of this, so that few shapes occur
_ALIGNED = 256  # bytes
_STEP = ("inputs_embeds", "position_ids", "attention_mask", "write_index", "core_tokens")


class Decoder:
    """One request's decode; the static cache is the backend's, so only the newest decoder may step."""

    def __init__(self, backend: "Backend", session: Session, cache: Mapping[str, Any], constants: Mapping[str, Any]):
        """`cache`: present.i.key/value of a prefill; `constants`: core set of the whole answer (numpy)."""
        self._backend, self._session, self._cuda = backend, session, session.cuda
        self._capacity = backend.rows_held(session)
        self._past = sorted(n for n in session.inputs if n.startswith("past."))
        self._parity, self._shapes = 0, {}
        backend.newest = self
        self._fill(cache)
        constants = _constants(session, constants)
        for name, value in constants.items():
            session.give(name, value)
        absent = [n for n in session.inputs if n not in (*_STEP, *self._past, *constants)]
        if absent:
            raise CmExportError(f"nothing is known for its input {absent[0]}", where=f"{session.graph} engine")
        self._stage()
        self._cuda.wait()

    @property
    def cache(self) -> dict[str, Any]:
        """Empty: it stays with this decoder."""
        return {}

    def _fill(self, cache: Mapping[str, Held]) -> None:
        """The prefill's rows into the first set of static buffers."""
        session = self._session
        for past in self._past:
            given = cache[past.replace("past", "present", 1)].checked()
            batch, heads, rows, width = given.shape
            shape = self._shapes[past] = (batch, *session.static_shape(past)[1:])
            if (heads, width) != (shape[1], shape[3]) or given.dtype != session.dtypes[past]:
                what = f"{given.dtype}{list(given.shape)} does not fit into {session.dtypes[past]}{list(shape)}"
                raise CmExportError(what, where=f"{session.graph} engine: {past}", fix="build the engines again")
            self._backend.check_rows(session, rows + 1)
            size = given.dtype.itemsize * width
            to = self._backend.static(past, 0, shape, given.dtype)
            args = to, size * shape[2], given.address, size * rows, size * rows, batch * heads
            self._cuda.copy_rows(*args)

    def _stage(self) -> None:
        """Pinned memory on the host and its like on the device, a part for each input that changes with every step."""
        session, self._at, size = self._session, {}, 0
        for name in _STEP:
            if session.has(name):
                most = session.limits(name)[1]
                self._at[name] = size
                size += -(-math.prod(most) * session.dtypes[name].itemsize // _ALIGNED) * _ALIGNED
        self._size = size
        self._pinned: Pinned = self._backend.pinned("step", size)
        self._device = session.buffers.get("step", size).address
        logits = (next(iter(self._shapes.values()))[0], *session.static_shape("logits")[1:])
        self._logits_size = math.prod(logits) * session.dtypes["logits"].itemsize
        self._logits_down = self._backend.pinned("logits", self._logits_size)
        self._logits = self._logits_down.array(0, logits, session.dtypes["logits"])
        self._logits_at = session.buffers.get("logits", self._logits_size).address

    def step(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [B,V] after the new token; feeds as of the protocol."""
        return self.read(feeds)[:, -1]

    def read(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [B,1,V]. Raises InputError for several tokens, and when the cache is full."""
        if self._backend.newest is not self:
            raise CmExportError("another request has replaced this decoder's cache", fix="decode one request at a time")
        if feeds["inputs_embeds"].shape[1] != 1:
            what = f"{feeds['inputs_embeds'].shape[1]} tokens at once"
            raise InputError(what, where=f"{self._session.graph} engine reads one at a time", fix=ELSEWHERE)
        session = self._session
        for name, value in self._changing(feeds).items():
            session.shape(name, value.shape)
            self._pinned.array(self._at[name], value.shape, session.dtypes[name])[...] = value
            session.bind(name, self._device + self._at[name])
        self._cuda.upload_pinned(self._device, self._pinned, self._size)
        for past in self._past:
            shape, dtype = self._shapes[past], session.dtypes[past]
            here = self._backend.static(past, self._parity, shape, dtype)
            there = here if self._backend.in_place else self._backend.static(past, 1 - self._parity, shape, dtype)
            session.shape(past, shape)
            session.bind(past, here)
            session.bind(past.replace("past", "present", 1), there)
        session.bind("logits", self._logits_at)
        session.infer()
        session.replay(self._backend.note)
        self._parity = self._parity if self._backend.in_place else 1 - self._parity
        self._cuda.download(self._logits_at, self._logits)
        self._cuda.wait()
        return self._logits.astype(np.float32)  # a copy: the memory is the next step's

    def _changing(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of this step as the engine takes them."""
        mask, session = feeds["attention_mask"], self._session
        if "core_tokens" in feeds and not session.has("core_tokens"):
            raise CmExportError(
                "it reads every row, not the listed ones", where=f"{session.graph} engine", fix=ELSEWHERE
            )
        batch, rows = mask.shape
        self._backend.check_rows(session, rows)
        whole = np.zeros((batch, self._capacity), np.int64)
        whole[:, :rows] = mask
        out = {n: feeds[n] for n in ("inputs_embeds", "position_ids")}
        out |= {"attention_mask": whole, "write_index": np.full(batch, rows - 1, np.int64)}
        if session.has("core_tokens"):
            out["core_tokens"] = listed_rows(feeds.get("core_tokens"), whole)
        return {n: v for n, v in out.items() if session.has(n)}

    def truncate(self, rows: int) -> None:
        """Raises InputError: only the guard asks for it, which reads several tokens at once."""
        raise InputError("what was read cannot be taken back", where=f"{self._session.graph} engine", fix=ELSEWHERE)


def listed_rows(core_tokens: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
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


def _constants(session: Session, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of the whole answer: the core neurons under the name that the engine has for them, rows, bias.

    core_neurons [L,B,K] where layers are alike, core_neurons.i [B,K_i] where they differ in number; all, if none are named.
    """
    out = {n: v for n, v in given.items() if session.has(n)}
    index = given.get("core_neurons")
    for name in session.inputs:
        if name == "core_neurons" and index is None:
            layers, batch = session.limits(name)[1][:2]
            every = np.arange(given["core_counts"].max(), dtype=np.int32)
            out[name] = np.broadcast_to(every, (layers, batch, len(every)))
        elif name.startswith("core_neurons."):
            layer = int(name.rpartition(".")[2])
            count = int(given["core_counts"][layer])
            every = np.arange(count, dtype=np.int32)[None]
            out[name] = every if index is None else index[layer, :, :count]
    return out
