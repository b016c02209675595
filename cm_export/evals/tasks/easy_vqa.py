"""easy-VQA: questions about one coloured shape on a plain ground; the official test split of the `easy-vqa` package.

    word     : "what color is the shape?"             -> "teal"                                (judges vision and prefill)
    sentence : "describe : what color is the shape?"  -> "the color of the circle is teal ."   (judges decode)

Source of pictures and questions: PyPI `easy-vqa` 1.0 (MIT). Sentences are ours, from the official answer and the picture's
label, which follows from the picture's own official questions.
"""

import random

from ...base.errors import InputError
from ...host.images import open_image
from ..task import Question

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = {"word": 4, "sentence": 20}
open_picture = open_image


def questions(kind: str) -> list[Question]:
    """All official test questions of one kind: "word" (9,673) or "sentence" (those on pictures whose label is certain)."""
    try:
        from easy_vqa import get_test_image_paths, get_test_questions
    except ImportError as e:
        raise InputError(
            "the package easy-vqa is not installed", where="--task easy-vqa", fix="pip install easy-vqa"
        ) from e
    paths = get_test_image_paths()
    asked = list(zip(*get_test_questions(), strict=True))
    if kind == "word":
        return [Question(kind, (paths[i],), q, (a,)) for q, a, i in asked]
    by_image: dict[int, list[tuple[str, str]]] = {}
    for q, a, i in asked:
        by_image.setdefault(i, []).append((q, a))
    labels = {i: seen for i, pairs in by_image.items() if (seen := label(pairs))}
    return [
        Question(kind, (paths[i],), f"describe : {q}", (sentence(q, a, labels[i]),)) for q, a, i in asked if i in labels
    ]


def calibration_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, picture) of `count` questions of the *training* half, asked for sentences: nothing of it is in the test."""
    try:
        from easy_vqa import get_train_image_paths, get_train_questions
    except ImportError as e:
        raise InputError("the package easy-vqa is not installed", where="--data", fix="pip install easy-vqa") from e
    paths, asked = get_train_image_paths(), list(zip(*get_train_questions(), strict=True))
    chosen = random.Random(seed).sample(asked, min(count, len(asked)))
    return [(f"describe : {q}", paths[i]) for q, _, i in chosen]


def sentence(question: str, answer: str, seen: tuple[str, str]) -> str:
    """The one-word answer as a sentence about the picture's (shape, color)."""
    shape, color = seen
    if answer in ("yes", "no"):
        return f"{answer} , there is a {color} {shape} in the image ."
    if answer in SHAPES:
        return f"the shape in the image is a {color} {shape} ."
    return f"the color of the {shape} is {color} ."


def label(pairs: list[tuple[str, str]]) -> tuple[str, str] | None:
    """(shape, color) of a picture as its questions and answers imply it, or None if they leave it open."""
    shapes, colors = set(SHAPES), set(COLORS)
    for question, answer in pairs:
        words = question.replace("?", "").split()
        named = [w for w in words if w in SHAPES or w in COLORS]
        if answer in ("yes", "no"):
            is_so = (answer == "yes") != ("not" in words or "no" in words)
            pool = shapes if named[0] in SHAPES else colors
            pool.intersection_update(named[:1]) if is_so else pool.difference_update(named[:1])
            continue
        # A question that names the colour asks for the shape, and the other way round.
        for word in [answer, *named[:1]]:
            (shapes if word in SHAPES else colors).intersection_update([word])
    return (shapes.pop(), colors.pop()) if len(shapes) == len(colors) == 1 else None
