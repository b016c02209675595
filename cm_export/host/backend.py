"""What the host loop asks of a runtime: one backend per bundle, its core rows, and a decoder per request.

    open(bundle, threads, recipe, graph) -> Backend     each backends/<name>.py has this function
    vision, prefill, turn  ->  host(outputs), cache     arrays for the loop; keys and values stay where the runtime put them
    decoder(graph, cache, constants).step(feeds)        one token

The underscore keeps this file out of the list of backends: the folder is the registry.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..base import by_name
from ..bundle.weights import WeightFile

DEFAULT = "onnxruntime"
Feeds = Mapping[str, np.ndarray]
Values = Mapping[str, Any]  # outputs by name, each as the runtime holds it


class CoreRows(Protocol):
    """The FFN rows that decode reads. Sizes: L layers, B batch, F neurons, D hidden, K_l kept neurons of layer l."""

    sources: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # per layer gate, up, down [F,D], views of the weight file

    def gather(self, core_neurons: np.ndarray, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """core_neurons [L,B,K] int32, checked -> {ffn.i.gate|up|down: [B,K_i,D]}; counts [L]: K_i, else K.

        Empty where the runtime gathers by itself. What an earlier call returned may be overwritten.
        """

    def all(self) -> dict[str, np.ndarray]:
        """The same of every row, [1,F,D] each."""

    def down(self, layer: int, gathered: Mapping[str, np.ndarray], core_neurons: np.ndarray) -> np.ndarray:
        """The down rows [B,K,D] float32 of core_neurons [B,K] int32: those in `gathered`, if they are there."""


class Decoder(Protocol):
    """One request's decode over the cache of its prefill."""

    cache: dict[str, Any]  # past.i.key/value with what was read so far; another decoder may start from it

    def step(self, feeds: Feeds) -> np.ndarray:
        """Logits [B,V] float32 after the new tokens; feeds: inputs_embeds [B,N,D] float32, position_ids [A,B,N] int64,
        attention_mask [B,T+N] int64 over the cache's rows and the new ones, core_tokens [B,M] int32 where rows are listed.
        """

    def read(self, feeds: Feeds) -> np.ndarray:
        """Logits [B,N,V] after each of N new tokens. Raises InputError where the runtime reads one at a time."""

    def truncate(self, rows: int) -> None:
        """Forget what was read after the first `rows` rows. Raises InputError where the runtime cannot."""


class Backend(Protocol):
    """Sessions over the graphs of one bundle, made when first asked for; one request at a time."""

    name: str  # as the command line names it
    weights: WeightFile
    threads: int  # of the CPU; 0 takes all cores
    notes: list[str]  # what the user should know about how this bundle runs here
    hardware: dict[str, str]  # besides the processor: what a figure measured here depends on
    reads_several: bool  # whether its decoders read several tokens at once, as the guard and later questions need

    @property
    def rows(self) -> CoreRows: ...

    def ready(self, graph: str) -> None:
        """Make the session of `graph` now, so that what is timed later does not. Raises BundleError."""

    def vision(self, feeds: Feeds) -> np.ndarray:
        """Image embeddings [I,D] float32 of patches and the host's integers."""

    def prefill(self, feeds: Feeds, graph: str = "prefill") -> dict[str, Any]:
        """Every output of a prefill graph. Raises InputError for a prompt that the session cannot hold."""

    def turn(self, feeds: Feeds, cache: Values) -> dict[str, Any]:
        """Read new tokens over the whole cache (present.i.key/value, which stays as it is); outputs as of `prefill`."""

    def decoder(self, graph: str, cache: Values, constants: Feeds, few_rows: bool = False) -> Decoder:
        """`cache`: present.i.key/value; `constants`: inputs that stay for the whole answer. Either may name more.

        `few_rows`: most reads are of 2 to 16 tokens.
        """

    def host(self, values: Values) -> dict[str, np.ndarray]:
        """These outputs as arrays."""

    def drop(self, *graphs: str) -> None:
        """Free the sessions of these graphs."""


def find(name: str) -> ModuleType:
    """The module of a backend, `tensorrt-rtx` or `tensorrt_rtx`. Raises InputError that names the nearest."""
    return by_name.load("cm_export.backends", name.replace("-", "_"), "backend")
