"""One thread of decoding: the rows that step together in it, and the requests that they belong to.

a place is free -> prefill -> joining -> rows --choose, read--> pieces of text ... -> answer          one graph call a step

Several lanes step side by side: a step of one thread each uses as many processors, where rows that share a step gain
little, because each reads core rows of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..host.asking import Asked
from ..host.backend import Backend
from ..host.conversation import Answering, Conversation, Stream
from ..host.decode import Batch, Row
from .ticket import Event, Expired, Listener, Piece, Ticket


@dataclass(eq=False)
class Job:
    """One request between `submit` and its last event."""

    asked: Asked
    talk: Conversation
    ticket: Ticket
    listener: Listener
    submitted: float  # seconds of time.perf_counter
    until: float | None  # the same; None: no deadline
    stream: Stream | None = None  # of a guarded one
    begun: float = 0.0
    one: Answering | None = None
    shown: int = 0  # characters that are out
    cancelled: bool = False
    over: bool = False  # its last event is out


class Owner(Protocol):
    """The scheduler, as its lanes know it."""

    change: threading.Condition  # notified when anything changes

    @property
    def has_ended(self) -> bool:
        """Whether nothing runs, and nothing will; read with `change` held."""

    def leaves(self, job: Job) -> Exception | None:
        """Why a job is to be given up now."""

    def end(self, job: Job, stopped: str | None = None) -> None:
        """Its row has left: answer it."""

    def fail(self, job: Job, error: Exception) -> None:
        """It gets no answer."""

    def hand(self, job: Job, event: Event) -> None:
        """Tell whoever asked."""

    def stepped(self, rows: int, seconds: float) -> None:
        """One token was read for that many rows."""


class Lane:
    """Rows that one thread steps; `run` is that thread."""

    def __init__(self, owner: Owner, backend: Backend):
        self._owner = owner
        self._joining: list[Job] = []  # prefilled, to be added before the next step
        self.rows: dict[Row, Job] = {}  # of this thread alone
        self.batch = Batch(backend)

    @property
    def load(self) -> int:
        """How many requests are here."""
        return len(self.rows) + len(self._joining)

    def add(self, job: Job) -> None:
        """Let a prefilled request take part from the next step on; with the owner's `change` held."""
        self._joining.append(job)

    def run(self) -> None:
        """Step until the owner has ended."""
        while self._joined():
            self._give_up_those_that_leave()
            if self.rows:
                self._choose()
            if self.batch.rows:
                self._read()

    def _joined(self) -> bool:
        """Add the rows of those that were prefilled, and wait for some where there is none; False where it all ends."""
        with self._owner.change:
            while not (self._joining or self.rows):
                if self._owner.has_ended:
                    return False
                self._owner.change.wait()
            joining, self._joining = self._joining, []
        for job in joining:
            assert job.one is not None  # it was prefilled
            self.rows[job.one.decoding] = job
            self.batch.add(job.one.decoding)
        return True

    def _give_up_those_that_leave(self) -> None:
        for job, why in [(job, why) for job in self.rows.values() if (why := self._owner.leaves(job)) is not None]:
            self._give_up(job, why)

    def _give_up(self, job: Job, why: Exception) -> None:
        """Free the row of a job. One whose time is over after its first token gets what there is of its answer."""
        assert job.one is not None
        row = job.one.decoding
        self._leave(row)
        if isinstance(why, Expired) and row.ids:
            return self._owner.end(job, "deadline")
        self._owner.fail(job, why)

    def _leave(self, row: Row) -> None:
        del self.rows[row]
        if row in self.batch.rows:
            self.batch.remove(row)

    def _choose(self) -> None:
        """The next token of every row, the text that it brings, and the answers that have ended."""
        while True:
            try:
                self.batch.choose()
                break
            except Exception as e:  # of one row, which has left: the others are asked again, none twice
                for row in [r for r in self.rows if r not in self.batch.rows and r.ended is None]:
                    self._owner.fail(self.rows.pop(row), e)
        for row, job in list(self.rows.items()):
            assert job.one is not None
            job.one.first = job.one.first or job.one.now()
            if row.ended:
                del self.rows[row]
                self._owner.end(job)
            elif text := job.one.writing.text[job.shown :]:
                job.shown += len(text)
                self._owner.hand(job, Piece(text))

    def _read(self) -> None:
        started = time.perf_counter()
        try:
            self.batch.read()
        except Exception:  # of one of them: each is read by itself, and those that fail leave
            self._failed(self.batch.read_apart())
        self._owner.stepped(len(self.batch.rows), time.perf_counter() - started)

    def _failed(self, rows: Sequence[tuple[Row, Exception]]) -> None:
        for row, error in rows:
            self._owner.fail(self.rows.pop(row), error)
