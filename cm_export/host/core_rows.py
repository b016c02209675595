"""The FFN rows that core_neurons names, read from the mapped weight file: gathered once per request, or left to the runtime.

core_neurons [L,B,K] -> ffn.i.gate, ffn.i.up, ffn.i.down [B,K_i,D]
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..bundle.weights import WeightFile

ROWS = ("gate", "up", "down")


class Rows(dict):
    """Gathered rows by input name; `current` until the next request's rows take their place in the same buffers."""

    current = True


class CoreRows:
    """Gathers the FFN rows that core_neurons names, once per request, into buffers that are kept between requests."""

    def __init__(self, weights: WeightFile, names: list[tuple[str, str, str]], threads: int = 0):
        self.sources = [tuple(weights[n] for n in layer) for layer in names]
        self._buffers: dict[str, np.ndarray] = {}
        self._given = Rows()
        self._threads = threads or 2

    def gather(self, core_neurons: np.ndarray, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """core_neurons [L,B,K] int32, checked -> {ffn.i.gate|up|down: [B,K_i,D]}; counts [L]: K_i, else K."""
        layers, batch, most = core_neurons.shape
        counts = np.full(layers, most) if counts is None else counts

        def one(layer: int) -> None:
            count = int(counts[layer])
            for part, source in zip(ROWS, self.sources[layer], strict=True):
                name, shape = f"ffn.{layer}.{part}", (batch, count, source.shape[1])
                if name not in self._buffers or self._buffers[name].shape != shape:
                    self._buffers[name] = np.empty(shape, source.dtype)
                # mode="clip" writes straight into `out`; the ids were checked.
                np.take(source, core_neurons[layer, :, :count], axis=0, out=self._buffers[name], mode="clip")

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(one, range(len(self.sources))))
        self._given.current = False
        self._given = Rows(self._buffers)
        return self._given

    def down(self, layer: int, gathered: Mapping[str, np.ndarray], core_neurons: np.ndarray) -> np.ndarray:
        """The down rows [B,K,D] of one layer, as `gather` has just put them there."""
        return gathered[f"ffn.{layer}.down"]

    def one(self, layer: int, core_neurons: np.ndarray) -> dict[str, np.ndarray]:
        """The rows [B,K,D] of one layer alone; core_neurons [B,K] int32, checked."""
        parts = zip(ROWS, self.sources[layer], strict=True)
        return {f"ffn.{layer}.{part}": np.take(source, core_neurons, axis=0) for part, source in parts}

    def all(self) -> dict[str, np.ndarray]:
        """Every row, as views of the mapped file: [1,F,D] each, nothing is copied."""
        return {
            f"ffn.{layer}.{part}": source[None]
            for layer, sources in enumerate(self.sources)
            for part, source in zip(ROWS, sources, strict=True)
        }


class RowsOfTheEngine(CoreRows):
    """For a runtime that holds the weights and reads the listed rows by itself: nothing is gathered."""

    def gather(self, core_neurons: np.ndarray, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Nothing: the runtime takes core_neurons."""
        return {}

    def down(self, layer: int, gathered: Mapping[str, np.ndarray], core_neurons: np.ndarray) -> np.ndarray:
        """The down rows [B,K,D] of one layer, for the bias of what is dropped."""
        return np.take(self.sources[layer][2], core_neurons, axis=0)

    def all(self) -> dict[str, np.ndarray]:
        """Nothing, likewise."""
        return {}
