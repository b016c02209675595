"""Resumable stages of a build: each writes one directory, once, and is skipped while its inputs are unchanged.

.engine.plan.stages/
  trace/    key.json + files     key = hash of everything the stage read
  weights/  ...
  engines.pieces/decode/  ...    parts of a stage that is not finished yet, resumable like stages
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..base import disk, lock
from ..base.errors import InputError
from ..base.hashes import file_sha256
from ..base.links import behind_links

_KEY = "key.json"
_LOCK = "lock"
_PIECES = ".pieces"
_HALF_DONE = re.compile(r"\w+[.-]\w+\.tmp")
Work = Callable[[Path], dict[str, Any] | None]


class Stages:
    """The stage directory of one `--out`. Finished stages carry their key and hashes; half-done ones are invisible."""

    def __init__(self, folder: Path, force: bool = False, bundle: Path | None = None):
        """`bundle`: where large files of a stage may have moved (see `file`). Raises InputError."""
        self.folder, self.force, self.bundle = folder, force, bundle
        self.reused: list[str] = []
        self.keys: dict[str, str] = {}  # of stages that ran, now or before
        self.states: dict[str, dict[str, Any]] = {}  # of stages that have run
        self._stack = contextlib.ExitStack()  # takes the directory away again if nothing came of it
        self._stack.enter_context(disk.made(folder, "directory of stages"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[str | None]:
        """Hold the directory alone; one that was made for this build goes when no stage was finished in it.

        Yields what the user should know of the lock, if anything. Raises InputError if another build holds it, or if it
        is a directory of the user's.
        """
        with self._stack:
            known = (self.folder / _LOCK).exists()
            others = [p for p in self.folder.iterdir() if not (_HALF_DONE.fullmatch(p.name) or (p / _KEY).is_file())]
            if others and not known:
                fix = "give a --work-dir that is new or empty"
                raise InputError(f"holds {others[0].name}, which is no stage of a build", where=self.folder, fix=fix)
            busy = InputError("another build of this bundle is running", where=self.folder, fix="wait for it")
            with lock.alone(self.folder / _LOCK, busy) as note:
                self._sweep()
                try:
                    yield note
                finally:
                    if [p.name for p in self.folder.iterdir()] == [_LOCK]:
                        (self.folder / _LOCK).unlink()
                        if known:  # a build that was killed had made it
                            self.folder.rmdir()

    def _sweep(self) -> None:
        """Remove what killed builds left half done."""
        for leftover in self.folder.glob("*.tmp"):
            if _HALF_DONE.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)

    def file(self, stage: str, name: str) -> Path:
        """A file of a finished stage, or of the finished bundle: the weights move there and are not kept twice.

        Of a bundle of links it is the file behind one: ONNX Runtime reads no weights outside the folder it is told.
        """
        own = self.folder / stage / name
        return own if self.bundle is None or own.exists() else behind_links(self.bundle / name)

    def state(self, stage: str) -> dict[str, Any]:
        """What the work of a stage returned, with `sha256` of its files by name; the stage has run by now."""
        return self.states[stage]

    def run(self, name: str, key: str, work: Work) -> tuple[Path, dict[str, Any]]:
        """The stage's directory and what `work(directory)` returned, now or when it last ran with this key."""
        self.keys[name] = key
        done, state = self.folder / name, None if self.force else self.finished(name, key)
        if state is not None:
            self.reused.append(name)
        else:
            state = self._redo(name, key, work)
        self.states[name] = state
        return done, state

    def pieces(self, stage: str) -> Callable[[str, Work], tuple[Path, dict[str, Any]]]:
        """`run` without its key, for parts of the stage that is running now: a build that is killed does not repeat them.

        What they left is there until the stage is finished.
        """
        parts = Stages(self.folder / f"{stage}{_PIECES}", self.force)
        parts._sweep()

        def piece(name: str, work: Work) -> tuple[Path, dict[str, Any]]:
            state = None if self.force else parts.finished(name, self.keys[stage])
            return parts.folder / name, state or parts._redo(name, self.keys[stage], work)

        return piece

    def _redo(self, name: str, key: str, work: Work) -> dict[str, Any]:
        with (
            disk.writing(self.folder),
            tempfile.TemporaryDirectory(
                prefix=f"{name}.", suffix=".tmp", dir=self.folder, ignore_cleanup_errors=True
            ) as t,
        ):
            folder = Path(t) / name
            folder.mkdir()
            state = work(folder) or {}
            known = state.get("sha256", {})
            names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            state["sha256"] = {n: known.get(n) or file_sha256(folder / n) for n in names}
            (folder / _KEY).write_text(json.dumps({"key": key, "state": state}, default=str))
            shutil.rmtree(self.folder / name, ignore_errors=True)
            folder.rename(self.folder / name)
        shutil.rmtree(self.folder / f"{name}{_PIECES}", ignore_errors=True)
        return state

    def finished(self, name: str, key: str) -> dict[str, Any] | None:
        """What the stage's work returned, if it ran with this key and its files are whole."""
        try:
            state = self.recorded(name, key)
            if state is None:
                return None
            whole = all(file_sha256(self.file(name, n)) == h for n, h in state["sha256"].items())
            return state if whole else None
        except (OSError, KeyError, TypeError, AttributeError):
            return None

    def forget(self, name: str) -> None:
        """Remove a stage whose files the bundle does not take over; another build does it anew."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def recorded(self, name: str, key: str) -> dict[str, Any] | None:
        """The same without a look at the files, which takes seconds a gigabyte."""
        try:
            record = json.loads((self.folder / name / _KEY).read_text())
            return record["state"] if record["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
