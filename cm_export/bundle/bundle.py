"""The bundle, a directory: graphs, one weight file, manifest, tokenizer. Its only reader; directory.py puts it into its place.

engine.plan/
  manifest.json            recipe, checkpoint, hashes, graphs with axes, passes, gates, links
  weights.safetensors      shared by every graph; without what packed.safetensors holds, unless the recipe keeps it
  *.onnx                   vision (of a model that sees pictures), prefill, decode, prefill_dense, decode_dense;
                           turn where the cache stays whole
  calibration.safetensors  if the recipe named one
  thresholds.safetensors   if decode leaves out what is below them (policy `active`)
  phrases.safetensors      if answers to prompts were measured: what the model usually writes
  packed.safetensors       if the recipe stores weights in few bits
  predictor.safetensors    if decode chooses its neurons itself: low-bit copies of gate and up
  engines/*                *.plan and libcm_plugins.so, if it was built for TensorRT: for one GPU, version and library
  processor/*              tokenizer.json, chat template, preprocessor_config.json

One that a device made for itself (deploy/jetson) has engines in place of the graphs, and of the weights what the host reads.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .. import families
from ..base import disk
from ..base.errors import BundleError
from ..base.hashes import file_sha256
from ..base.jobs import Jobs
from ..base.json_file import no_permission
from ..base.links import behind_links, dead
from ..families import Family, Shape, Tower
from ..recipe.recipe import Recipe, from_dict
from . import not_a_bundle
from .calibration import FILE as CALIBRATION
from .calibration import Calibration
from .calibration import read as read_calibration
from .checks import FileChecks
from .packed import FILE as PACKED
from .packed import TOWER, Entry, Packed, Table
from .phrases import FILE as PHRASES
from .phrases import Phrases
from .phrases import read as read_phrases
from .predictor import FILE as PREDICTOR
from .predictor import copy_bytes
from .predictor import write as write_predictor
from .thresholds import FILE as THRESHOLDS
from .thresholds import Thresholds
from .thresholds import read as read_thresholds
from .unpacked import Weights
from .weights import FILE as WEIGHTS
from .weights import WeightFile, piece_hashes

FORMAT = 2  # 2: nodes of CoreFFN carry block, bits and group
MANIFEST = not_a_bundle.MANIFEST
MEASURED = (CALIBRATION, THRESHOLDS, PHRASES)  # what was measured on generated text, where it was
DEVICE = "device"  # key of the manifest that tells a bundle which a device has made
GRAPHS = ("prefill", "decode", "prefill_dense", "decode_dense")  # of every bundle; its manifest may list more


class Bundle:
    """A bundle that was opened and checked. Small files are verified at once, the weights in the background."""

    def __init__(self, path: str | Path):
        """Raises BundleError (InputError if there is nothing at `path`): what is missing, edited or corrupted."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.portable = DEVICE not in self.manifest  # whether it has graphs, for any machine, and not engines alone
        self.again = _again(self.manifest)  # what mends it
        try:
            self._open()
        except (KeyError, TypeError, AttributeError, ValueError) as e:  # sealed, yet not what this version writes
            what = f"its manifest does not say what is needed ({type(e).__name__}: {e})"
            raise BundleError(what, where=self.path / MANIFEST, fix=self.again) from e
        for name, checks in self._checks.items():
            checks.expect(self._read_by_any_answer(name, checks))

    def _open(self) -> None:
        self._jobs, self._checks = Jobs(), dict[str, FileChecks]()
        files, graphs = self.manifest["files"], [*self.manifest["graphs"]]
        needed = [f"{g}.onnx" for g in (*GRAPHS, *graphs)] if self.portable else [f"engines/{g}.plan" for g in graphs]
        for name in {WEIGHTS, *needed} - set(files):
            raise BundleError(f"the manifest does not list {name}", where=self.path, fix=self.again)
        for name, entry in files.items():
            file = self._inside(name)
            if not file.is_file():
                raise BundleError("missing", where=file, fix=self.again)
            if not os.access(file, os.R_OK):
                raise no_permission(file)
            if file.stat().st_size != entry["bytes"]:
                what = f"{file.stat().st_size} bytes, the manifest says {entry['bytes']}"
                raise BundleError(what, where=file, fix=self._mend)
            if _is_large(name):
                pieces = (self.manifest.get("pieces") or {}).get(name) or {}
                self._checks[name] = FileChecks(self._jobs, file, entry["sha256"], pieces, self._mend)
            elif file_sha256(file) != entry["sha256"]:
                raise BundleError("its contents do not match the manifest (sha256)", where=file, fix=self._mend)
        self.notes: list[str] = []  # what the user should know of how it was read
        self.weights = self._weights()
        self.family: Family = families.find(self.manifest["model"]["type"])
        self.config: dict[str, Any] = self.manifest["model"]["config"]
        self.shape: Shape = self.family.shape(self.config)
        self.tower: Tower | None = self.family.tower(self.config)

    def _weights(self) -> WeightFile:
        file = behind_links(self.path / WEIGHTS)  # ONNX Runtime takes no link for a weight file
        if not (found := self.manifest.get("packed")):
            return WeightFile(file, self._checks[WEIGHTS])
        entries = {name: Entry.of(values) for name, values in found.items()}
        packed = partial(Packed, behind_links(self.path / PACKED), found, self._checks[PACKED])
        return Weights(file, self._checks[WEIGHTS], entries, packed, self.notes.append)

    @property
    def embedding(self) -> np.ndarray | Table:
        """The token embedding [V,D]: `[ids]` gives rows."""
        return (self.packed.table if self.packed else None) or self.weights[self.family.embedding]

    @cached_property
    def recipe(self) -> Recipe:
        """Its policies, budgets and backend."""
        return from_dict(self.manifest["recipe"], "manifest.json: recipe")

    @cached_property
    def seal(self) -> str:
        """What tells this bundle from any other: a hash over the manifest, and through it over every file."""
        return _seal(self.manifest)

    def wait_read_verified(self) -> None:
        """Return once all that was read so far matches its hash. Raises BundleError. Call before showing an answer.

        A tensor that nobody expected to be read (checks.py) was compared when it was.
        """
        self._jobs.wait()

    def _read_by_any_answer(self, file: str, checks: FileChecks) -> Iterable[str] | None:
        """Tensors of a large file that are expected from the start; None: all of it."""
        entries = self.manifest.get("packed") or {}
        if file == PACKED:
            return (n for n in checks.tensors if not n.startswith(TOWER))
        if file == WEIGHTS and entries and checks.tensors:
            tables = {name for entry in entries.values() if entry.get("table") for name in entry["weights"]}
            packed = {name for entry in entries.values() for name in entry["weights"]}
            return checks.tensors - packed | {self.family.embedding} & checks.tensors - tables
        return None

    @property
    def elsewhere(self) -> str:
        """Where something is done that the engines of this bundle do not do, for error messages."""
        if self.portable:
            return "add --backend onnxruntime"
        return "ask the bundle that was packed, where it was built"

    def check_portable(self) -> None:
        """Raises BundleError for one that has no graphs to look into, rewrite or run elsewhere."""
        if not self.portable:
            fix = f"for everything but `run`, {self.elsewhere}"
            raise BundleError("holds engines of one device and no graphs", where=self.path, fix=fix)

    def wait_verified(self) -> None:
        """Return once every file was read and matches its hash. Raises BundleError."""
        for checks in self._checks.values():
            checks.expect()
        self._jobs.wait()

    def graph(self, name: str) -> Path:
        """The file of one graph. Raises BundleError where it has none of that name."""
        self.check_portable()
        if f"{name}.onnx" not in self.manifest["files"]:
            raise BundleError(f"has no {name}.onnx", where=self.path, fix="build the bundle again")
        return self.path / f"{name}.onnx"

    def processor(self, name: str) -> Path | None:
        """A tokenizer or processor file, or None if the checkpoint had none."""
        file = f"processor/{name}"
        return self.path / file if file in self.manifest["files"] else None

    @cached_property
    def calibration(self) -> Calibration | None:
        """What was measured on generated text, neurons in the order of this bundle's weights; None without."""
        if CALIBRATION not in self.manifest["files"]:
            return None
        found = read_calibration(self.path / CALIBRATION)
        return found.reordered() if self.manifest["recipe"]["neurons"].get("block", 1) > 1 else found

    @cached_property
    def packed(self) -> Packed | None:
        """Its low-bit weights; None where the recipe stores none."""
        found = self.manifest.get("packed")
        return Packed(behind_links(self.path / PACKED), found, self._checks[PACKED]) if found else None

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """What channels must weigh to be read (policy `active`): its own, else the calibration's; None where nobody measured."""
        if THRESHOLDS in self.manifest["files"]:
            return read_thresholds(self.path / THRESHOLDS)
        return self.calibration.active if self.calibration else None

    @cached_property
    def phrases(self) -> Phrases | None:
        """What the model usually writes: its own, else the calibration's; None where nobody kept answers. Raises BundleError."""
        own = PHRASES in self.manifest["files"]
        found = read_phrases(self.path / PHRASES) if own else self.calibration.phrases if self.calibration else None
        if found is not None and (found.answers >= self.shape.vocab).any():
            raise BundleError("its phrases have tokens that the model has not", where=self.path, fix=self.again)
        return found

    @cached_property
    def predictor(self) -> WeightFile:
        """The copies by which decode chooses neurons; fitted now, into a temporary file, if the bundle holds none."""
        if PREDICTOR in self.manifest["files"]:
            return WeightFile(self.path / PREDICTOR, self._checks[PREDICTOR])
        disk.require(disk.Need(Path(tempfile.gettempdir()), int(copy_bytes(self.shape)), "TMPDIR"))
        self._fitted = tempfile.TemporaryDirectory(prefix=disk.TEMPORARY)  # as long as the bundle is open
        file = Path(self._fitted.name) / PREDICTOR
        with disk.writing(file.parent):
            write_predictor(file, self.weights, self.family, self.shape)
        return WeightFile(file)

    @property
    def _mend(self) -> str:
        return f"it was edited or corrupted: {self.again}"

    def _inside(self, name: str) -> Path:
        pure = PurePosixPath(name)
        file = self.path / pure
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise BundleError(f"its manifest lists {name!r}, which is not inside it", where=self.path, fix=self._mend)
        if what := dead(file):
            raise BundleError(
                what, where=file, fix="copy or download the bundle again, with the files that it links to"
            )
        root, place = (Path(os.path.realpath(p)) for p in (self.path, file))
        places = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]  # of a hub cache
        if not any(p in place.parents for p in places):  # a link somewhere on the way
            what = f"its {name} is behind a symbolic link to {place}, which is not inside it"
            raise BundleError(what, where=self.path, fix=f"copy it with the links followed: cp -rL {self.path} COPY")
        return file


