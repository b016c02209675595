"""Chat messages in OpenAI's form, as a client sends them, become those that asking.py takes: pictures first, then one text.

[{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]
-> [{"type": "image", "image": Opened}, {"type": "text", "text": "What is this?"}]
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import InputError
from ..host.images import Opened
from .pictures import Pixels, decoded
from .plain import kind, short, text

_DATA = re.compile(r"data:(image/[\w.+-]{1,40})?((?:;[\w.+-]{1,40}=[\w.+-]{1,40})*);base64,", re.ASCII | re.IGNORECASE)
_URL = 'give the picture itself: {"url": "data:image/png;base64,..."}'
_PART = 'give {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_OF_MESSAGES = ("role", "content")
# What a client sends back with an answer, null or empty.
_OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls")


@dataclass(frozen=True)
class Bounds:
    """What one request may bring, and ask for."""

    tokens: int = 1024  # of an answer; of one that asks for no number, too
    text: int = 200_000  # characters of all messages
    messages: int = 512
    pictures: int = 8
    picture_bytes: int = 20 * 2**20  # of one, encoded
    pixels: int = 50_000_000  # of all pictures together


def messages(value: object, bounds: Bounds, room: Pixels) -> list[dict[str, Any]]:
    """Messages as asking.py takes them: pictures, then one text."""
    if not isinstance(value, list | tuple) or not value:
        what = "is missing" if value is None else "is empty" if value in ([], ()) else f"is a {kind(value)}"
        raise InputError(what, where="messages", fix='give [{"role": "user", "content": "..."}]')
    if len(value) > bounds.messages:
        raise InputError(
            f"{len(value)} of them, at most {bounds.messages} are taken", where="messages", fix="shorten it"
        )
    out, length = [], 0
    for i, message in enumerate(value):
        one = _message(message, f"messages[{i}]", bounds, room)
        length += len(one["content"][-1]["text"])
        if length > bounds.text:
            raise InputError(f"more than {bounds.text} characters of text", where="messages", fix="shorten it")
        out.append(one)
    return out


def _message(message: object, where: str, bounds: Bounds, room: Pixels) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"is a {kind(message)}", where=where, fix='give {"role": "user", "content": "..."}')
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"its role is {short(role)}", where=where, fix=f"give {', '.join(_ROLES)}")
    for name, value in message.items():
        empty = value is None or value in ([], {}, "")
        if name not in _OF_MESSAGES and not (empty and role == "assistant" and name in _OF_ANSWERS):
            fix = "leave it out: a message has a role and a content"
            raise InputError(f"has a field {short(name)}, which is not supported", where=where, fix=fix)
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise InputError(f"its content is a {kind(parts)}", where=where, fix=_PART)
    if len(parts) > bounds.messages:
        raise InputError(
            f"has {len(parts)} parts, at most {bounds.messages} are taken", where=where, fix="join its texts"
        )
    texts: list[str] = []
    shown: list[Opened] = []
    for n, part in enumerate(parts):
        place, type_ = f"{where}.content[{n}]", part.get("type") if isinstance(part, Mapping) else None
        if type_ == "text" and set(part) == {"type", "text"}:
            texts.append(text(part["text"], place, bounds.text))
        elif type_ == "image_url" and set(part) == {"type", "image_url"}:
            if len(shown) >= bounds.pictures:
                raise InputError(f"more than {bounds.pictures} pictures", where=where, fix="leave some out")
            shown.append(decoded_within(_bytes(part["image_url"], place, bounds), place, bounds, room))
        else:
            raise InputError(f"is no part that can be read (type {short(type_)})", where=place, fix=_PART)
    # Our prompts have pictures before the text of their message, wherever a client puts them (OpenAI's examples: behind it).
    blocks: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in shown]
    return {"role": _ROLES[role], "content": [*blocks, {"type": "text", "text": "".join(texts)}]}


def _bytes(value: object, where: str, bounds: Bounds) -> bytes:
    """The picture of a data URI. Raises InputError for every other URL."""
    url = value.get("url") if isinstance(value, Mapping) and set(value) <= {"url", "detail"} else None
    if not isinstance(value, Mapping) or not isinstance(url, str):
        raise InputError("is no image_url that can be read", where=where, fix=_URL)
    if value.get("detail") not in (None, "auto", "low", "high"):
        raise InputError(f"detail {short(value['detail'])} is unknown", where=where, fix="leave detail out")
    begin = _DATA.match(url)
    if begin is None:
        raise InputError(f"URLs and paths are not opened ({short(url[:40])})", where=where, fix=_URL)
    if len(url) - begin.end() > 4 * (bounds.picture_bytes + 3) // 3:
        raise _too_large(where, bounds)
    try:
        return base64.b64decode(url[begin.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise InputError("its data is no base64", where=where, fix="encode the picture's file as base64") from e


def decoded_within(data: object, where: str, bounds: Bounds, room: Pixels) -> Opened:
    """A picture whose file and whose pixels are within the bounds. Raises InputError."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"is a {kind(data)}", where=where, fix="give the bytes of a picture file")
    if len(data) > bounds.picture_bytes:
        raise _too_large(where, bounds)
    return decoded(bytes(data), where, room)


def _too_large(where: str, bounds: Bounds) -> InputError:
    what = f"has more than {bounds.picture_bytes / 2**20:g} MiB"
    return InputError(what, where=where, fix="scale the picture down, or save it as JPEG")
