"""The decode loop: requests write their answers together, one graph call a step for all that can share one.

Row      one request between its prefill and the end of its answer: cache, core set, tokens so far, stop rule
Reader   reads tokens for rows: groups them, regroups caches when rows join or leave, gathers core rows once
Batch    choose a token for every row -> hand it out -> read all of them -> ...      rows come and go between steps

request a  | prompt ..... a1 a2 a3 .          its own length, positions, core neurons, core tokens, budget
request b          | prompt .. b1 b2 b3 b4    joined later; leaves when it ends
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..base.metrics import check_numbers, log_softmax
from .backend import Backend, Cache, Decoder, Tokens
from .core_set import CoreSet
from .request import Request
from .writing import Writing

# logits [V] of the next token, how many were chosen before -> a token id, or None where the answer ends
Choose = Callable[[np.ndarray, int], int | None]
Graph = str  # "decode" or "decode_dense"


def greedy(stop: frozenset[int] = frozenset()) -> Choose:
    """The most likely token, until one of `stop`."""

    def choose(logits: np.ndarray, _: int) -> int | None:
        token = int(logits.argmax())
        return None if token in stop else token

    return choose


def sampled(rng: np.random.Generator, stop: frozenset[int] = frozenset()) -> Choose:
    """Drawn from the model's own distribution (temperature 1), until one of `stop`."""

    def choose(logits: np.ndarray, _: int) -> int | None:
        p = np.exp(log_softmax(logits))
        token = int(rng.choice(len(p), p=p / p.sum()))
        return None if token in stop else token

    return choose


def forced(ids: Sequence[int]) -> Choose:
    """These tokens, whatever the model would say."""
    return lambda _, chosen: int(ids[chosen]) if chosen < len(ids) else None


def recorded(choose: Choose, into: list[np.ndarray]) -> Choose:
    """The same, and the logits [V] from which each token was chosen are kept."""

    def watched(logits: np.ndarray, chosen: int) -> int | None:
        into.append(logits)
        return choose(logits, chosen)

    return watched


@dataclass(eq=False)
class Row:
    """One request that is being answered: everything that a step needs to know about it."""

    request: Request
    core: CoreSet
    cache: Cache
    logits: np.ndarray  # [V] after the last token that was read, or [N,V] after each of several
    graph: Graph = "decode"
    kept: np.ndarray | None = None  # [T] int64: which rows of the prompt's cache count; None: all S of them
    listed: np.ndarray | None = None  # [M] int32: rows of the prompt that decode reads; None: all that count
    few_rows: bool = False  # whether most reads are of 2 to 16 tokens
    choose: Choose = field(default_factory=greedy)
    writing: Writing | None = None  # its text as it comes, which knows the strings that end it
    limit: int = 128  # tokens of the answer
    place: int = 0  # of this request in `cache`, which it may share
    read: int = 0  # tokens after the prompt that are in the cache
    ids: list[int] = field(default_factory=list)  # the answer so far
    ended: str | None = None  # "stop", "string" or "limit"

    @property
    def last(self) -> np.ndarray:
        """[V]: logits after the last token."""
        return self.logits if self.logits.ndim == 1 else self.logits[-1]

    def mask(self, new: int) -> np.ndarray:
        """[P+new] int64: which rows of the cache count, the new ones included."""
        prompt = np.ones(self.request.tokens, np.int64) if self.kept is None else self.kept
        return np.concatenate([prompt, np.ones(self.read + new, np.int64)])

    def rows_read(self, new: int) -> np.ndarray | None:
        """[M] int32: the listed rows of the prompt, and all of the answer's."""
        if self.listed is None:
            return None
        answer = np.arange(self.request.tokens, self.request.tokens + self.read + new, dtype=np.int32)
        return np.concatenate([self.listed, answer])

    def follow(self, other: Row) -> None:
        """Go on from where another row of the same request is."""
        self.cache, self.place, self.read, self.logits = other.cache, other.place, other.read, other.last

    def back_to(self, read: int) -> None:
        """Forget what was read after the first `read` tokens."""
        lengths = list(self.cache.lengths)
        lengths[self.place] -= self.read - read
        self.cache, self.read = self.cache.truncated(lengths), read


@dataclass
class Spent:
    """Seconds of one read: making decoders, which gathers core rows, and everything else."""

    gather: float = 0.0
    step: float = 0.0


_Group = tuple[list[Row], list[Sequence[int]]]
# What a decoder is made for: graph, few_rows, whether every row is read, and the core sets in the order of the rows.
_Key = tuple[Graph, bool, bool, tuple[CoreSet, ...]]


