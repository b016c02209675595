"""float32 numbers of weights that a bundle holds in few bits only: what verbs read that compute with float32.

packed.safetensors -> float32.safetensors, in a temporary directory, when the first of them is read

For these weights the graphs of the bundle point into that file, which it has not: no runtime takes other bytes for them.
`build --keep-floats` keeps the checkpoint's own numbers instead, all in weights.safetensors.
"""

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np

from ..base import disk
from ..quant.rows import PANEL, numbers_between
from . import weights
from .packed import Entry, Packed
from .weights import Checks, Planned, Tensor, WeightFile

FILE = "float32.safetensors"
_PIECE = 1 << 22  # numbers that are made at a time
_FLOAT32 = np.dtype("<f4")


def planned(entries: Mapping[str, Entry], packed: Callable[[], Packed]) -> list[Planned]:
    """The file's tensors, in the order of the entries' names; `packed` is called when one is read."""
    return [
        Planned(weight, _FLOAT32, entry.shape(weight), partial(_pieces, packed, name, weight))
        for name, entry in sorted(entries.items())
        for weight in entry.weights
    ]


def places(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Where each weight lies in the file."""
    return weights.layout(planned(entries, _nothing))[1]


class Weights(WeightFile):
    """A bundle's weight file, and what its low-bit weights stand for in the place of those that it has not."""

    def __init__(
        self,
        path: Path,
        checks: Checks,
        entries: Mapping[str, Entry],
        packed: Callable[[], Packed],
        say: Callable[[str], object],
    ):
        """`packed`: the open file of the entries; `say`: gets a sentence for the user once numbers had to be made."""
        super().__init__(path, checks)
        self._own, self._entries, self._say = set(self.tensors), entries, say
        self._packed = cache(packed)
        self.tensors = {n: t for n, t in places(entries).items() if n not in self._own} | self.tensors
        self._made: WeightFile | None = None
        self._making = threading.Lock()

    @property
    def made_of_codes(self) -> set[str]:
        """Weights that the file has not."""
        return self.tensors.keys() - self._own

    def __getitem__(self, name: str) -> np.ndarray:
        return super().__getitem__(name) if name in self._own else self._numbers()[name]

    def expect(self, names: Iterable[str]) -> None:
        """As of WeightFile; made numbers were compared as codes."""
        super().expect(name for name in names if name in self._own)

    def release(self) -> None:
        """As of WeightFile, and so with the made numbers."""
        super().release()
        if self._made:
            self._made.release()

    def _numbers(self) -> WeightFile:
        with self._making:
            if self._made is None:
                size = sum(tensor.length for tensor in places(self._entries).values())
                disk.require(disk.Need(Path(tempfile.gettempdir()), size, "TMPDIR"))
                self._folder = tempfile.TemporaryDirectory(prefix=disk.TEMPORARY)  # as long as the bundle is open
                file = Path(self._folder.name) / FILE
                with disk.writing(file.parent):
                    weights.write(file, planned(self._entries, self._packed), lasting=False)
                self._made = WeightFile(file)
                self._say(
                    "float32 numbers were made of the low-bit weights, which are all that this bundle holds; "
                    "build it with --keep-floats to have the checkpoint's own"
                )
            return self._made


def _pieces(packed: Callable[[], Packed], name: str, weight: str) -> Iterator[np.ndarray]:
    """A weight in the order of the weight file, some of its first axis at a time."""
    file = packed()
    entry, rows = file.entries[name], file.rows(name)
    begin = entry.begin(weight)
    end = begin + entry.outputs[entry.weights.index(weight)]
    if entry.turned:
        step = max(1, _PIECE // entry.inputs // PANEL) * PANEL
        for at in range(begin, end, step):
            yield numbers_between(rows, (0, entry.inputs), (at, min(at + step, end))).T
    else:
        step = max(1, _PIECE // (end - begin) // entry.group) * entry.group
        for at in range(0, entry.inputs, step):
            yield numbers_between(rows, (at, min(at + step, entry.inputs)), (begin, end))


def _nothing() -> Packed:
    raise AssertionError("only places were asked for")
