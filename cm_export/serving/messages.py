"""Chat messages in OpenAI's form, as a client sends them, become those that asking.py takes: pictures first, then one text.

[{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]
-> [{"type": "image", "image": Opened}, {"type": "text", "text": "What is this?"}]

A clip comes as its frames, {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,FRAME,FRAME,...", "fps": 2}}; a
file such as clip.mp4 is refused, since its dozens of formats and codecs would be as many parsers for data of strangers.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import InputError
from ..base.settings import is_number
from ..host.clips import Clip, given_clip
from ..host.images import Opened
from .pictures import Pixels, decoded
from .plain import kind, short, text

_DATA = re.compile(r"data:(image/[\w.+-]{1,40})?((?:;[\w.+-]{1,40}=[\w.+-]{1,40})*);base64,", re.ASCII | re.IGNORECASE)
_FILM = re.compile(r"data:(video/[\w.+-]{1,40})((?:;[\w.+-]{1,40}=[\w.+-]{1,40})*);base64,", re.ASCII | re.IGNORECASE)
_FRAMES = (
    'give its frames as JPEG, joined by commas, and their speed: {"url": "data:video/jpeg;base64,...,...", "fps": 2}'
)
_URL = 'give the picture itself: {"url": "data:image/png;base64,..."}'
_PART = (
    'give {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}} '
    '(of a clip {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,FRAME,FRAME"}})'
)
_FASTEST = 1000  # frames a second
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
    pictures: int = 8  # and clips
    frames: int = 128  # of a clip
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
        elif type_ in ("image_url", "video_url") and set(part) == {"type", type_}:
            if len(shown) >= bounds.pictures:
                raise InputError(f"more than {bounds.pictures} pictures", where=where, fix="leave some out")
            read = _picture if type_ == "image_url" else _clip
            shown.append(read(part[type_], place, bounds, room))
        else:
            raise InputError(f"is no part that can be read (type {short(type_)})", where=place, fix=_PART)
    # Our prompts have pictures before the text of their message, wherever a client puts them (OpenAI's examples: behind it).
    blocks: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in shown]
    return {"role": _ROLES[role], "content": [*blocks, {"type": "text", "text": "".join(texts)}]}


def _picture(value: object, where: str, bounds: Bounds, room: Pixels) -> Opened:
    """The picture of a data URI. Raises InputError for every other URL."""
    url = value.get("url") if isinstance(value, Mapping) and set(value) <= {"url", "detail"} else None
    if not isinstance(value, Mapping) or not isinstance(url, str):
        raise InputError("is no image_url that can be read", where=where, fix=_URL)
    if value.get("detail") not in (None, "auto", "low", "high"):
        raise InputError(f"detail {short(value['detail'])} is unknown", where=where, fix="leave detail out")
    begin = _DATA.match(url)
    if begin is None:
        raise InputError(f"URLs and paths are not opened ({short(url[:40])})", where=where, fix=_URL)
    return decoded_within(_bytes(url[begin.end() :], where, bounds), where, bounds, room)


def _clip(value: object, where: str, bounds: Bounds, room: Pixels) -> Clip:
    """The frames of a data URI. Raises InputError for every other URL, and for the file of a clip."""
    url = value.get("url") if isinstance(value, Mapping) and set(value) <= {"url", "fps"} else None
    if not isinstance(value, Mapping) or not isinstance(url, str):
        raise InputError("is no video_url that can be read", where=where, fix=_FRAMES)
    fps, begin = value.get("fps"), _FILM.match(url)
    if fps is not None and (not is_number(fps) or not 0 < fps <= _FASTEST):
        raise InputError(
            f"fps {short(fps)} is no number above 0 and up to {_FASTEST}", where=where, fix="give frames a second"
        )
    if begin is None:
        raise InputError(f"URLs and paths are not opened ({short(url[:40])})", where=where, fix=_FRAMES)
    if begin[1].lower() != "video/jpeg":
        raise InputError(f"files of clips are not opened ({short(begin[1])})", where=where, fix=_FRAMES)
    if (count := url.count(",", begin.end()) + 1) > bounds.frames:
        what = f"has {count} frames, at most {bounds.frames} are taken"
        raise InputError(what, where=where, fix="send fewer, and their fps")
    names = [f"{where}: frame {i}" for i in range(count)]
    files = zip(names, url[begin.end() :].split(","), strict=True)
    frames = [decoded_within(_bytes(data, name, bounds), name, bounds, room) for name, data in files]
    return given_clip(frames, fps, None, where)


def _bytes(data: str, where: str, bounds: Bounds) -> bytes:
    """A file of base64. Raises InputError."""
    if len(data) > 4 * (bounds.picture_bytes + 3) // 3:
        raise _too_large(where, bounds)
    try:
        return base64.b64decode(data.encode("ascii"), validate=True)
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
