"""What a server asks itself before it takes requests, so that sessions exist, and memory runs out then or never.

blank picture of 2048, 1024, ... pixels -> the largest whose patches and prompt fit -> a question about it -> a dense one
"""

from __future__ import annotations

from PIL import Image

from ..base.errors import InputError
from ..families import Picture
from ..host.loaded import LoadedBundle
from ..host.runner import Runner
from ..recipe.engine import EngineSettings

QUESTION = "Describe the picture."
_BITS = 12  # of the longest side that is tried, in pixels
_TOKENS = 2  # of each answer: the first comes from prefill, the second from a step


def warm(model: LoadedBundle, side: int) -> None:
    """Answer a question about a square picture of that side (0: about none), and one of the dense model."""
    pictures = [Image.new("RGB", (side, side))] if side else []
    model.generate(QUESTION, pictures, max_new_tokens=_TOKENS)
    model.generate(QUESTION, max_new_tokens=_TOKENS, dense=True)


def largest(runner: Runner, engine: EngineSettings) -> tuple[int, Picture]:
    """Side in pixels of the largest square that the engines take, or that a prompt has room for, and the picture.

    Raises InputError where no square fits.
    """
    found: tuple[int, Picture] | None = None
    low = 0
    for bit in reversed(range(_BITS)):
        side = low | 1 << bit
        picture = _blank(runner, side)
        if side < runner.tower.min_side or (picture is not None and _fits(runner, picture, engine)):
            low = side
            found = found if picture is None else (side, picture)
    if found is None:
        what = f"no square picture fits {engine.max_patches} patches and a prompt of {engine.max_prompt} tokens"
        raise InputError(what, where=runner.bundle.path, fix="give --no-warm-up, or build with a larger --max-prompt")
    return found


def _blank(runner: Runner, side: int) -> Picture | None:
    try:
        return runner.tower.picture(Image.new("RGB", (side, side)), runner.picture_rule)
    except InputError:  # of no size that this tower cuts into patches
        return None


def _fits(runner: Runner, picture: Picture, engine: EngineSettings) -> bool:
    prompt = len(runner.chat.encode(QUESTION, None, (picture.layout,)))
    room = runner.bundle.shape.max_positions
    most = engine.max_prompt if room is None else min(engine.max_prompt, room - 1)
    return len(picture.pixels) <= engine.max_patches and prompt <= most
