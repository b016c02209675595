"""What a client holds for a request that it handed in: pieces of text while they come, then the answer, or why there is none.

submit -> Ticket      Piece "A re"   Piece "d circle"   Finished(answer)        or        Failed(error)
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..base.errors import CmExportError
from ..host.conversation import Answer


class Busy(CmExportError):
    """No room for another request now."""


class Closed(Busy):
    """The server takes no more requests, since it is being stopped."""


class Cancelled(CmExportError):
    """Whoever asked does not want the answer any more."""


class Expired(CmExportError):
    """The deadline passed before the first token, or before the end of a guarded answer."""


@dataclass(frozen=True)
class Piece:
    """More text: whole characters."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The whole answer; its `stats` are those of `cm-export run --json`, and `queue_s`, `total_s` besides.

    `queue_s`: from handing in to the start of the vision graph or prefill, from which `ttft_s` counts. `total_s`: from
    handing in to the end. `stopped` may be "deadline", too.
    """

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """Why there is no answer: InputError where the request cannot be answered, else Cancelled, Expired or a fault."""

    error: Exception


Event = Piece | Finished | Failed
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Ticket(Iterator[str]):
    """A request on its way. Iterating gives the pieces of text and raises what `Failed` says; `answer` is set at its end.

    Where a listener was given to `submit`, it gets the events instead, in the scheduler's threads.
    """

    id: str
    answer: Answer | None = None
    _cancel: Callable[[Ticket], None] = field(default=lambda _: None, repr=False)
    _events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue, repr=False)
    _error: Exception | None = None

    def __next__(self) -> str:
        if self._error is not None:
            raise self._error
        if self.answer is not None:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, Piece):
            return event.text
        if isinstance(event, Finished):
            self.answer = event.answer
            raise StopIteration
        self._error = event.error
        raise event.error

    def whole(self) -> Answer:
        """Wait for the answer. Raises what `Failed` says."""
        for _ in self:
            pass
        assert self.answer is not None  # iterating ends with it, or raises
        return self.answer

    def put(self, event: Event) -> None:
        """Called by the scheduler."""
        self._events.put(event)

    def cancel(self) -> None:
        """Stop it, wherever it is: its row is free before the next step. Nothing happens where it has ended."""
        self._cancel(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
