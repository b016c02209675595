"""A contestant's process, kept alive: a question goes in by a line, its times come out by a line (serving.py)."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from cm_export.base.errors import CmExportError

from .artifacts import Artifacts
from .contestants import Contestant


class Process:
    """Started at once; `about`: what it says of itself, `load_s`: how long that took."""

    def __init__(self, contestant: Contestant, artifacts: Artifacts, threads: int):
        options = json.dumps(contestant.options)
        command = [str(artifacts.python(contestant.maker)), str(contestant.worker), str(artifacts.of(contestant))]
        log = artifacts.folder / "log" / f"{contestant.file_name}.txt"
        log.parent.mkdir(exist_ok=True)
        self.name, self._log = contestant.name, log
        started = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, options, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=artifacts.environment,
            )
        try:
            self.about = self._read()
        except CmExportError:
            self.close()
            raise
        self.load_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises CmExportError where the process has ended or gave another number of tokens than asked."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        out = self._read()
        if out["tokens"] != question["tokens"]:
            what = f"{self.name} gave {out['tokens']} tokens where {question['tokens']} were asked"
            raise CmExportError(what, where=self._log, fix="its answers cannot be compared; see its worker")
        return out

    def peak_memory(self) -> int:
        """Bytes: the largest resident set since it started, files that it maps included."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def close(self) -> None:
        """End it: its input ends, and where that is not enough within ten seconds, the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise CmExportError(f"{self.name} ended: {said[-1]}", where=self._log, fix="read that file")
