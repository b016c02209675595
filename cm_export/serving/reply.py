"""Writes the answer of one request to its connection while it comes, and cancels it when the client has gone.

scheduler's threads --call_soon_threadsafe--> events --> JSON or data: lines            connection closed --> cancel
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..base.errors import CmExportError
from ..host.conversation import Answer
from .completions import Form, Refused, encoded, event, refusal
from .scheduler import Scheduler
from .ticket import Busy, Event, Failed, Finished, Piece
from .wire import Wanted

TICK_SECONDS = 10.0  # without text, after which a stream says that it lives
WRITE_SECONDS = 30.0  # for a client to read what was written, before it counts as gone
_EVENTS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nobody on the way may hold pieces back


class Room:
    """Memory for what clients send; only for the thread of the event loop."""

    def __init__(self, size: int):
        self._size = self._left = size

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Raises Busy where that much is not left."""
        if size > self._left:
            raise Busy("holds as many pictures as it can", where="the server", fix="try again in a few seconds")
        self._left -= size
        try:
            yield
        finally:
            self._left += size


class Server(Protocol):
    """What a reply needs of its server."""

    scheduler: Scheduler
    room: Room

    def refused(self, error: Exception, entry: dict[str, Any]) -> Response:
        """The response that says why there is no answer."""

    def note(self, error: Exception, said: Refused, entry: dict[str, Any]) -> None:
        """What the log says about it."""


class _Gone(Exception):
    """Nobody reads the answer any more."""


class Reply(Response):
    """The response to one chat completion."""

    def __init__(self, server: Server, wanted: Wanted, form: Form, entry: dict[str, Any]):
        super().__init__()
        self._server, self._wanted, self._form, self._entry = server, wanted, form, entry
        self._events = asyncio.Queue[Event | None | str]()  # None: a tick; a text: the client has gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request in, and write what comes."""
        pictures = sum(3 * picture.pixels for picture in self._wanted.asked.images)
        loop, helpers, ticket = asyncio.get_running_loop(), list[asyncio.Task[None]](), None

        def hear(event: Event) -> None:  # in the scheduler's threads
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            with self._server.room.held(pictures):
                client = scope["client"][0] if scope.get("client") else ""
                ticket = self._server.scheduler.submit(
                    self._wanted.asked, client, self._wanted.deadline, hear, self._form.id
                )
                helpers = [asyncio.create_task(self._watch(receive)), asyncio.create_task(self._tick())]
                await (self._stream(scope, receive, send) if self._wanted.stream else self._whole(scope, receive, send))
        except CmExportError as e:  # before anything was written
            await self._server.refused(e, self._entry)(scope, receive, send)
        except _Gone:
            self._entry["outcome"] = "cancelled"
        finally:
            if ticket is not None:
                ticket.cancel()  # nothing happens where it has ended
            for helper in helpers:
                helper.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait("gone")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._events.put_nowait(None)

    async def _next(self) -> Event | None:
        found = await self._events.get()
        if isinstance(found, str):
            raise _Gone
        return found

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            found = await self._next()
            if isinstance(found, Failed):
                await self._server.refused(found.error, self._entry)(scope, receive, send)
                return
            if isinstance(found, Finished):
                self._note(found.answer)
                body = encoded(self._form.whole(found.answer))
                await Response(body, media_type="application/json")(scope, receive, send)
                return

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What fails before the first piece is an error with a status of its own, later it is an event."""
        found = await self._next()
        if isinstance(found, Failed):
            await self._server.refused(found.error, self._entry)(scope, receive, send)
            return
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        head += [(name.encode(), value.encode()) for name, value in _EVENTS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await self._write(send, event(self._form.first()))
        while True:
            if found is None:
                await self._write(send, b": still working\n\n")
            elif isinstance(found, Piece):
                await self._write(send, event(self._form.piece(found.text)))
            elif isinstance(found, Finished):
                self._note(found.answer)
                chunks = b"".join(map(event, self._form.last(found.answer)))
                await self._write(send, chunks + b"data: [DONE]\n\n", more=False)
                return
            else:
                said = self._refusal(found.error)
                await self._write(send, event(said.body) + b"data: [DONE]\n\n", more=False)
                return
            found = await self._next()

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        """Raises _Gone where the client does not read."""
        with anyio.move_on_after(WRITE_SECONDS) as scope:
            await send({"type": "http.response.body", "body": data, "more_body": more})
        if scope.cancelled_caught:
            raise _Gone

    def _refusal(self, error: Exception) -> Refused:
        said = refusal(error, str(self._server.scheduler.model.bundle.path), self._form.model)
        self._server.note(error, said, self._entry)
        return said

    def _note(self, answer: Answer) -> None:
        names = ("queue_s", "ttft_s", "total_s", "prompt_tokens", "new_tokens", "image_tokens", "image_tokens_kept",
                 "neurons_kept", "stopped", "tokens_per_s")  # fmt: skip
        self._entry.update({name: answer.stats[name] for name in names} | {"outcome": "answered"})
