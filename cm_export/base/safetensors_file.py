"""Where the tensors of a safetensors file lie; a truncated or damaged one is told from a whole one without reading a tensor.

    8 bytes: length n, little-endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | tensors without holes

Source: the format description at huggingface.co/docs/safetensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .json_file import AGAIN, no_permission

FLOATS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64}  # bits
# Only quantised checkpoints hold weights of these.
LOW_BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8} | {
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
INTEGERS = {"I8": 8, "U8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
BITS = FLOATS | LOW_BITS | INTEGERS | {"BOOL": 8, "C64": 64}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class Place:
    """Of a tensor: the format's name of its type, and where it lies, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def tensor_types(path: Path) -> dict[str, str]:
    """Name -> the format's name of its type. Raises InputError as `places` does."""
    return {name: place.dtype for name, place in places(path).items()}


def places(path: Path) -> dict[str, Place]:
    """Name -> place, after header and size were checked: tensors follow each other, and nothing else. Raises InputError."""
    try:
        size, (length, raw) = path.stat().st_size, _header(path)
    except PermissionError as e:
        raise no_permission(path) from e
    try:
        header = json.loads(raw)
        about = header.pop("__metadata__", None)
        if about is not None and not all(isinstance(value, str) for value in dict.values(about)):
            raise ValueError("__metadata__ holds more than text")
        spans = sorted((*_span(entry), name) for name, entry in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise damaged(path, f"damaged safetensors header ({type(e).__name__}: {e})") from e
    end = 0
    for first, last, width, name in spans:
        if first != end or last - first != width:
            raise damaged(path, f"tensor {name!r} has offsets that do not fit its shape or its neighbours")
        end = last
    if size < 8 + length + end:
        raise damaged(path, f"truncated: expected {8 + length + end} bytes, found {size}")
    if size > 8 + length + end:
        extra = f"{size - 8 - length - end} bytes after the last tensor"
        raise damaged(path, f"expected {8 + length + end} bytes, found {size}: {extra}")
    where = {name: (8 + length + first, last - first) for first, last, _, name in spans}
    return {name: Place(entry["dtype"], tuple(entry["shape"]), *where[name]) for name, entry in header.items()}


def _header(path: Path) -> tuple[int, bytes]:
    """The length of the JSON as it stands in the file, and the JSON. Raises InputError for what cannot be a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError("is a git-lfs pointer, not the weights", where=path, fix="run `git lfs pull` there")
        if start.lstrip().lower().startswith((b"<!doct", b"<html")):
            fix = "download the file itself: `hf download`, or the address with /resolve/ in place of /blob/"
            raise InputError("is a web page, not the weights", where=path, fix=fix)
        length = int.from_bytes(start, "little")
        if size >= 8 and not 2 <= length <= MAX_HEADER:
            raise damaged(path, f"not a safetensors file (it claims a header of {length} bytes)")
        if size < 8 + length:
            raise damaged(path, f"truncated: expected at least {8 + max(length, 2)} bytes, found {size}")
        return length, file.read(length)


def _span(entry: dict[str, Any]) -> tuple[int, int, int]:
    """(first byte, byte after the last, bytes that dtype and shape ask for) of one tensor."""
    (first, last), shape = entry["data_offsets"], entry["shape"]
    if entry["dtype"] not in BITS:
        raise ValueError(f"dtype {entry['dtype']} is not read")
    if not all(type(n) is int and n >= 0 for n in [first, last, *shape]):
        raise ValueError("a shape or an offset is not a count")
    return first, last, -(-math.prod(shape) * BITS[entry["dtype"]] // 8)


def damaged(path: Path, what: str) -> InputError:
    """The error for a file of a checkpoint that is not what its publisher wrote."""
    return InputError(what, where=path, fix=AGAIN)
