"""Tensors of a Triton request as the fields of wire.py, and an answer as tensors.

INPUTS and OUTPUTS are what vlm/config.pbtxt declares; an input that is left out asks for nothing. A picture is the bytes of
its file, or the same as base64, which HTTP clients send: a file always holds bytes that are no base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.by_name import nearest
from ..base.errors import InputError
from ..host.conversation import Answer
from . import plain, wire
from .triton_settings import Settings
from .wire import Wanted


@dataclass(frozen=True)
class Tensor:
    """One input or output of `vlm`. `several`: a list; else one value."""

    name: str
    type: str
    several: bool
    says: str

    @property
    def dims(self) -> int:
        return -1 if self.several else 1


INPUTS = (
    Tensor("text_input", "TYPE_STRING", False, "The question; either this or messages"),
    Tensor("messages", "TYPE_STRING", False, "JSON: a conversation in OpenAI's form, whose last message is answered"),
    Tensor(
        "images", "TYPE_STRING", True, "Pictures: the bytes of files (PNG, JPEG, WEBP, GIF, BMP), or base64 of them"
    ),
    Tensor("system", "TYPE_STRING", False, "System message, with text_input"),
    Tensor("stream", "TYPE_BOOL", False, "The answer piece by piece; else one response"),
    Tensor("max_tokens", "TYPE_INT32", False, "Longest answer"),
    Tensor("min_tokens", "TYPE_INT32", False, "Shortest answer"),
    Tensor("temperature", "TYPE_FP32", False, "0: the most likely token; above it tokens are drawn"),
    Tensor("top_k", "TYPE_INT32", False, "Draw from this many tokens"),
    Tensor("top_p", "TYPE_FP32", False, "Draw from the tokens that make up this share of probability"),
    Tensor("min_p", "TYPE_FP32", False, "Draw from tokens that are at least this likely, of the most likely one"),
    Tensor("repetition_penalty", "TYPE_FP32", False, "Above 1: what was said becomes less likely"),
    Tensor("seed", "TYPE_INT64", False, "The same seed draws the same answer"),
    Tensor("stop", "TYPE_STRING", True, "Texts that end the answer"),
    Tensor("token_share", "TYPE_FP32", False, "Share of image tokens that are kept, above 0 and up to 1"),
    Tensor("neuron_share", "TYPE_FP32", False, "Share of neurons that decode computes, above 0 and up to 1"),
    Tensor("dense", "TYPE_BOOL", False, "All tokens and all neurons"),
    Tensor("guard", "TYPE_INT32", False, "Check drafts of so many tokens with the dense model; 0: no checks"),
    Tensor("kept", "TYPE_BOOL", False, "Say in stats which patches of each picture were kept"),
    Tensor("deadline", "TYPE_FP32", False, "Seconds for the whole answer"),
    Tensor("client", "TYPE_STRING", False, "Who asks: the requests of one client do not hold up those of others"),
)

OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", False, "Text: whole characters; of a stream what is new"),
    Tensor("stop_reason", "TYPE_STRING", False, "stop token, stop string, max-new-tokens, context length or deadline"),
    Tensor("token_ids", "TYPE_INT32", True, "Ids of the whole answer"),
    Tensor("prompt_tokens", "TYPE_INT32", False, "Tokens that were read, image tokens included"),
    Tensor("new_tokens", "TYPE_INT32", False, "Tokens of the answer"),
    Tensor("image_tokens", "TYPE_INT32", False, "Image tokens of the prompt"),
    Tensor("image_tokens_kept", "TYPE_INT32", False, "Those that decode reads"),
    Tensor("neurons", "TYPE_INT32", False, "FFN neurons of a layer"),
    Tensor("neurons_kept", "TYPE_INT32", False, "Those that decode computes, on average"),
    Tensor("queue_seconds", "TYPE_FP32", False, "Wait for a place"),
    Tensor("first_token_seconds", "TYPE_FP32", False, "From the start of the prefill to the first token"),
    Tensor("total_seconds", "TYPE_FP32", False, "From handing in to the end"),
    Tensor("stats", "TYPE_STRING", False, "JSON: all figures, as `cm-export run --json` gives them, and notes"),
)
_FIGURES = {
    "prompt_tokens": "prompt_tokens", "new_tokens": "new_tokens", "image_tokens": "image_tokens",
    "image_tokens_kept": "image_tokens_kept", "neurons": "neurons", "neurons_kept": "neurons_kept",
    "queue_seconds": "queue_s", "first_token_seconds": "ttft_s", "total_seconds": "total_s",
}  # fmt: skip
# Parameters that clients and the server itself give to every request.
_OF_TRITON = {
    "binary_data_output", "headers", "id", "priority", "sequence_end", "sequence_id", "sequence_start", "timeout",
}  # fmt: skip
_SHOWN = 200  # characters of a client's name in an error
_OURS = ("text_input", "images", "system", "client")  # the others go to wire.py under their own names
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]*={0,2}\s*")
_DATA = re.compile(rb"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)
_CLIPS = ("video", "videos", "clip", "clips", "video_url")
_CLIP = "send the frames of a clip in messages, as a part video_url (docs/serve.md)"
_MESSAGES_BYTES = 64 * 2**20
_CLIENT = 200  # characters


@dataclass(frozen=True)
class Given:
    """The values of one request."""

    values: dict[str, Any]

    @property
    def client(self) -> str:
        """Who asks."""
        return _text(self.values.get("client", b""), "client")[:_CLIENT]


def tensors(request: Any, utils: Any) -> Given:
    """The values of its inputs: bytes, numbers and lists of bytes. Raises InputError."""
    names, values = [known.name for known in INPUTS], dict[str, Any]()
    for name in json.loads(request.parameters() or "{}"):  # over HTTP, fields that are no inputs arrive as these
        if not (name in _OF_TRITON or name.startswith("triton_")):
            fix = _CLIP if name.lower() in _CLIPS else nearest(name[:_SHOWN], names)
            raise InputError(f"unknown input {name[:_SHOWN]!r}", where="request", fix=fix)
    for known in INPUTS:
        tensor = utils.get_input_tensor_by_name(request, known.name)
        if tensor is None:
            continue
        held = tensor.as_numpy().ravel()
        if not known.several and held.size != 1:
            raise InputError(f"has {held.size} values", where=known.name, fix="give one")
        found = [_plain(value) for value in held]
        values[known.name] = found if known.several else found[0]
    return Given(values)


def _plain(value: Any) -> Any:
    """A number or bytes; of a float the decimal number that was meant: 0.7, not 0.699999988."""
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def read(given: Given, settings: Settings) -> Wanted:
    """Check a request. Raises InputError that names the input."""
    fields = {name: value for name, value in given.values.items() if name not in _OURS}
    fields["messages"] = _messages(given)
    fields["stop"] = [_text(text, "stop") for text in fields.get("stop", [])] or None
    if fields.get("guard") == 0:
        fields["guard"] = None
    for share in ("neuron_share", "token_share"):
        own = getattr(settings, share)
        if own is not None and not fields.get("dense"):
            fields.setdefault(share, own)
    pictures, most = given.values.get("images", []), settings.picture_bytes
    if len(pictures) > settings.pictures:
        what = f"{len(pictures)} pictures, at most {settings.pictures} are taken"
        raise InputError(what, where="images", fix="leave some out")
    try:
        return wire.read(fields, settings.bounds, [_file(p, f"images[{i}]", most) for i, p in enumerate(pictures)])
    except InputError as e:
        where = str(e.where or "").replace("pictures[", "images[")
        if "text_input" in given.values:  # it became the last message
            where = re.sub(r"^messages(\[\d\](\.content(\[0\])?)?)?$", "text_input", where)
        raise InputError(e.what, where=where or None, fix=e.fix) from e


def _messages(given: Given) -> Any:
    """The conversation: as it was sent, or of one question."""
    text, said, system = (given.values.get(name) for name in ("text_input", "messages", "system"))
    if (text is None) == (said is None):
        what = "is missing" if text is None else "stands beside messages"
        raise InputError(what, where="text_input", fix="give the question as text_input, or a conversation as messages")
    if said is not None:
        if system is not None:
            raise InputError("is for text_input", where="system", fix='begin messages with {"role": "system", ...}')
        if len(said) > _MESSAGES_BYTES:
            raise InputError(f"has more than {_MESSAGES_BYTES >> 20} MiB", where="messages", fix="send less")
        try:
            return plain.parse(said)
        except InputError as e:
            raise InputError(e.what, where="messages", fix="send a JSON list of messages") from e
    first = [] if system is None else [{"role": "system", "content": _text(system, "system")}]
    return [*first, {"role": "user", "content": _text(text, "text_input")}]


def _text(value: Any, where: str) -> str:
    try:
        return bytes(value).decode()
    except (UnicodeDecodeError, TypeError, ValueError) as e:
        raise InputError("is no text in UTF-8", where=where, fix="encode it as UTF-8") from e


def _file(data: bytes, where: str, most: int) -> bytes:
    """The bytes of a picture file, which may have come as base64. Raises InputError."""
    if len(data) > 2 * most:  # before anything is made of it; wire.py looks at what comes out
        raise InputError(f"has more than {most / 2**20:g} MiB", where=where, fix="scale the picture down")
    begin = _DATA.match(data)
    text = data[begin.end() :] if begin else data
    if not text or not _BASE64.fullmatch(text):
        if begin:
            raise InputError("its data is no base64", where=where, fix="encode the picture's file as base64")
        if re.match(rb"[A-Za-z][A-Za-z0-9+.-]*:|/|\.", data):
            fix = "send the bytes of the picture's file, or base64 of them"
            fix = _CLIP if data[:11].lower() == b"data:video/" else fix
            raise InputError("URLs and paths are not opened", where=where, fix=fix)
        return data
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as e:
        raise InputError("is no picture, and no whole base64", where=where, fix="send the bytes of its file") from e


def piece(text: str, utils: Any) -> list[Any]:
    """The tensors of a response within a stream."""
    return [_strings("text_output", [text], utils)]


def final(answer: Answer, wanted: Wanted, utils: Any) -> list[Any]:
    """The tensors of the last response: what was counted, and the text where nothing of it was sent before."""
    stats = {**answer.stats, "notes": answer.notes}
    if wanted.kept:
        stats["kept"] = [cells.astype(int).tolist() for cells in answer.kept]
    out = piece("" if wanted.stream else answer.text, utils)
    out += [_strings("stop_reason", [stats["stopped"]], utils)]
    out += [utils.Tensor("token_ids", np.array(answer.token_ids, np.int32))]
    types = {tensor.name: np.int32 if tensor.type == "TYPE_INT32" else np.float32 for tensor in OUTPUTS}
    out += [utils.Tensor(name, np.array([stats[of]], types[name])) for name, of in _FIGURES.items()]
    return [*out, _strings("stats", [json.dumps(stats)], utils)]


def _strings(name: str, texts: list[str], utils: Any) -> Any:
    return utils.Tensor(name, np.array([text.encode() for text in texts], np.object_))
