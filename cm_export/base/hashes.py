"""Names of contents: the sha256 of a file, and of plain values.

file_sha256(weights.safetensors) -> 64 hex digits      key_of(recipe={...}, seed=0) -> 64 hex digits, keys in any order
"""

import hashlib
import json
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read a block at a time (hashlib.file_digest came with Python 3.11). Raises OSError."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(view[:size])
    return digest.hexdigest()


def key_of(**values: Any) -> str:
    """Hex sha256 of plain values; whatever has no word in JSON counts as its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
