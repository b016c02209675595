"""The FFN rows that core sets name, read from the mapped weight file: gathered once for all steps of a decoder.

core sets of B requests -> ffn.i.gate, ffn.i.up, ffn.i.down [B,K_i,D]      K_i: the largest of layer i; rows behind a
                                                                           request's own are zero, so they add nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..bundle.weights import WeightFile
from ..families import Arrays
from .core_set import CoreSet

ROWS = ("gate", "up", "down")


class Gathered:
    """Rows by input name, [B,K_i,D] each; their memory is used again once nobody holds this object any more."""

    def __init__(self, rows: Arrays, spare: dict[str, list[np.ndarray]], owned: Sequence[str]):
        self.rows = rows
        self._spare, self._owned = spare, owned

    def __del__(self) -> None:
        for name in self._owned:
            self._spare.setdefault(name, [self.rows[name]])[:] = [self.rows[name]]  # of one, the newest


class CoreRows:
    """Gathers the rows of core sets; memory that was touched once is kept for the next request (touching it is dear)."""

    def __init__(self, weights: WeightFile, names: Sequence[tuple[str, str, str]], threads: int = 0):
        """`names`: of every layer's gate, up and down rows [F,D] in the weight file."""
        self.sources = [tuple(weights[n] for n in layer) for layer in names]
        self._spare: dict[str, list[np.ndarray]] = {}
        self._threads = threads or 2

    @property
    def down(self) -> list[np.ndarray]:
        """Every layer's down rows [F,D]."""
        return [rows[2] for rows in self.sources]

    def gather(self, cores: Sequence[CoreSet]) -> Gathered:
        """The rows of these requests together; of one that reads every neuron of a layer, views of the mapped file."""
        rows: Arrays = {}
        owned: list[str] = []
        counts = np.stack([core.counts for core in cores])
        whole = (counts == cores[0].ffn).all(0)

        def one(layer: int) -> None:
            most = int(counts[:, layer].max())
            for part, source in zip(ROWS, self.sources[layer], strict=True):
                name = f"ffn.{layer}.{part}"
                if whole[layer]:
                    rows[name] = source[None]  # [1,F,D]: the same for every request
                    continue
                out = rows[name] = self._memory(name, (len(cores), most, source.shape[1]), source.dtype)
                owned.append(name)
                for b, core in enumerate(cores):
                    count = int(counts[b, layer])
                    # mode="clip" writes straight into `out`; the ids were checked.
                    np.take(source, core.of_layer(layer), axis=0, out=out[b, :count], mode="clip")
                    out[b, count:] = 0

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(one, range(len(self.sources))))
        return Gathered(rows, self._spare, owned)

    def _memory(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Spare memory of this shape, which is nobody else's from now on, or new."""
        found = self._spare.pop(name, [None])[0]
        return found if found is not None and found.shape == shape else np.empty(shape, dtype)
