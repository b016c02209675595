"""What a contestant's process does: read a question a line, answer it, say how long each part took.

    <- {"seed": 7, "pixels": 448, "prompt": "...", "tokens": 64}
    -> {"picture_ms": 371.2, "first_ms": 640.8, "answer_ms": 1180.4, "prompt_tokens": 290, "tokens": 64, ...}

The clock starts with the picture in memory as pixels and the question as text, and ends with the answer as text; what a
contestant does in between (resizing, chat template, tokenizer) counts. This file and those that import it run in a peer's
own environment: they know nothing of this project.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Ask = Callable[[np.ndarray, str, int], dict[str, Any]]


def picture(seed: int, pixels: int) -> np.ndarray:
    """uint8 [pixels,pixels,3]: a coarse pattern with noise, another one for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3)).repeat(-(-pixels // 8), 0).repeat(-(-pixels // 8), 1)[:pixels, :pixels]
    return np.clip(coarse + rng.integers(-20, 21, coarse.shape), 0, 255).astype(np.uint8)


def serve(ask: Ask, about: dict[str, Any]) -> None:
    """Say what this is (versions, notes), then answer until standard input ends."""
    _say(about)
    for line in sys.stdin:
        question = json.loads(line)
        pixels = picture(question["seed"], question["pixels"])
        _say(ask(pixels, question["prompt"], question["tokens"]))


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write("@" + json.dumps(what) + "\n")  # libraries may print lines of their own
    sys.stdout.flush()
