"""The HTTP server of one bundle: OpenAI's chat completions, models, health, metrics, and a page to try it on.

POST /v1/chat/completions -> body within bounds -> wire.read -> Scheduler -> JSON, or events while tokens come
GET  /v1/models   /healthz (the process answers)   /readyz (weights verified, warm, requests taken)   /metrics   / (page)

Nothing that a request says is executed, opened or fetched. Whoever closes the connection cancels the request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..base.errors import CmExportError, InputError
from ..host.guard import check_bundle
from ..host.loaded import LoadedBundle
from . import log
from .completions import Form, Refused, encoded, refusal
from .door import Door
from .messages import Bounds
from .metrics import Prometheus
from .plain import parse
from .reply import Reply, Room
from .scheduler import Scheduler
from .warm_up import largest, warm
from .wire import Wanted, read

PAGE = {"": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


@dataclass(frozen=True)
class Settings:
    """How a server behaves towards its clients."""

    name: str  # of the model
    api_key: str | None = None
    bounds: Bounds = field(default_factory=Bounds)
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0  # for sending a body
    memory: int = 2**30  # of bodies and pictures of all requests together
    hosts: frozenset[str] | None = None  # that requests may be addressed to; None: any
    log_prompts: bool = False
    warm_up: bool = True  # before it says that it is ready


class Service:
    """What the routes share."""

    def __init__(self, model: LoadedBundle, scheduler: Scheduler, figures: Prometheus, settings: Settings):
        self.model, self.scheduler, self.figures, self.settings = model, scheduler, figures, settings
        of_one = settings.body_bytes + 3 * settings.bounds.pixels
        self.room = Room(max(settings.memory, 2 * of_one))
        self._decoding = asyncio.Semaphore(2)  # bodies parsed and pictures decoded at the same time
        self._prepared = threading.Event()
        threading.Thread(target=self._prepare, name="cm-export-prepare", daemon=True).start()

    def _prepare(self) -> None:
        """Verify the weights and warm up; where that fails the server never says that it is ready."""
        try:
            self.model.bundle.wait_verified()
            if self.settings.warm_up:
                started, sees = time.perf_counter(), self.model.bundle.tower is not None
                side = largest(self.model, self.model.recipe.engine)[0] if sees else 0
                warm(self.model, side)
                log.write("info", "warm", pixels=side, seconds=round(time.perf_counter() - started, 3))
        except (CmExportError, MemoryError) as e:
            return log.write("error", "not ready", message=str(e))
        self._prepared.set()

    @property
    def is_ready(self) -> bool:
        """Whether requests get answers, and none has to wait until something is made that all others need."""
        return self._prepared.is_set() and self.scheduler.is_ready

    async def completion(self, request: Request) -> Response:
        """Answer one chat completion."""
        entry: dict[str, Any] = request.scope["entry"]
        try:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # a browser asks before it sends this for a page from elsewhere
                raise Refused(415, "content-type: has to be application/json", "unsupported_media_type")
            with self.room.held(self._announced(request)):
                body = await self._body(request)
                async with self._decoding:
                    wanted = await asyncio.to_thread(self._read, body)
            if wanted.model not in (None, self.settings.name):
                known = f"this server answers as {self.settings.name!r}"
                raise Refused(404, f"the model {wanted.model!r} does not exist; {known}", "model_not_found", "model")
            if self.settings.log_prompts:
                entry["prompts"] = wanted.asked.prompts
            form = Form(entry["request_id"], self.settings.name, int(time.time()), wanted.usage, wanted.kept)
            return Reply(self, wanted, form, entry)
        except ClientDisconnect:
            entry["outcome"] = "cancelled"
            return Response(status_code=499)
        except (CmExportError, Refused) as e:
            return self.refused(e, entry)

    def refused(self, error: Exception, entry: dict[str, Any]) -> Response:
        """The response that says why there is no answer."""
        said = refusal(error, str(self.model.bundle.path), self.settings.name)
        self.note(error, said, entry)
        return Response(encoded(said.body), said.status, said.headers, "application/json")

    def note(self, error: Exception, said: Refused, entry: dict[str, Any]) -> None:
        """What the log says: a message to a client may repeat what it sent, so its text is left out unless asked for."""
        entry.update(code=said.code, param=said.param)
        if said.status >= 500 or self.settings.log_prompts:
            entry["error"] = repr(error)

    def _announced(self, request: Request) -> int:
        """Bytes of the body, as its head says. Raises Refused where they are too many."""
        most, text = self.settings.body_bytes, request.headers.get("content-length")
        size = int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else most
        if size > most:
            raise _too_large(most)
        return size

    async def _body(self, request: Request) -> bytes:
        data, most = bytearray(), self.settings.body_bytes

        async def receive() -> None:
            async for part in request.stream():
                data.extend(part)
                if len(data) > most:
                    raise _too_large(most)

        try:
            await asyncio.wait_for(receive(), self.settings.body_seconds)
        except (asyncio.TimeoutError, TimeoutError) as e:
            what = f"the body took longer than {self.settings.body_seconds:g} s to arrive"
            raise Refused(408, what, "request_timeout") from e
        return bytes(data)

    def _read(self, body: bytes) -> Wanted:
        return read(parse(body), self.settings.bounds)

    def models(self) -> list[dict[str, Any]]:
        """What is served: one model, and what it can do."""
        recipe, shape = self.model.recipe, self.model.bundle.shape
        try:
            check_bundle(recipe)
            guards = self.model.backend.has("decode_dense")
        except InputError:
            guards = False
        can = {
            "pictures": shape.sees,
            "clips": shape.clip_token >= 0,
            "guard": guards,
            "tokens": recipe.tokens.policy if shape.sees else "dense",
            "neurons": recipe.neurons.policy,
            "max_tokens": self.settings.bounds.tokens,
        }
        made = int((self.model.bundle.path / "manifest.json").stat().st_mtime)
        return [
            {"id": self.settings.name, "object": "model", "created": made, "owned_by": "cm-export", "cm_export": can}
        ]


def application(service: Service) -> Door:
    """The routes, behind the door that names, admits and logs every request."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere

    @app.post("/v1/chat/completions")
    async def completion(request: Request) -> Response:
        return await service.completion(request)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name != service.settings.name:
            said = Refused(404, f"the model {name[:200]!r} does not exist", "model_not_found", "model")
            return Response(encoded(said.body), 404, media_type="application/json")
        return _json(service.models()[0])

    @app.get("/healthz")
    async def health() -> Response:
        broken = service.scheduler.broken is not None
        return _json({"status": "broken" if broken else "alive"}, 500 if broken else 200)

    @app.get("/readyz")
    async def ready() -> Response:
        return _json({"status": "ready" if service.is_ready else "not ready"}, 200 if service.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = service.figures.text()
        return Response(text, media_type=kind)

    @app.get("/")
    @app.get("/{name}")
    async def page(name: str = "") -> Response:
        if name not in PAGE:
            raise HTTPException(404)
        file = resources.files("cm_export.serving") / "page" / (name or "index.html")
        return Response(file.read_bytes(), media_type=PAGE[name], headers={"cache-control": "no-cache"})

    async def missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # what it is registered for
        where = f"{request.method} {request.url.path[:200]}"
        what, code = ("is not allowed", "wrong_method") if error.status_code == 405 else ("is not here", "not_found")
        return service.refused(Refused(error.status_code, f"{where} {what}", code), request.scope["entry"])

    app.add_exception_handler(HTTPException, missing)
    return Door(app, service.settings.api_key, service.settings.hosts)


def _json(value: Any, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body has more than {most / 2**20:g} MiB", "request_too_large")
