"""A user's own questions: a JSON Lines file beside its pictures.

    {"image": "invoice-1.png", "question": "What is the total?", "answer": "12.40"}
    {"images": ["a.jpg", "b.jpg"], "question": "Which is older?", "answers": ["the first", "first"], "kind": "compare"}
    {"video": "door.mp4", "fps": 1, "question": "Who leaves first?", "answer": "the cat"}
    {"question": "What is the capital of Japan?", "answer": "Tokyo"}

An answer counts when it equals one of the right ones after both are lower-cased, runs of white space are one space and
punctuation at the end is gone.
"""

import json
import stat
from pathlib import Path
from typing import Any

from ..base import json_lines
from ..base.errors import InputError
from ..base.settings import is_number
from ..host.clips import opened_clip
from ..host.images import open_image, opened
from ..host.picture_notes import Note
from .task import Footage, Question, Task, check_distinct

MAX_NEW_TOKENS = 64
_KEYS = {"image", "images", "video", "videos", "fps", "frames", "question", "answer", "answers", "kind"}


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the end."""
    return " ".join(answer.lower().split()).rstrip(" .!?,;:")


def load(path: Path, max_new_tokens: int = MAX_NEW_TOKENS, control_tokens: bool = False) -> Task:
    """Every line checked, every picture and clip opened once. Raises InputError that names the line."""
    questions: list[Question] = []
    notes: dict[str, tuple[Note, ...]] = {}
    for number, line in json_lines.numbered(path):
        where = f"{path}, line {number}"
        questions.append(_question(line, path, where))
        try:  # what cannot be read is told before the first answer
            for picture in set(questions[-1].pictures) - set(notes):
                notes[picture] = opened(picture).notes
            for clip in {c.path for c in questions[-1].clips} - set(notes):
                notes[clip] = opened_clip(clip, lambda *_: [0]).notes
        except InputError as e:
            raise InputError(f"{e.where}: {e.what}", where=where, fix=e.fix) from e
    if not questions:
        raise InputError(
            "no questions", where=path, fix='write lines such as {"image": ..., "question": ..., "answer": ...}'
        )

    check_distinct(questions, str(path))

    def same(said: str, right: str) -> bool:
        return normalise(said) == normalise(right)

    limits = {q.kind: max_new_tokens for q in questions}
    rule = "exact match without case, runs of white space and punctuation at the end"
    return Task(path.name, questions, limits, open_image, same, rule, control_tokens, notes)


def _question(line: str, path: Path, where: str) -> Question:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError("not JSON", where=where, fix="write one JSON object per line") from e
    if not isinstance(values, dict):
        raise InputError("not a JSON object", where=where, fix='write {"image": ..., "question": ..., "answer": ...}')
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}", where=where, fix=f"known: {', '.join(sorted(_KEYS))}")
    pictures = _one_or_many(values, "image", where) if {"image", "images"} & set(values) else ()
    clips = _one_or_many(values, "video", where) if {"video", "videos"} & set(values) else ()
    rate, count = _frames(values, bool(clips), where)
    answers = _one_or_many(values, "answer", where)
    kind = values.get("kind", "all")
    for key, value in (("question", values.get("question")), ("kind", kind)):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{key} must be text", where=where, fix=f'write "{key}": "..."')
    shown = tuple(_there(name, "picture", path, where) for name in pictures)
    footage = tuple(Footage(_there(name, "clip", path, where), rate, count) for name in clips)
    return Question(kind, shown, values["question"], answers, footage)


def _there(name: str, what: str, path: Path, where: str) -> str:
    """The path of a picture or clip beside the file of questions. Raises InputError for what can be no such file."""
    if "://" in name:
        raise InputError(f"{name} is a URL; {what}s are not fetched", where=where, fix="download it and give its path")
    try:
        mode = (path.parent / name).stat().st_mode
    except (OSError, ValueError) as e:  # ValueError: a zero byte
        fix = f"give a path relative to {path.parent}"
        raise InputError(f"no {what} {name[:200]}", where=where, fix=fix) from e
    if stat.S_ISFIFO(mode):
        raise InputError(f"{name} is a pipe, which can be read only once", where=where, fix="save it to a file")
    return str(path.parent / name)


def _frames(values: dict[str, Any], has_clips: bool, where: str) -> tuple[float | None, int | None]:
    """`fps` or `frames` of the clips. Raises InputError."""
    rate, count = values.get("fps"), values.get("frames")
    for key, value in (("fps", rate), ("frames", count)):
        if key in values and not has_clips:
            raise InputError(
                f"{key} without a clip", where=where, fix=f'write "video": "..." beside it, or leave {key} out'
            )
        if value is not None and (not is_number(value) or value <= 0 or (key == "frames" and value != int(value))):
            fix = 'write "fps": 1 for a frame a second, or "frames": 16'
            raise InputError(f"{key} = {value!r} is not a number above 0", where=where, fix=fix)
    if rate is not None and count is not None:
        raise InputError("fps and frames were given", where=where, fix="give one of them")
    return rate, None if count is None else int(count)


def _one_or_many(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """`answer` (text) or `answers` (list of texts), not both; so of pictures and clips."""
    many = f"{key}s"
    if (key in values) == (many in values):
        raise InputError(f"give {key} or {many}", where=where, fix="exactly one of the two")
    found = values.get(many, [values.get(key)])
    if not isinstance(found, list) or not found or not all(isinstance(v, str) and v.strip() for v in found):
        given = values.get(key, values.get(many))
        fix = f'write "{key}": "..." or "{many}": ["...", "..."]'
        if key in values and isinstance(given, list):
            raise InputError(f"{key} must be text, not a list", where=where, fix=f'for several write "{many}": [...]')
        if many in values and isinstance(given, str):
            raise InputError(f"{many} must be a list of texts", where=where, fix=f'for one write "{key}": "..."')
        raise InputError(f"{key if key in values else many} must be text that is not empty", where=where, fix=fix)
    return tuple(found)
