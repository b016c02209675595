"""Asks a server and hands out its answer while it comes: `cm-export serve`, or Triton with the model of `deploy triton`.

POST /v1/chat/completions                 data: {"choices": [{"delta": {"content": "A re"}}]} ...   data: [DONE]
POST /v2/models/vlm/generate_stream       data: {"text_output": "A re"} ...   data: {"text_output": "", "stats": "{...}"}
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BytesIO
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image, UnidentifiedImageError

from ..base.errors import CmExportError, InputError

TRITON_MODEL = "vlm"
_LONGEST = 2**24  # characters of one line of an answer


@dataclass(frozen=True)
class Question:
    """What to ask: `pictures` are the bytes of files, `fields` others of the request, such as max_tokens or token_share."""

    prompt: str
    pictures: Sequence[bytes] = ()
    system: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """Where to ask. `model` None: what the server has."""

    url: str
    model: str | None = None
    api_key: str | None = None
    seconds: float = 600.0  # without a byte
    wait: float = 0.0  # seconds for a server that is starting to take connections

    def ask(self, question: Question) -> Generator[str, None, dict[str, Any]]:
        """Pieces of the answer; what the generator returns are its figures, {} where the server gives none.

        Raises InputError for what the server refuses, CmExportError where it fails or ends before its answer does.
        """
        if self._is_triton():
            return self._of_triton(question)
        return self._of_openai(question)

    def _is_triton(self) -> bool:
        self._await()
        with self._answer("GET", "/v1/models", fine=(200, 404, 401, 400)) as answer:
            return answer.status in (404, 400)

    def _await(self) -> None:
        """Return when it takes connections, or when it has had `wait` seconds for that."""
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            try:
                with self._answer("GET", "/v1/models", fine=range(600)):
                    return
            except InputError:
                raise
            except CmExportError:
                time.sleep(0.1)

    def _of_openai(self, question: Question) -> Generator[str, None, dict[str, Any]]:
        system = [] if question.system is None else [{"role": "system", "content": question.system}]
        text = [{"type": "text", "text": question.prompt}]
        shown = [
            {"type": "image_url", "image_url": {"url": _uri(data, n)}} for n, data in enumerate(question.pictures, 1)
        ]
        message = {"role": "user", "content": [*shown, *text]}
        body = {"model": self.model or self._first_model(), "messages": [*system, message], "stream": True}
        figures: dict[str, Any] = {}
        with self._answer("POST", "/v1/chat/completions", {**body, **question.fields}) as answer:
            for event in _events(answer):
                if event is None:
                    return figures
                figures |= event.get("cm_export", {})
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        raise self._ended()

    def _first_model(self) -> str:
        with self._answer("GET", "/v1/models") as answer:
            models = _value(answer.read()).get("data") or [{}]
        return str(models[0].get("id", ""))

    def _of_triton(self, question: Question) -> Generator[str, None, dict[str, Any]]:
        body = {"text_input": question.prompt, "stream": True, **question.fields}
        if question.system is not None:
            body["system"] = question.system
        if question.pictures:
            body["images"] = [base64.b64encode(data).decode() for data in question.pictures]
        with self._answer("POST", f"/v2/models/{quote(self.model or TRITON_MODEL)}/generate_stream", body) as answer:
            for event in _events(answer):
                if text := (event or {}).get("text_output"):
                    yield text
                if event and "stats" in event:
                    found: dict[str, Any] = json.loads(event["stats"])
                    return found
        raise self._ended()

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Any = None, fine: Container[int] = (200,)
    ) -> Iterator[HTTPResponse]:
        """The response to one request, of which the rest is still to come."""
        try:
            parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
            port = parts.port
        except ValueError as e:
            raise InputError(f"is no URL ({e})", where=self.url, fix="give one such as http://127.0.0.1:8000") from e
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("is no URL of a server", where=self.url, fix="give one such as http://127.0.0.1:8000")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname, port, timeout=self.seconds)
        base = parts.path.rstrip("/").removesuffix("/v1")
        headers = {"accept": "application/json, text/event-stream"}
        headers |= {} if body is None else {"content-type": "application/json"}
        headers |= {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            connection.request(method, base + path, None if body is None else json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            if answer.status not in fine:
                raise _refusal(answer, self.url)
            yield answer
        except (OSError, HTTPException) as e:
            what = getattr(e, "strerror", None) or str(e) or type(e).__name__
            fix = "see that its server runs, or wait for one that is starting: --wait SECONDS"
            raise CmExportError(f"cannot be asked ({what})", where=self.url, fix=fix) from e
        finally:
            connection.close()

    def _ended(self) -> CmExportError:
        return CmExportError("ended before its answer was complete", where=self.url, fix="ask again, and see its log")


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any] | None]:
    """Events of a stream; None is the sign of its end. Raises what an event says is wrong."""
    while line := answer.readline(_LONGEST):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield None
            continue
        event = _value(data)
        if event.get("error"):
            raise CmExportError(_said(event), where="the server", fix="ask again, and see its log")
        yield event


def _refusal(answer: HTTPResponse, url: str) -> CmExportError:
    said = _said(
        _value(answer.read(_LONGEST).strip().removeprefix(b"data:"))
    )  # Triton refuses a stream in an event of it
    if answer.status < 500 and answer.status != 429:
        return InputError(f"refused ({answer.status}): {said}", where=url)
    return CmExportError(f"failed ({answer.status}): {said}", where=url, fix="ask again later, and see its log")


def _said(value: Mapping[str, Any]) -> str:
    """What an error says in either form."""
    error = value.get("error")
    text = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(text or "it says nothing more").split())[:1000]


def _value(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _uri(data: bytes, number: int) -> str:
    """A picture as a URI that holds it. Raises InputError for what is none."""
    try:
        with Image.open(BytesIO(data)) as image:
            kind = Image.MIME.get(image.format or "", "image/png")
    except UnidentifiedImageError as e:
        what, where = "is not a picture that can be read", f"--image, picture {number}"
        raise InputError(what, where=where, fix="give a PNG, JPEG or WebP") from e
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
