"""Tells a whole safetensors file from a truncated or damaged one without reading a tensor.

    8 bytes: length n, little-endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | tensors without holes

Source: the format description at huggingface.co/docs/safetensors.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..base.errors import InputError

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file after its header and size are checked; the tensors themselves are not read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise InputError("is a git-lfs pointer, not the weights", where=path, fix="run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        if size >= 8 and not 2 <= length <= MAX_HEADER:
            raise damaged(path, f"not a safetensors file (it claims a header of {length} bytes)")
        if size < 8 + length:
            raise damaged(path, f"truncated: expected at least {8 + max(length, 2)} bytes, found {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
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
    return set(header)


def _span(entry: dict[str, Any]) -> tuple[int, int, int]:
    """(first byte, byte after the last, bytes that dtype and shape ask for) of one tensor."""
    (first, last), shape = entry["data_offsets"], entry["shape"]
    if entry["dtype"] not in WIDTHS:
        raise ValueError(f"dtype {entry['dtype']} is not read")
    if not all(type(n) is int and n >= 0 for n in [first, last, *shape]):
        raise ValueError("a shape or an offset is not a count")
    return first, last, math.prod(shape) * WIDTHS[entry["dtype"]]


def damaged(path: Path, what: str) -> InputError:
    """The error for a file of a checkpoint that is not what its publisher wrote."""
    return InputError(what, where=path, fix="download it again")
