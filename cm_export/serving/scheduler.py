"""Continuous batching: requests join and leave the one decode loop between its steps, each as if it was alone.

submit -> waiting (turns among clients) -> prefill thread -> rows of the decode thread -> pieces of text -> answer
          at most `queued`                 one at a time,    at most `at_once` from prefill on, one graph call a step
                                           while steps go on

A prompt is read in a thread of its own, so that the others' steps go on meanwhile; where a runtime takes one call at a
time (TensorRT), they wait for that one call. A guarded request checks drafts of its own length with the dense graph, so
it cannot share steps: it takes a place, and a thread. An error belongs to the request that it came from.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..base.errors import CmExportError, InputError
from ..host.asking import Asked
from ..host.chat import NotInTemplate
from ..host.conversation import Answer, Stream
from ..host.loaded import LoadedBundle
from .lane import Job, Lane
from .ticket import Busy, Cancelled, Closed, Event, Expired, Failed, Finished, Listener, Piece, Ticket
from .waiting import Waiting

QUEUED = 64


class Observer(Protocol):
    """Who counts what a scheduler does, such as metrics.py; called in its threads, and must not raise."""

    def waiting(self, queued: int, running: int) -> None:
        """How many wait, and how many are being answered, changed."""

    def step(self, rows: int, seconds: float) -> None:
        """One token was read for that many rows."""

    def ended(self, outcome: str, answer: Answer | None, seconds: float) -> None:
        """A request left: "answered", "cancelled", "expired", "invalid", "failed" or "refused", after so long."""


class Unobserved:
    """Counts nothing."""

    def waiting(self, queued: int, running: int) -> None: ...
    def step(self, rows: int, seconds: float) -> None: ...
    def ended(self, outcome: str, answer: Answer | None, seconds: float) -> None: ...


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is."""

    queued: int
    running: int
    at_once: int
    most_queued: int