def _is_large(name: str) -> bool:
    """Whether a file is verified in the background."""
    return name in (WEIGHTS, PREDICTOR, PACKED) or name.endswith(".plan")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a bundle, its own seal checked. Raises InputError, BundleError."""
    if not not_a_bundle.may_be(path):
        raise not_a_bundle.refusal(path)
    file = path / MANIFEST
    try:
        if not os.access(file, os.R_OK):
            raise no_permission(file)
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        seal = manifest.pop("seal")
        if manifest["format"] != FORMAT:
            raise BundleError(
                f"bundle format {manifest['format']}, this version reads {FORMAT}", where=file, fix="build it again"
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise BundleError(
            f"unreadable manifest ({type(e).__name__}: {e})", where=file, fix="build the bundle again"
        ) from e
    if seal != _seal(manifest):
        raise BundleError("the manifest was edited (its seal does not match)", where=file, fix=_again(manifest))
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal and write the manifest of a bundle that is being assembled; lists every file with size and hash.

    Large files of tensors have a hash for each tensor besides (checks.py).
    """
    known = manifest.pop("known_sha256", {})
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": known.get(name) or file_sha256(file)}
    pieces = {name: piece_hashes(folder / name) for name in (WEIGHTS, PACKED, PREDICTOR) if name in files}
    manifest = {"format": FORMAT, **manifest, "files": files, "pieces": pieces}
    text = json.dumps({**manifest, "seal": _seal(manifest)}, indent=1, sort_keys=True, default=str)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _again(manifest: dict[str, Any]) -> str:
    return "run build_on_device.sh again" if DEVICE in manifest else "build the bundle again"


def _seal(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(b"cm-export manifest\n" + text.encode()).hexdigest()
