"""What was already asked: one line per answer beside the report, so that a killed evaluation goes on where it was.

.report.json.partial     {"run": ...}                      which bundle, which questions
                         {"row": ..., "question": 17, ...}
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ..base import disk
from ..base.errors import InputError


class Journal:
    """Answers by (row, question); on disk when there is a report to write, else only in memory."""

    def __init__(self, report: Path | None, run: str):
        """`run`: key of everything that an answer depends on besides its row. An older journal of another run goes."""
        path = self.path = place(report) if report else None
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}
        self.resumed, self.discarded, self._file = 0, False, None
        if path is None:
            return
        lines = self._read(path)
        if lines and lines[0] == {"run": run}:
            for line in lines[1:]:
                self._answers[line["row"], line["question"]] = line
            self.resumed = len(self._answers)
        else:
            self.discarded, lines = bool(lines), [{"run": run}]
        # Written anew: a line that was cut short by a kill must not have another line glued to it.
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with disk.writing(path.parent):
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the journal
        except OSError as e:
            raise InputError(f"cannot be written ({e.strerror})", where=path, fix="check the path of --out") from e

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return lines
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # killed while this line was written
        return lines

    def get(self, row: str, question: int) -> dict[str, Any] | None:
        return self._answers.get((row, question))

    def add(self, row: str, question: int, **answer: Any) -> dict[str, Any]:
        line = {"row": row, "question": question, **answer}
        self._answers[row, question] = line
        if self._file:
            assert self.path is not None  # the file is open
            with disk.writing(self.path.parent):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
        return line

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()


def place(report: Path) -> Path:
    """Where the journal of a report lies."""
    return report.with_name(f".{report.name}.partial")


def forget(report: Path) -> None:
    """The report is written: its journal is not needed any more."""
    place(report).unlink(missing_ok=True)
