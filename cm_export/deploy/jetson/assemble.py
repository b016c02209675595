"""On the device: the engines that were built there, and what the host reads besides, become a bundle that `run` opens.

    engines/*.plan, work/libcm_plugins.so, processor/, parts of onnx/*.safetensors   ->   bundle/      whole or not at all

python3 -m cm_export.deploy.jetson.assemble ARCHIVE TENSORRT      TENSORRT: the version that the engines were built with

It holds no graphs. Engines are second names of those of the archive, so they take no more room.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...base import disk
from ...base.errors import CmExportError, InputError
from ...base.hashes import file_sha256
from ...bundle import directory, weights
from ...bundle.bundle import DEVICE, MEASURED, write_manifest

BUNDLE, LIBRARY = "bundle", "libcm_plugins.so"
_PIECE = 1 << 24  # bytes
_COPIED = ("tool", "versions", "model", "recipe", "generation", "graphs", "links")


def assemble(archive: Path, built_with: str) -> Path:
    """Make the bundle of an unpacked archive whose engines are built; returns where it is. Raises CmExportError."""
    told = json.loads((archive / "manifest.json").read_text(encoding="utf-8"))
    version = _version(built_with)
    out = archive / BUNDLE
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("is in the way of the bundle that is made there", where=out, fix="move it elsewhere")
    directory.sweep(out)
    with directory.assemble(out) as folder, disk.writing(archive):
        known = {
            weights.FILE: weights.write(folder / weights.FILE, [_planned(archive, w) for w in told["host_weights"]])
        }
        (folder / "engines").mkdir()
        for graph in told["graphs"]:
            _take(archive / "engines" / f"{graph}.plan", folder / "engines" / f"{graph}.plan")
        library = archive / "work" / LIBRARY if any(g["plugin_nodes"] for g in told["graphs"].values()) else None
        if library:
            _take(library, folder / "engines" / LIBRARY)
        for file in sorted((archive / "processor").glob("*")):
            _take(file, folder / "processor" / file.name)
        for measured in MEASURED:
            if (archive / measured).is_file():
                _take(archive / measured, folder / measured)
        engines = {
            "backend": "tensorrt",
            "version": version,
            "architecture": f"sm_{told['target']['sm']}",
            "plugins": {"name": LIBRARY, "sha256": file_sha256(library)} if library else None,
            **{key: told[key] for key in ("capacity", "kv", "precision", "block", "graphs")},
        }
        device = {
            "target": told["target"]["name"],
            "jetpack": told["jetpack"]["name"],
            "packed": told["source"]["seal"],
        }
        copied = {key: told[key] for key in _COPIED}
        write_manifest(folder, {**copied, DEVICE: device, "engines": engines, "known_sha256": known})
    return out


def _version(built_with: str) -> str:
    """Of the Python module, which loads the engines. Raises InputError where trtexec is of another version."""
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except ImportError as e:
        fix = "install JetPack's own: sudo apt-get install python3-libnvinfer"
        raise InputError(f"the Python package tensorrt cannot be imported ({e})", where="TensorRT", fix=fix) from e
    here, there = (re.findall(r"\d+", text.partition("-")[0]) for text in (version, built_with))
    if any(a != b for a, b in zip(here, there, strict=False)):
        what = f"the Python package tensorrt is {version}, the engines were built with {built_with}"
        raise InputError(what, where="TensorRT", fix="leave one of them installed, JetPack's own, and build again")
    return version


def _planned(archive: Path, place: dict[str, Any]) -> weights.Planned:
    """A tensor that lies in a file of the archive, to be copied piece by piece."""
    dtype = np.dtype(place["dtype"])

    def read() -> Iterator[np.ndarray]:
        with open(archive / place["file"], "rb") as f:
            f.seek(place["offset"])
            left = place["length"]
            while left:
                piece = f.read(min(left, _PIECE))
                if not piece:
                    raise CmExportError("is cut short", where=archive / place["file"], fix="unpack the archive again")
                left -= len(piece)
                yield np.frombuffer(piece, dtype)

    return weights.Planned(place["tensor"], dtype, tuple(place["shape"]), read)


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    disk.link_or_copy(source, target)


def main(archive: str, built_with: str) -> int:
    try:
        print(assemble(Path(archive), built_with))
    except CmExportError as e:
        print(f"[E] {e}")  # as the script looks for it in a log
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
