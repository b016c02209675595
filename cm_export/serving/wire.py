"""One request of an unknown client, as plain JSON-like values, becomes something to answer, or one line on what is wrong.

{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"},
                                           {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}],
 "max_tokens": 64, "temperature": 0.7, "token_share": 0.25, "stream": true}                       ->   Wanted(asked, stream)

The form is that of OpenAI's chat completions, with the fields of `OURS` besides. A field that is neither is refused by name, so
is one of OpenAI's that would change the answer and is not supported; those of `IGNORED` change no answer. Pictures come as bytes,
never as the place where they lie: nothing is opened or fetched because a request names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.by_name import nearest
from ..base.errors import CmExportError, InputError
from ..host import asking
from ..host.asking import Asked
from ..host.sampling import Sampling
from .messages import Bounds, decoded_within, messages
from .pictures import Pixels
from .plain import SHOWN, flag, kind, short, text

OURS = (
    "token_share", "neuron_share", "dense", "guard", "deadline", "kept", "top_k", "min_p", "repetition_penalty", "min_tokens",
)  # fmt: skip
OPENAI = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop",
)  # fmt: skip
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
# OpenAI's fields that are not supported: each is taken with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip
_KNOWN = (*OURS, *OPENAI, *IGNORED, *NEUTRAL)
# What the parts below call a field, and what a client calls it.
_CALLED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "prompt": "messages"}
_STOPS, _STOP = 16, 256  # strings, and characters of one
_LONGEST_DEADLINE = 3600.0


@dataclass(frozen=True)
class Wanted:
    """A request that was read."""

    asked: Asked
    model: str | None = None  # which one it is for; None: whichever is served
    stream: bool = False  # the answer piece by piece
    usage: bool = False  # counts at the end of a stream
    kept: bool = False  # which patches stayed, with the answer
    deadline: float | None = None  # seconds


def read(request: object, bounds: Bounds | None = None, pictures: Sequence[bytes] = ()) -> Wanted:
    """Check a request. Raises InputError that names the field, in the words of the client.

    `pictures`: encoded ones that came beside it, instead of pictures in its messages; they stand before the first question.
    """
    try:
        return _wanted(request, bounds or Bounds(), pictures)
    except InputError as e:
        raise in_their_words(e) from e


def _wanted(request: object, bounds: Bounds, pictures: Sequence[bytes]) -> Wanted:
    if not isinstance(request, Mapping):
        raise InputError(f"is a {kind(request)}", where="body", fix="send one JSON object")
    given = {name: value for name, value in request.items() if value is not None}  # null: as if it was not there
    for name, value in given.items():
        if name not in _KNOWN:
            raise InputError(
                f"unknown field {short(name)}", where="body", fix=nearest(str(name)[:SHOWN], [*OPENAI, *OURS])
            )
        if name in NEUTRAL and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise InputError(f"{short(value)} is not supported", where=name, fix="leave it out")
    room = Pixels(bounds.pixels)
    said = messages(given.get("messages"), bounds, room)
    beside = [decoded_within(data, f"pictures[{i}]", bounds, room) for i, data in enumerate(pictures)]
    in_messages = sum(part["type"] == "image" for message in said for part in message["content"])
    if in_messages + len(beside) > bounds.pictures:
        what = f"{in_messages + len(beside)} pictures, at most {bounds.pictures} are taken"
        raise InputError(what, where="messages", fix="leave some out")
    most = _most_tokens(given, bounds)
    asked = asking.asked(
        said,
        beside,
        max_new_tokens=most,
        dense=given.get("dense", False),
        neuron_share=given.get("neuron_share"),
        token_share=given.get("token_share"),
        seed=given.get("seed"),
        guard=given.get("guard"),
        sampling=_sampling(given, most),
    )
    streams = flag(given, "stream")
    return Wanted(asked, _model(given), streams, _usage(given, streams), flag(given, "kept"), _deadline(given))


def _most_tokens(given: Mapping[str, Any], bounds: Bounds) -> int:
    named = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len({given[name] for name in named if isinstance(given[name], int)}) > 1:
        raise InputError("differs from max_completion_tokens", where="max_tokens", fix="leave one of them out")
    return asking.whole_number(given[named[0]], named[0], 1, bounds.tokens) if named else bounds.tokens


def _sampling(given: Mapping[str, Any], most: int) -> Sampling:
    """As of `cm-export run`: greedy where nothing asks for drawing."""
    stop = given.get("stop")
    if stop is not None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or len(stop) > _STOPS:
            raise InputError(
                f"is no text and no list of at most {_STOPS}", where="stop", fix='give "\\n" or ["\\n", "."]'
            )
        stop = tuple(text(one, "stop", _STOP) for one in stop)
    draws = {name: given.get(name) for name in ("top_k", "top_p", "min_p")}
    temperature = given.get("temperature")
    if temperature == 0 and not isinstance(temperature, bool):
        draws = {}  # the most likely token is among the most likely ones: clients send top_p with every request
    return Sampling(
        temperature=temperature,
        repetition_penalty=given.get("repetition_penalty"),
        seed=given.get("seed"),
        stop=stop or None,
        min_new_tokens=given.get("min_tokens"),
        max_new_tokens=most,
        **draws,
    )


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _model(given: Mapping[str, Any]) -> str | None:
    return None if "model" not in given else text(given["model"], "model", SHOWN)


def _usage(given: Mapping[str, Any], streams: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise InputError("is not known", where="stream_options", fix='give {"include_usage": true}')
    if options and not streams:
        raise InputError("is for streams only", where="stream_options", fix="leave it out, or add stream: true")
    if flag(options, "include_obfuscation"):
        raise InputError("include_obfuscation is not supported", where="stream_options", fix="leave it out")
    return flag(options, "include_usage")


def _deadline(given: Mapping[str, Any]) -> float | None:
    value = given.get("deadline")
    if value is None:
        return None
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not (math.isfinite(value) and 0 < value <= _LONGEST_DEADLINE):
        raise InputError(f"is {short(value)}", where="deadline", fix=f"give seconds, up to {_LONGEST_DEADLINE:g}")
    return float(value)


def in_their_words(error: CmExportError) -> InputError:
    """The same error: its place as the client calls it, and no longer than it needs to be."""
    where = str(error.where or "body").removeprefix("sampling: ").removeprefix("sampling")
    name = re.match(r"\w*", where)[0]  # type: ignore[index]  # it always matches
    where = _CALLED.get(name, name) + where[len(name) :]
    what = error.what if len(error.what) <= 2 * SHOWN else f"{error.what[: 2 * SHOWN]}..."
    fix = error.fix if error.fix is None else error.fix.replace("max_new_tokens", "max_tokens")
    return InputError(what, where=where or "body", fix=fix)
