"""What the host asks of a runtime: graphs run, caches as values, and decoders that read tokens for several requests.

    open(bundle, threads, recipe, graph, device) -> Backend    each file or folder of backends/ has this function
    vision, prefill, turn                               arrays for the host; keys and values stay where the runtime put them
    decoder(graph, cores).read(tokens, cache)           one graph call for all rows; a new Cache comes back
    regroup([(cache, 0), (other, 2)])                   requests join and leave between steps

Nothing of a request is kept in a backend: what a request needs lies in its Row (decode.py), its Cache and its CoreSet.
Several threads may call a backend and its decoders at once, each for its own requests; what cannot bear that locks itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..base import by_name
from ..bundle.weights import WeightFile
from ..families import Arrays
from .core_set import CoreSet

DEFAULT = "onnxruntime"
Feeds = Mapping[str, np.ndarray]
Graphs = Callable[[str], Any]  # name of a graph -> its file, or a model in memory


@dataclass(frozen=True)
class Tokens:
    """What B requests read in one step, N tokens each; P_b: rows that request b has in its cache."""

    embeds: np.ndarray  # [B,N,D] float32
    positions: np.ndarray  # [A,B,N] int64
    masks: tuple[np.ndarray, ...]  # of each request [P_b+N] int64: 1 where a row counts
    listed: tuple[np.ndarray, ...] | None = None  # of each [M_b] int32: the rows that are read; None: all that count


class Cache(Protocol):
    """Keys and values of B requests, as the runtime holds them; its rows stay as they are, whoever reads on from it."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each request."""

    def truncated(self, lengths: Sequence[int]) -> Cache:
        """The same without the rows after the first `lengths` of each request."""


class Decoder(Protocol):
    """Reads tokens for the requests whose core sets it was made with."""

    def read(self, tokens: Tokens, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits [B,N,V] float32 after each new token, and the cache with their rows.

        Raises InputError where the runtime has no room.
        """


class Backend(Protocol):
    """Sessions over the graphs of one bundle, made when first asked for."""

    name: str  # as the command line names it
    weights: WeightFile
    threads: int  # of the CPU; 0 takes all cores
    notes: list[str]  # what the user should know about how this bundle runs here
    hardware: dict[str, str]  # besides the processor: what a figure measured here depends on
    most: int  # requests that one decoder can serve

    def has(self, graph: str) -> bool:
        """Whether it can run a graph that the bundle has: engines are built for some of them."""

    def ready(self, graph: str, few_rows: bool = False) -> None:
        """Make the session of `graph` now, so that what is timed later does not. Raises BundleError."""

    def vision(self, feeds: Feeds) -> Arrays:
        """Every output of the vision graph."""

    def prefill(self, feeds: Feeds, graph: str = "prefill") -> tuple[Arrays, Cache]:
        """A prefill graph's outputs, and its cache. Raises InputError for a prompt that the session cannot hold."""

    def turn(self, feeds: Feeds, cache: Cache) -> tuple[Arrays, Cache]:
        """Read new tokens over a whole cache of one request; outputs as of `prefill`."""

    def decoder(self, graph: str, cores: Sequence[CoreSet], few_rows: bool = False) -> Decoder:
        """A decoder for these requests, their core rows gathered; a dense graph reads nothing of a core set.

        `few_rows`: most reads are of 2 to 16 tokens.
        """

    def together(self, core: CoreSet) -> Hashable:
        """Requests whose core sets have the same value here can share a decoder."""

    def regroup(self, rows: Sequence[tuple[Cache, int]]) -> Cache:
        """One cache of the requests at these places of others."""

    def drop(self, *graphs: str) -> None:
        """Free the sessions of these graphs."""


class Opener(Protocol):
    """The module of a backend."""

    def open(self, bundle: Any, threads: int, recipe: Any, graph: Graphs | None, device: str | None) -> Backend:
        """The sessions of an open bundle; `recipe` and `graph` replace its own, on the same weights.

        `device`: cpu, cuda, cuda:1 or auto; None: what the backend is for. Raises InputError for one that is not there.
        """


def find(name: str) -> Opener:
    """The module of a backend, `tensorrt-rtx` or `tensorrt_rtx`. Raises InputError that names the nearest."""
    module: Opener = by_name.load("cm_export.backends", name.replace("-", "_"), "backend")
    return module
