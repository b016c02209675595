"""Answers and errors in the form of OpenAI's chat completions, with the figures of this project beside.

Piece("A re")      ->  data: {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "A re"}, ...}], ...}
Finished(answer)   ->  finish_reason, usage, and "cm_export": times, kept tokens and neurons, remarks, kept patches if asked
Failed(InputError) ->  400 {"error": {"message": "temperature: 'hot' is not a number", "type": ..., "param": "temperature"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import InputError
from ..host.chat import NotInTemplate
from ..host.conversation import Answer
from .ticket import Busy, Cancelled, Closed, Expired
from .wire import in_their_words

_ENDS = {"stop token": "stop", "stop string": "stop"}  # all others were cut
_OWN = ("peak_memory_bytes",)  # figures of the server, not of an answer
RETRY_SECONDS = 2


@dataclass(eq=False)
class Refused(Exception):
    """A request that gets no answer: its HTTP status and what to say."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...}, as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What says whether another try has a point."""
        again = {"retry-after": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        return again | ({"x-should-retry": "false"} if self.status in (500, 504) else {})


def refusal(error: Exception, bundle: str, name: str) -> Refused:
    """What a client is told about an error; `bundle`, a path of this machine, is said to be the model `name`."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError | NotInTemplate):
        said = in_their_words(error)
        param = None if str(error.where) == bundle else re.match(r"[a-z]\w*", str(said.where))
        return Refused(400, str(said).replace(bundle, name), "invalid_value", param[0] if param else None)
    if isinstance(error, Closed):
        return Refused(503, str(error), "shutting_down")
    if isinstance(error, Busy):
        return Refused(429, str(error), "server_busy")
    if isinstance(error, Expired):
        return Refused(504, str(error), "deadline_exceeded")
    if isinstance(error, Cancelled):
        return Refused(503, "the server stopped before the answer was complete", "shutting_down")
    return Refused(500, "the server failed to answer; its log says why, under this request's id", "internal_error")


@dataclass(frozen=True)
class Form:
    """One completion on its way."""

    id: str
    model: str
    created: int  # seconds since 1970
    usage: bool = False  # counts at the end of a stream
    kept: bool = False  # which patches stayed

    def whole(self, answer: Answer) -> dict[str, Any]:
        """An answer in one piece."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _end(answer)}
        return self._head("chat.completion") | {
            "choices": [choice],
            "usage": usage(answer.stats),
            "cm_export": figures(answer, self.kept),
        }

    def first(self) -> dict[str, Any]:
        """The chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text})

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """The chunks after the text."""
        end = self._chunk({}, _end(answer)) | {"cm_export": figures(answer, self.kept)}
        counts = self._head("chat.completion.chunk") | {"choices": [], "usage": usage(answer.stats)}
        return [end, counts] if self.usage else [end]

    def _chunk(self, delta: Mapping[str, Any], end: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}
        more = {"usage": None} if self.usage else {}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | more

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}


def usage(stats: Mapping[str, Any]) -> dict[str, int]:
    """Counts of tokens, those of pictures among the prompt's."""
    prompt, answer = stats["prompt_tokens"], stats["new_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def figures(answer: Answer, kept: bool) -> dict[str, Any]:
    """What `cm-export run --json` says about an answer; `kept`: the patches that stayed as well."""
    found = {name: value for name, value in answer.stats.items() if name not in _OWN} | {"notes": answer.notes}
    return found | ({"kept": [grid(cells) for cells in answer.kept]} if kept else {})


def grid(cells: np.ndarray) -> dict[str, Any]:
    """Kept cells [rows, columns] bool as text: row by row, 1 where one stayed."""
    rows, columns = cells.shape
    return {"rows": rows, "columns": columns, "cells": "".join("01"[int(cell)] for cell in cells.ravel())}


def encoded(value: Any) -> bytes:
    """JSON without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + encoded(value) + b"\n\n"


def _end(answer: Answer) -> str:
    return _ENDS.get(answer.stats["stopped"], "length")