class Scheduler:
    """Answers requests to one loaded bundle; any thread may submit and cancel."""

    def __init__(
        self,
        model: LoadedBundle,
        at_once: int = 8,
        queued: int = QUEUED,
        observer: Observer | None = None,
        deadline: float | None = None,
        lanes: int = 1,
    ):
        """`at_once`: requests that are answered at the same time, each with a cache and core rows of its own.

        `queued`: how many may wait for a place. `deadline`: seconds of a request that names none; None: any time. `lanes`:
        threads of decoding (see lane.py).
        """
        for name, value in (("at_once", at_once), ("queued", queued), ("lanes", lanes)):
            if value < 1:
                raise InputError(f"is {value}", where=name, fix="give 1 or more")
        self.model, self.observer = model, observer or Unobserved()
        self._at_once, self._most_queued, self._deadline = at_once, queued, deadline
        self.change = threading.Condition()  # guards the three below, and what jobs say about themselves
        self._waiting = Waiting[Job]()
        self._running: set[Job] = set()  # from prefill on
        self._open, self._stopping = True, False
        self.broken: BaseException | None = None  # a fault of the scheduler itself
        self._lanes = [Lane(self, model.backend) for _ in range(lanes)]
        self._threads = [
            threading.Thread(target=self._guarded_loop, args=(loop,), name=f"cm-export-{name}", daemon=True)
            for name, loop in (("prefill", self._prefills), *(("decode", lane.run) for lane in self._lanes))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        asked: Asked,
        client: str = "",
        deadline: float | None = None,
        listener: Listener | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Hand a request in. Raises InputError for what can be seen at once, Busy where there is no room, Closed.

        `client`: requests of one client do not hold up those of others. `deadline`: seconds from now. A `listener` gets
        the events in the scheduler's threads: it must be quick, and where it raises the request is cancelled.
        """
        talk = self.model.talk(asked)
        stream = talk.written(asked.prompts[-1], asked.limits)  # checks what can be checked before anything is computed
        now, wait = time.perf_counter(), self._deadline if deadline is None else deadline
        ticket = Ticket(request_id or uuid.uuid4().hex)
        job = Job(asked, talk, ticket, listener or ticket.put, now, None if wait is None else now + wait)
        job.stream = stream if asked.limits.guard else None
        ticket._cancel = lambda _: self._cancel(job)
        with self.change:
            if self.broken is not None:
                raise CmExportError("ended by a fault", where="the scheduler", fix="start it again") from self.broken
            refusal = self._refusal()
            if refusal is None:
                self._waiting.put(client, job)
                self._told()
        if refusal is not None:
            self.observer.ended("refused", None, 0.0)
            raise refusal
        return ticket

    @property
    def has_ended(self) -> bool:
        """Whether nothing runs, and nothing will; with `change` held."""
        return self._stopping and not self._running

    def stepped(self, rows: int, seconds: float) -> None:
        """One token was read for that many rows of a lane."""
        self.observer.step(rows, seconds)

    def load(self) -> Load:
        """How many wait and are being answered."""
        with self.change:
            return Load(len(self._waiting), len(self._running), self._at_once, self._most_queued)

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now, or could be after others end."""
        return self._open and self.broken is None

    def close(self, drain: bool = True, seconds: float | None = None) -> None:
        """Take no more requests. `drain`: answer those that are here, within `seconds`; the rest is cancelled."""
        with self.change:
            self._open = False
            if drain:
                self.change.wait_for(lambda: not (self._waiting or self._running) or self.broken, seconds)
            for job in [*self._waiting.all(), *self._running]:
                self._mark_cancelled(job)
            self._stopping = True
            self._told()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    # ------------------------------------------------ state

    def _refusal(self) -> Busy | None:
        if not self._open:
            return Closed("takes no more requests", where="the server", fix="ask another one, or again once it is up")
        if len(self._waiting) >= self._most_queued:
            what = f"{len(self._running)} requests are being answered and {self._most_queued} wait, which is the most"
            return Busy(what, where="the server", fix="try again in a few seconds")
        return None

    def _told(self) -> None:
        """Wake whoever waits for a change; with the lock held."""
        self.observer.waiting(len(self._waiting), len(self._running))
        self.change.notify_all()

    def _cancel(self, job: Job) -> None:
        with self.change:
            if not job.over:
                self._mark_cancelled(job)

    def _mark_cancelled(self, job: Job) -> None:
        job.cancelled = True
        self.change.notify_all()

    def _finish(self, job: Job, event: Finished | Failed) -> None:
        """The last event of a job, whose place is free from then on."""
        with self.change:
            if job.over:
                return
            job.over = True
            self._waiting.remove([job])
            self._running.discard(job)
            self._told()
        answer = event.answer if isinstance(event, Finished) else None
        self.observer.ended(_outcome(event), answer, time.perf_counter() - job.submitted)
        self.hand(job, event)
        job.ticket._cancel = _nothing  # or they would hold each other, and with them a cache, until the collector comes

    def fail(self, job: Job, error: Exception) -> None:
        """It gets no answer."""
        self._finish(job, Failed(error))

    def hand(self, job: Job, event: Event) -> None:
        """Tell whoever asked."""
        try:
            job.listener(event)
        except Exception:  # whoever listens is gone, or broken: that is the end of this request, not of others
            job.cancelled = True

    def end(self, job: Job, stopped: str | None = None) -> None:
        """The answer of a row that has left; `stopped`: why, where its last token does not say so."""
        assert job.one is not None  # it had a row
        try:
            answer = job.talk.end(job.one, job.one.decoding.ids)
        except Exception as e:
            return self.fail(job, e)
        if stopped is not None:
            answer.stats["stopped"] = stopped
        self._whole(job, answer)

    def _whole(self, job: Job, answer: Answer) -> None:
        now = time.perf_counter()
        answer.stats.update(queue_s=job.begun - job.submitted, total_s=now - job.submitted)
        if text := answer.text[job.shown :]:
            self.hand(job, Piece(text))
        self._finish(job, Finished(answer))

    def leaves(self, job: Job) -> Exception | None:
        """Why a job is to be given up now."""
        if job.cancelled:
            return Cancelled("was cancelled", where=f"request {job.ticket.id}")
        if job.until is not None and time.perf_counter() > job.until:
            what = f"is not answered within its {job.until - job.submitted:.3g} s"
            fix = "allow more time, or ask when fewer others do"
            return Expired(what, where=f"request {job.ticket.id}", fix=fix)
        return None

    def _guarded_loop(self, loop: Callable[[], None]) -> None:
        """A fault of the scheduler ends every request in words, instead of leaving them waiting forever."""
        try:
            loop()
        except BaseException as e:
            with self.change:
                self.broken, jobs = e, [*self._waiting.all(), *self._running]
                for job in jobs:
                    job.cancelled = True  # so that other lanes free their rows
                self.change.notify_all()
            for job in jobs:
                self.fail(job, CmExportError(f"the scheduler ended by a fault ({e!r})", where="the server"))
            raise

    # ------------------------------------------------ the prefill thread

    def _prefills(self) -> None:
        while (job := self._next()) is not None:
            self._begin(job)
            del job  # or its cache would be held while the next one is awaited

    def _begin(self, job: Job) -> None:
        """Read its prompt and hand it to a lane; a guarded one gets a thread of its own."""
        job.begun = time.perf_counter()
        if job.stream is not None:
            name = f"cm-export-guard-{job.ticket.id}"
            threading.Thread(target=self._alone, args=(job, job.stream), name=name, daemon=True).start()
            return
        try:
            job.one = job.talk.begin(job.asked.prompts[-1], job.asked.limits)
        except Exception as e:
            self.fail(job, e)
            return
        with self.change:
            min(self._lanes, key=lambda lane: lane.load).add(job)
            self.change.notify_all()

    def _next(self) -> Job | None:
        """The next one that waits, once there is a place; None where the scheduler stops. Those given up leave."""
        while True:
            with self.change:
                gone = [(job, why) for job in self._waiting.all() if (why := self.leaves(job)) is not None]
                if not gone:
                    if len(self._waiting) and len(self._running) < self._at_once:
                        job = self._waiting.take()
                        self._running.add(job)
                        self._told()
                        return job
                    if self._stopping and not len(self._waiting):
                        return None
                    self.change.wait(self._until_first_deadline())
            for job, why in gone:
                self.fail(job, why)

    def _until_first_deadline(self) -> float | None:
        """Seconds until the first of those that wait expires."""
        ends = [job.until for job in self._waiting.all() if job.until is not None]
        return max(0.0, min(ends) - time.perf_counter()) + 1e-3 if ends else None

    def _alone(self, job: Job, stream: Stream) -> None:
        """A guarded request: its own loop, its own thread."""
        try:
            with stream:
                for text in stream:
                    if (why := self.leaves(job)) is not None:
                        return self.fail(job, why)
                    job.shown += len(text)
                    self.hand(job, Piece(text))
            assert stream.answer is not None  # it has ended
            self._whole(job, stream.answer)
        except Exception as e:
            self.fail(job, e)


def _nothing(_: Ticket) -> None:
    """There is nothing left to cancel."""


def _outcome(event: Finished | Failed) -> str:
    if isinstance(event, Finished):
        return "answered"
    kinds = ((Cancelled, "cancelled"), (Expired, "expired"), (InputError, "invalid"), (NotInTemplate, "invalid"))
    return next((name for kind, name in kinds if isinstance(event.error, kind)), "failed")
