"""The one weight file of a bundle: a safetensors file whose byte ranges the ONNX graphs point at.

    weights.safetensors = 8-byte length | JSON header (padded to a page) | tensors
    graph initializer   = {location: "weights.safetensors", offset, length}

Dense and sparse, prefill and decode graphs share it, and the host maps it to look up token embeddings.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ..base import safetensors_file
from ..base.errors import BundleError, InputError
from ..base.hashes import file_part_sha256

FILE = "weights.safetensors"
HEADER = ""  # the name of its header among the hashes of its tensors
_PAGE = 4096  # tensor data starts on a page, so that mappings are aligned whatever the header's length
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_NAMES = {v: k for k, v in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file: offset and length in bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `read()` yields it in pieces along its first axis, C-contiguous, of the stated dtype."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[np.ndarray]]


def layout(tensors: list[Planned]) -> tuple[bytes, dict[str, Tensor]]:
    """What comes before the tensors of a file, and where each of them lies behind it."""
    header: dict[str, Any] = {}
    at = 0
    for t in tensors:
        size = int(np.prod(t.shape, dtype=np.int64)) * t.dtype.itemsize
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    head = len(text).to_bytes(8, "little") + text
    begins = [len(head) + header[t.name]["data_offsets"][0] for t in tensors]
    ends = [*begins[1:], len(head) + at]
    places = zip(tensors, begins, ends, strict=True)
    return head, {t.name: Tensor(t.dtype, t.shape, begin, end - begin) for t, begin, end in places}


def write(path: Path, tensors: list[Planned], lasting: bool = True) -> str:
    """Write the file tensor by tensor and return its sha256. The caller renames it into place.

    `lasting`: False for a file that no crash of the machine has to spare.
    """
    head, places = layout(tensors)
    digest = hashlib.sha256(head)
    with open(path, "wb") as f:
        f.write(head)
        for t in tensors:
            wrote = 0
            for piece in t.read():
                piece = np.ascontiguousarray(piece, t.dtype)
                content = piece.reshape(-1).view(np.uint8).data  # bfloat16 has no buffer of its own
                f.write(content)
                digest.update(content)
                wrote += piece.nbytes
            if wrote != places[t.name].length:
                raise BundleError(f"{t.name}: planned {places[t.name].length} bytes, got {wrote}", where=path)
        f.flush()
        if lasting:
            os.fsync(f.fileno())
    return digest.hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """The same of small arrays, each in its type."""
    return write(path, [Planned(name, a.dtype, a.shape, partial(list, [a])) for name, a in arrays.items()])


def index(path: Path) -> dict[str, Tensor]:
    """Name -> Tensor of a weight file. Raises BundleError if the header is unreadable or the file is cut short."""
    try:
        return {
            name: Tensor(_DTYPES[place.dtype], place.shape, place.offset, place.length)
            for name, place in safetensors_file.places(path).items()
        }
    except (OSError, KeyError, InputError) as e:
        what = e.what if isinstance(e, InputError) else e
        raise BundleError(f"unreadable weight file ({what})", where=path, fix="build the bundle again") from e


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Start and length in bytes of every tensor of a weight file, and under HEADER of what comes before all of them.

    Raises BundleError.
    """
    tensors = index(path)
    header = min((t.offset for t in tensors.values()), default=path.stat().st_size)
    return {HEADER: (0, header)} | {name: (t.offset, t.length) for name, t in tensors.items()}


def piece_hashes(path: Path) -> dict[str, str]:
    """sha256 of each of these places."""
    with open(path, "rb", buffering=0) as file:
        return {name: file_part_sha256(file, *place) for name, place in places(path).items()}


class Checks(Protocol):
    """What compares tensors with their hashes (checks.py)."""

    def expect(self, names: Iterable[str]) -> None:
        """Begin with these, which will be read."""

    def before(self, name: str) -> None:
        """Return once this one may be read. Raises BundleError."""


class WeightFile:
    """A mapped weight file; `[name]` gives a read-only view without reading the bytes."""

    def __init__(self, path: Path, checks: Checks | None = None):
        """`checks`: what compares tensors with their hashes before they are read; None where that was done."""
        self.path, self.tensors, self._checks = Path(path), index(Path(path)), checks
        self._map = np.memmap(self.path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        if self._checks:
            self._checks.before(name)
        t = self.tensors[name]
        return self._map[t.offset : t.offset + t.length].view(t.dtype).reshape(t.shape)

    def expect(self, names: Iterable[str]) -> None:
        """Have the hashes of these compared while something else is done; no answer is shown before they were."""
        if self._checks:
            self._checks.expect([name for name in names if name in self.tensors])

    def release(self) -> None:
        """Take the pages read so far out of this process; they come back from the page cache when read again."""
        self._map._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy gives no other way to it

    def __contains__(self, name: str) -> bool:
        return name in self.tensors
