"""What a program asks of a loaded bundle, checked before anything is computed.

"What is this?", images="a.png"                                                          one question about a picture
[{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}]},
 {"role": "assistant", "content": "A circle."},
 {"role": "user", "content": "Which colour does it have?"}]                              a conversation; its end is answered

The command line checks its options itself, under their own names, before it loads anything.
"""

from __future__ import annotations

import inspect
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from ..base.by_name import nearest
from ..base.errors import InputError
from . import images as pictures
from .guard import EVERY
from .images import Opened
from .runner import Budget
from .sampling import Sampling

Messages = Sequence[Mapping[str, Any]]
_LARGEST_SEED = 2**31 - 1
_TURNS = "give an optional system message, then user and assistant in turn, and the question (user) last"
_BLOCK = 'give {"type": "text", "text": ...} or {"type": "image", "image": ...}'


@dataclass(frozen=True)
class Limits:
    """How far an answer goes, and how it is checked."""

    max_new_tokens: int = 128
    guard: int | None = None  # tokens of a draft that is checked against the dense model; None: no checks


@dataclass(frozen=True)
class Asked:
    """Something to answer: what was said, pictures, and how to answer."""

    prompts: list[str]  # the last one is to be answered
    answers: list[str] = field(default_factory=list)  # to all others
    system: str | None = None
    images: list[Opened] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    limits: Limits = field(default_factory=Limits)
    control_tokens: bool = False  # whether those typed in a text are tokens, not text
    sampling: Sampling | None = None


def asked(
    prompt: str | Messages,
    images: Any = (),
    system: str | None = None,
    max_new_tokens: int = 128,
    dense: bool = False,
    neuron_share: float | None = None,
    token_share: float | None = None,
    seed: int | None = None,
    guard: int | bool | None = None,
    control_tokens: bool = False,
    sampling: Sampling | None = None,
) -> Asked:
    """The arguments of `LoadedBundle.generate`, checked. Raises InputError."""
    how = Asked([], budget=budget(dense, neuron_share, token_share, seed), limits=limits(max_new_tokens, guard))
    how = replace(how, control_tokens=_flag(control_tokens, "control_tokens"), sampling=_sampling(sampling))
    if how.limits.guard and dense:
        raise InputError("a dense answer needs no guard", where="guard", fix="leave it out")
    if isinstance(prompt, str):
        return replace(how, prompts=[question(prompt)], system=_system(system), images=shown(images))
    said = _said(prompt)
    if system is not None and said.system is not None:
        raise InputError("stands among the messages, too", where="system", fix="leave one of them out")
    if said.images and len(listed(images)):
        raise InputError("some stand among the messages, too", where="images", fix="leave them out")
    system = said.system if system is None else _system(system)
    return replace(how, prompts=said.prompts, answers=said.answers, system=system, images=said.images or shown(images))


def before_questions(
    images: Any,
    system: str | None,
    dense: bool,
    neuron_share: float | None,
    token_share: float | None,
    seed: int | None,
    control_tokens: bool,
    sampling: Sampling | None,
) -> Asked:
    """What a conversation begins with, checked. Raises InputError."""
    how = Asked([], [], _system(system), shown(images), budget(dense, neuron_share, token_share, seed))
    return replace(how, control_tokens=_flag(control_tokens, "control_tokens"), sampling=_sampling(sampling))


def several(requests: Iterable[str | Messages | Mapping[str, Any]]) -> list[Asked]:
    """Requests of a batch: texts, messages, or mappings with the arguments of `generate`. Raises InputError."""
    if isinstance(requests, str | Mapping) or not isinstance(requests, Iterable):
        raise InputError(f"is a {type(requests).__name__}", where="batch", fix="give a list of requests")
    out, known = [], list(inspect.signature(asked).parameters)
    for i, request in enumerate(requests):
        given = request if isinstance(request, Mapping) else {"prompt": request}
        for name in given:
            if name not in known:
                raise InputError(f"unknown key {name!r}", where=f"request {i}", fix=nearest(str(name), known))
        if "prompt" not in given:
            raise InputError("has no prompt", where=f"request {i}", fix='give {"prompt": ..., "images": ...}')
        try:
            one = asked(**given)
        except InputError as e:
            raise of_request(i, e) from e
        if one.limits.guard:
            fix = "leave it out, or ask this one by itself with generate"
            raise InputError("checks one request at a time", where=f"request {i}: guard", fix=fix)
        out.append(one)
    return out


def of_request(i: int, error: InputError) -> InputError:
    """The same error, saying which request of a batch it is about."""
    where = f"request {i}" if error.where is None else f"request {i}: {error.where}"
    return InputError(error.what, where=where, fix=error.fix)


def question(prompt: object) -> str:
    """The text of a question. Raises InputError."""
    if not isinstance(prompt, str):
        raise InputError(f"is a {type(prompt).__name__}", where="prompt", fix="give a text")
    if not prompt.strip():
        raise InputError("is empty", where="prompt", fix='ask something, such as "Describe the picture."')
    return _text(prompt, "prompt")


