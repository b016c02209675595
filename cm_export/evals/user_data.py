"""A user's own questions: a JSON Lines file beside its pictures.

    {"image": "invoice-1.png", "question": "What is the total?", "answer": "12.40"}
    {"images": ["a.jpg", "b.jpg"], "question": "Which is older?", "answers": ["the first", "first"], "kind": "compare"}
    {"question": "What is the capital of Japan?", "answer": "Tokyo"}

An answer counts when it equals one of the right ones after both are lower-cased, runs of white space are one space and
punctuation at the end is gone.
"""

import json
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..host.images import open_image
from .task import Question, Task, check_distinct

MAX_NEW_TOKENS = 64
_KEYS = {"image", "images", "question", "answer", "answers", "kind"}


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the end."""
    return " ".join(answer.lower().split()).rstrip(" .!?,;:")


def load(path: Path, max_new_tokens: int = MAX_NEW_TOKENS) -> Task:
    """Every line checked, every picture opened once. Raises InputError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise InputError(f"cannot be read ({why})", where=path, fix="give a JSON Lines file") from e
    questions: list[Question] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            questions.append(_question(line, path, where))
            for picture in set(questions[-1].pictures) - seen:
                try:
                    open_image(picture)  # a picture that cannot be read is told before the first answer
                except InputError as e:
                    raise InputError(f"{e.where}: {e.what}", where=where, fix=e.fix) from e
                seen.add(picture)
    if not questions:
        raise InputError(
            "no questions", where=path, fix='write lines such as {"image": ..., "question": ..., "answer": ...}'
        )

    check_distinct(questions, str(path))

    def same(said: str, right: str) -> bool:
        return normalise(said) == normalise(right)

    limits = {q.kind: max_new_tokens for q in questions}
    rule = "exact match without case, runs of white space and punctuation at the end"
    return Task(path.name, questions, limits, open_image, same, rule)


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
    answers = _one_or_many(values, "answer", where)
    kind = values.get("kind", "all")
    for key, value in (("question", values.get("question")), ("kind", kind)):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{key} must be text", where=where, fix=f'write "{key}": "..."')
    for name in pictures:
        if "://" in name:
            raise InputError(
                f"{name} is a URL; pictures are not fetched", where=where, fix="download it and give its path"
            )
        if not (path.parent / name).is_file():
            raise InputError(f"no picture {name}", where=where, fix=f"give a path relative to {path.parent}")
    return Question(kind, tuple(str(path.parent / p) for p in pictures), values["question"], answers)


def _one_or_many(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """`answer` (text) or `answers` (list of text), not both."""
    many = f"{key}s"
    if (key in values) == (many in values):
        raise InputError(f"give {key} or {many}", where=where, fix="exactly one of the two")
    found = values.get(many, [values.get(key)])
    if not isinstance(found, list) or not found or not all(isinstance(v, str) and v.strip() for v in found):
        raise InputError(f"{key if key in values else many} must be text", where=where, fix="text that is not empty")
    return tuple(found)
