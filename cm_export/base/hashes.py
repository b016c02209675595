"""Names of contents: the sha256 of a file, and of plain values.

file_sha256(weights.safetensors) -> 64 hex digits      key_of(recipe={...}, seed=0) -> 64 hex digits, keys in any order
"""

import hashlib
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read a block at a time (hashlib.file_digest came with Python 3.11). Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return file_part_sha256(file, 0, os.fstat(file.fileno()).st_size)


def file_part_sha256(file: FileIO, start: int, length: int) -> str:
    """The same of `length` bytes from `start` on, or of those that there are."""
    digest, view = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    file.seek(start)
    while length > 0 and (size := file.readinto(view[: min(length, _BLOCK)])):
        digest.update(view[:size])
        length -= size
    return digest.hexdigest()


def key_of(**values: Any) -> str:
    """Hex sha256 of plain values; whatever has no word in JSON counts as its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
