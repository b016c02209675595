"""What every request passes: it gets an id, is admitted or not, gets the headers of every response, and one line of the log.

admitted:  the right key where one is set (health and the page need none);  else a Host of this machine, so that a page from
           elsewhere cannot reach a server on loopback by giving its own name this machine's address
"""

from __future__ import annotations

import hmac
import re
import time
import traceback
import uuid
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import log
from .completions import Refused, encoded

_OPEN = ("/", "/page.js", "/page.css", "/healthz", "/readyz")  # for everyone who can reach the server
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked all the time, a 503 of a start included: logged where they fail
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Door:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: frozenset[str] | None):
        self._app, self._hosts = app, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, or say why not."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, headers = time.perf_counter(), {name: value.decode("latin-1") for name, value in scope["headers"]}
        entry: dict[str, Any] = {"request_id": _id(headers), "method": scope["method"], "path": scope["path"][:200]}
        entry["client"] = scope["client"][0] if scope.get("client") else None
        scope["entry"] = entry

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                more = (*_HEADERS, (b"x-request-id", entry["request_id"].encode()))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            said = self._refusal(scope["path"], headers)
            await (self._app if said is None else _response(said))(scope, receive, named)
        except Exception:  # a fault of ours: the client gets an id, the log gets the rest
            log.write("error", "fault", request_id=entry["request_id"], trace=traceback.format_exc())
            if "status" not in entry:
                what = "the server failed to answer; its log says why, under this request's id"
                await _response(Refused(500, what, "internal_error"))(scope, receive, named)
        finally:
            status = entry.get("status")
            if scope["path"] not in _QUIET or status in (None, 500):
                fine = entry.get("outcome") == "cancelled" or (status is not None and status < 500)
                level = "info" if fine else "warning"
                log.write(level, "request", **entry, seconds=round(time.perf_counter() - started, 4))

    def _refusal(self, path: str, headers: dict[bytes, str]) -> Refused | None:
        if self._hosts is not None and _host(headers.get(b"host", "")) not in self._hosts:
            return Refused(403, f"host: this server answers to {' or '.join(sorted(self._hosts))} only", "wrong_host")
        if self._key is None or path in _OPEN:
            return None
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key):
            return None
        what = "authorization: the API key is wrong" if key else "authorization: no API key; send Bearer and the key"
        return Refused(401, what, "invalid_api_key")


def _id(headers: dict[bytes, str]) -> str:
    """The client's own id where it is a plain word."""
    given = headers.get(b"x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _host(value: str) -> str:
    """The name without its port: localhost:8000, [::1]:8000."""
    return re.sub(r":\d+\Z", "", value.lower())


def _response(said: Refused) -> Response:
    more = {"www-authenticate": "Bearer"} if said.status == 401 else {}
    return Response(encoded(said.body), said.status, said.headers | more, "application/json")