class Reader:
    """Reads tokens for rows. A decoder is kept as long as the same core sets read together, in the same order."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._decoders: dict[_Key, Decoder] = {}

    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Spent:
        """Read `tokens` of each row: its logits and its cache are those after them.

        Raises InputError, CmExportError for logits that are no numbers.
        """
        spent, groups = Spent(), self._groups(rows, tokens)
        keys = [_key(members) for members, _ in groups]
        graphs = {key[:2] for key in keys}
        for key in [k for k in self._decoders if k[:2] in graphs and k not in keys]:
            del self._decoders[key]  # its rows have left or read with others now; a new decoder can use its memory
        for key, (members, ids) in zip(keys, groups, strict=True):
            started = time.perf_counter()
            if key not in self._decoders:
                self._decoders[key] = self._backend.decoder(members[0].graph, key[-1], members[0].few_rows)
            made = time.perf_counter()
            self._read(self._decoders[key], members, ids)
            spent.gather += made - started
            spent.step += time.perf_counter() - made
        return spent

    def _groups(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> list[_Group]:
        """Rows that one graph call can serve, with their tokens; at most `most` of them together."""
        alike: dict[Hashable, _Group] = {}
        for row, ids in zip(rows, tokens, strict=True):
            key = (row.graph, row.few_rows, len(ids), self._backend.together(row.core), row.listed is None)
            members, of_members = alike.setdefault(key, ([], []))
            members.append(row)
            of_members.append(ids)
        most, out = self._backend.most, []
        for members, of_members in alike.values():
            starts = range(0, len(members), most)
            out += [(members[i : i + most], of_members[i : i + most]) for i in starts]
        return out

    def _read(self, decoder: Decoder, rows: list[Row], ids: list[Sequence[int]]) -> None:
        cache = rows[0].cache
        if [(id(cache), i) for i in range(len(cache.lengths))] != [(id(row.cache), row.place) for row in rows]:
            cache = self._backend.regroup([(row.cache, row.place) for row in rows])
        logits, cache = decoder.read(_tokens(rows, ids), cache)
        check_numbers(logits, f"{rows[0].graph} graph")
        for place, row in enumerate(rows):
            row.cache, row.place, row.read = cache, place, row.read + len(ids[place])
            row.logits = logits[place, -1] if len(ids[place]) == 1 else logits[place]


def _key(rows: list[Row]) -> _Key:
    return rows[0].graph, rows[0].few_rows, rows[0].listed is None, tuple(row.core for row in rows)


def _tokens(rows: list[Row], ids: list[Sequence[int]]) -> Tokens:
    listed = [row.rows_read(len(new)) for row, new in zip(rows, ids, strict=True)]
    return Tokens(
        embeds=np.stack([row.request.embedded(new) for row, new in zip(rows, ids, strict=True)]),
        positions=np.stack(
            [row.request.positions_after(row.read, len(new)) for row, new in zip(rows, ids, strict=True)], 1
        ),
        masks=tuple(row.mask(len(new)) for row, new in zip(rows, ids, strict=True)),
        listed=tuple(rows_read for rows_read in listed if rows_read is not None) or None,
    )


class Batch:
    """Rows that write their answers together. Between steps, rows may be added and removed."""

    def __init__(self, backend: Backend, rows: Sequence[Row] = ()):
        self.rows = list(rows)
        self._reader = Reader(backend)
        self._next: dict[Row, int | None] = {}  # what rows have chosen that was not handed out yet

    def add(self, row: Row) -> None:
        """Let a row take part from the next step on."""
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Let a row leave, whether its answer has ended or not."""
        self.rows.remove(row)
        self._next.pop(row, None)

    def choose(self) -> list[tuple[Row, int]]:
        """The next token of every row; rows whose answer ends leave (see Row.ended), a last token is handed out before.

        What a row's `choose` raises goes through, and that row leaves. Call again for the others: none is asked twice.
        """
        for row in [r for r in self.rows if r not in self._next]:
            try:
                self._next[row] = row.choose(row.last, len(row.ids)) if len(row.ids) < row.limit else None
            except Exception:
                self.remove(row)
                raise
        chosen, self._next = list(self._next.items()), {}
        for row, token in chosen:
            if token is not None:
                row.ids.append(token)
                if row.writing:
                    row.writing.add(token)
            row.ended = _ending(row, token)
            if row.ended:
                self.remove(row)
        return [(row, token) for row, token in chosen if token is not None]

    def read(self) -> Spent:
        """Read the token that each row has chosen last."""
        return self._reader.read(self.rows, [row.ids[-1:] for row in self.rows])

    def read_apart(self) -> list[tuple[Row, Exception]]:
        """After `read` raised: read what it left unread, row by row. Rows for which that raises leave, with what it raised."""
        failed: list[tuple[Row, Exception]] = []
        for row in [r for r in self.rows if r.read < len(r.ids)]:
            try:
                self._reader.read([row], [row.ids[-1:]])
            except Exception as e:
                self.remove(row)
                failed.append((row, e))
        return failed


def _ending(row: Row, token: int | None) -> str | None:
    """Why the answer ends with its last token, or before it where that is None; None while it goes on."""
    if row.writing and row.writing.stopped is not None:
        return "string"
    if len(row.ids) >= row.limit:
        return "limit"
    return "stop" if token is None else None


def decode(
    backend: Backend, rows: Sequence[Row], on_step: Callable[[Spent], None] | None = None
) -> Iterator[tuple[Row, int]]:
    """Every token as it is chosen, with its row, until all answers have ended."""
    batch = Batch(backend, rows)
    while batch.rows:
        yield from batch.choose()
        if batch.rows:
            spent = batch.read()
            if on_step:
                on_step(spent)


def teacher_forced(backend: Backend, row: Row, ids: Sequence[int]) -> np.ndarray:
    """[T+1,V]: logits before each of these tokens, and after the last."""
    logits: list[np.ndarray] = []
    row.choose, row.limit = recorded(forced(ids), logits), len(ids) + 1
    for _ in decode(backend, [row]):
        pass
    return np.stack(logits)
