"""Resumable stages of a build: each writes one directory, once, and is skipped while its inputs are unchanged.

.engine.plan.stages/
  trace/    key.json + files     key = hash of everything the stage read
  weights/  ...
"""

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.hashes import file_sha256

_KEY = "key.json"


class Stages:
    """The stage directory of one `--out`. Finished stages carry their key and hashes; half-done ones are invisible."""

    def __init__(self, folder: Path, force: bool = False, bundle: Path | None = None):
        """`bundle`: where large files of a stage may have moved (see `file`). Raises InputError."""
        self.folder, self.force, self.bundle = folder, force, bundle
        self.reused: list[str] = []
        self.keys: dict[str, str] = {}  # of stages that ran, now or before
        self._states: dict[str, dict[str, Any]] = {}
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fix = "give another --out or --work-dir"
            raise InputError(f"the directory of stages cannot be made ({e.strerror})", where=folder, fix=fix) from e

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory alone; one that was made for this build goes when no stage was finished in it.

        Raises InputError if another build holds it.
        """
        with open(self.folder / "lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise InputError("another build of this bundle is running", where=self.folder, fix="wait for it") from e
            for leftover in self.folder.glob("*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                yield
            finally:
                if self._made and [p.name for p in self.folder.iterdir()] == ["lock"]:
                    shutil.rmtree(self.folder)

    def file(self, stage: str, name: str) -> Path:
        """A file of a finished stage, or of the finished bundle: the weights move there and are not kept twice."""
        own = self.folder / stage / name
        return own if self.bundle is None or own.exists() else self.bundle / name

    def state(self, stage: str) -> dict[str, Any]:
        """What the work of a stage returned, with `sha256` of its files by name; the stage has run by now."""
        return self._states[stage]

    def run(self, name: str, key: str, work: Callable[[Path], dict[str, Any] | None]) -> tuple[Path, dict[str, Any]]:
        """The stage's directory and what `work(directory)` returned, now or when it last ran with this key."""
        done, state = self.folder / name, None if self.force else self.finished(name, key)
        if state is not None:
            self.reused.append(name)
        else:
            state = self._redo(name, key, work)
        self.keys[name], self._states[name] = key, state
        return done, state

    def _redo(self, name: str, key: str, work: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(
            prefix=f"{name}.", suffix=".tmp", dir=self.folder, ignore_cleanup_errors=True
        ) as t:
            folder = Path(t) / name
            folder.mkdir()
            state = work(folder) or {}
            known = state.get("sha256", {})
            names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            state["sha256"] = {n: known.get(n) or file_sha256(folder / n) for n in names}
            (folder / _KEY).write_text(json.dumps({"key": key, "state": state}, default=str))
            shutil.rmtree(self.folder / name, ignore_errors=True)
            folder.rename(self.folder / name)
        return state

    def finished(self, name: str, key: str) -> dict[str, Any] | None:
        """What the stage's work returned, if it ran with this key and its files are whole."""
        try:
            record = json.loads((self.folder / name / _KEY).read_text())
            if record["key"] != key:
                return None
            whole = all(file_sha256(self.file(name, n)) == h for n, h in record["state"]["sha256"].items())
            return record["state"] if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
