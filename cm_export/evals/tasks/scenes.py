"""Scenes: generated pictures of one to four shapes, seven kinds of question, answers of up to 40 words; the test split.

    describe, colors      long answers: what decode says            count_all, count_some    how many
    where, what_at        places on a 3x3 board                     relation                 left of, above ...

Pictures and answers follow from a seed (`_scene.py`), and no picture of the test split was trained on. The model
`scenes` was trained for this task; `demo` knows the words but not the task. Bring your own questions (`--data`) for others.
"""

import random

from PIL import Image

from .. import scene as _scene
from ..task import Question

KINDS = {kind: 48 if kind == "describe" else 20 for kind in _scene.KINDS}
PICTURES = 500


def questions(kind: str) -> list[Question]:
    """One question of this kind about each of the 500 test pictures that allow it."""
    asked = ((n, _scene.ask(_scene.scene("test", n), kind)) for n in range(PICTURES))
    return [Question(kind, (f"test-{n}",), pair[0], (pair[1],)) for n, pair in asked if pair]


def calibration_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, picture) of `count` questions about pictures of the split `train`, every kind in turn."""
    rng = random.Random(seed)
    out: list[tuple[str, str]] = []
    while len(out) < count:
        number, kind = rng.randrange(10**6), _scene.KINDS[len(out) % len(_scene.KINDS)]
        if pair := _scene.ask(_scene.scene("train", number), kind):
            out.append((pair[0], f"train-{number}"))
    return out


def open_picture(name: str) -> Image.Image:
    """`split-number`, such as test-17."""
    split, number = name.split("-")
    return _scene.draw(_scene.scene(split, int(number)))