def budget(dense: bool, neuron_share: float | None, token_share: float | None, seed: int | None) -> Budget:
    """What a request may use. Raises InputError."""
    dense = _flag(dense, "dense")
    if dense and not (neuron_share is None and token_share is None):
        fix = "leave neuron_share and token_share out"
        raise InputError("means all neurons and all tokens", where="dense", fix=fix)
    seed = None if seed is None else whole_number(seed, "seed", 0, _LARGEST_SEED)
    return Budget(dense, _share(neuron_share, "neuron_share"), _share(token_share, "token_share"), seed)


def limits(max_new_tokens: int, guard: int | bool | None) -> Limits:
    """How far an answer goes; guard True: drafts of the usual length. Raises InputError."""
    every = None if guard is None or guard is False else EVERY if guard is True else whole_number(guard, "guard", 2)
    return Limits(whole_number(max_new_tokens, "max_new_tokens", 1), every)


def shown(images: Any) -> list[Opened]:
    """Pictures as RGB, in order. Raises InputError."""
    return [pictures.given(picture, f"images[{i}]") for i, picture in enumerate(listed(images))]


def listed(images: Any) -> list[Any]:
    """The pictures that were given: none, one, or several. Raises InputError."""
    if images is None:
        return []
    if isinstance(
        images, str | os.PathLike | bytes | bytearray | memoryview | io.IOBase | Image.Image | np.ndarray | Opened
    ):
        return [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise InputError(f"is a {type(images).__name__}", where="images", fix="give a list of pictures")
    return list(images)


def _system(text: object) -> str | None:
    if text is not None and not isinstance(text, str):
        raise InputError(f"is a {type(text).__name__}", where="system", fix="give a text")
    return text if text is None else _text(text, "system")


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError("is not valid text (UTF-8)", where=where, fix="leave out its lone surrogates") from e
    return text


def _said(messages: Messages) -> Asked:
    """Messages as chat libraries write them. Raises InputError."""
    if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
        what = f"is a {type(messages).__name__}"
        raise InputError(what, where="prompt", fix="give a text, or a list of messages")
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    first = 1 if roles[:1] == ["system"] else 0
    turns = roles[first:]
    if len(turns) % 2 == 0 or turns != ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]:
        found = ", ".join(str(role) for role in roles) or "none"
        raise InputError(f"the roles are {found}", where="messages", fix=_TURNS)
    seen: list[Opened] = []
    texts = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        text, images = _content(message.get("content"), where)
        if images and i != first:
            fix = "put all pictures into the first user message, before its text"
            raise InputError("has a picture; they stand before the first question", where=where, fix=fix)
        if roles[i] == "user" and not text.strip():
            raise InputError("has no text", where=where, fix=_BLOCK)
        seen += images
        texts.append(_text(text, where))
    system, rest = (texts[0], texts[1:]) if first else (None, texts)
    return Asked(rest[::2], rest[1::2], system, seen)


def _content(content: object, where: str) -> tuple[str, list[Opened]]:
    """Text and pictures of one message, whose content is a text or a list of blocks."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise InputError(
            f"its content is a {type(content).__name__}", where=where, fix=f"give a text, or blocks: {_BLOCK}"
        )
    text, seen = "", []
    for n, block in enumerate(content):
        place, kind = f"{where}: block {n}", block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and isinstance(block.get("text"), str):
            text += block["text"]
        elif kind == "image" and "image" in block:
            if text:
                fix = "put pictures before the text of their message"
                raise InputError("is a picture after text, which no prompt of ours has", where=place, fix=fix)
            seen.append(pictures.given(block["image"], place))
        else:
            raise InputError(f"is not a block that can be read (type {kind!r})", where=place, fix=_BLOCK)
    return text, seen


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"is {value!r}", where=where, fix="give True or False")
    return bool(value)


def _sampling(value: object) -> Sampling | None:
    if not isinstance(value, Sampling | None):
        fix = "give cm_export.Sampling(temperature=0.7), or None"
        raise InputError(f"is a {type(value).__name__}", where="sampling", fix=fix)
    return value


def _share(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{value!r} is not a number", where=where, fix="give a share such as 0.4")
    share = float(value)
    if not (math.isfinite(share) and 0 < share <= 1):
        hint = f"for {share:g} % write {share / 100:g}" if 1 < share <= 100 else "give a share such as 0.4"
        raise InputError(f"{share:g} is not above 0 and up to 1", where=where, fix=hint)
    return share


def whole_number(value: object, where: str, least: int, most: int | None = None) -> int:
    """A whole number within bounds. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{value!r} is not a whole number", where=where, fix=f"give {least} or more")
    number = int(value)
    if number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"is {number}", where=where, fix=f"give {bounds}")
    return number
