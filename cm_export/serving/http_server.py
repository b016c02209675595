"""Runs an application on uvicorn: patient with requests that are being answered, impatient with connections that say nothing.

bind -> announce the URL -> serve -> SIGTERM or Ctrl-C: no new connections, those here get their answers, within `drain` seconds
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..base.errors import InputError
from . import log

CONNECTIONS = 256  # at the same time
HEAD_SECONDS = 15.0  # for the head of a request, and for what is still sent after its answer
IDLE_SECONDS = 30  # between two requests of a connection


class Impatient(H11Protocol):
    """Closes connections on which no request comes about; uvicorn itself waits for a request's head as long as it takes."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Something has arrived."""
        super().data_received(data)
        if self._waits and self._timer is None:
            self._arm()
        elif not self._waits:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has gone."""
        self._disarm()
        super().connection_lost(exc)

    @property
    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._end)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self._waits:
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]):
        super().__init__(config)
        self._announce = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises InputError where that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as e:
        raise InputError(f"is no address of this machine ({e.strerror})", where=f"--host {host}", fix="give one") from e
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(CONNECTIONS)
    except OSError as e:
        made.close()
        what, fix = f"cannot be listened on ({e.strerror})", "give another --port, or 0 for any that is free"
        raise InputError(what, where=f"{host}:{port}", fix=fix) from e
    return made


def url(listening: socket.socket) -> str:
    """Where a socket listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Any, drain: float, started: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Answers requests once it runs. `drain`: seconds that those which are there may take when it is stopped."""
    config = uvicorn.Config(
        app, http=Impatient, ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=IDLE_SECONDS, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(drain)),
    )  # fmt: skip
    return _Server(config, started)


def serve(app: Any, listening: socket.socket, drain: float, started: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then those that are here, for at most `drain` seconds."""
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [log.Lines(logging.WARNING)], False
    # uvicorn raises a signal again once it has stopped; it has been obeyed by then.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server(app, drain, started).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
