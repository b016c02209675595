"""Requests with which Triton warms vision and prefill up: those of the largest picture that the bundle reads.

    blank picture of 64, 128, ... pixels -> the last whose patches and prompt fit -> vision/warmup/largest.cu_seqlens, ...

Floats are zeros that Triton makes itself; what is counted (positions, sizes, masks) must be true, so it lies in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...base.errors import InputError
from ...families import Arrays, Picture, Pictures
from ...host.request import kept_slots, prefill_feeds, sparse_feeds
from ...host.runner import Runner
from ...recipe.engine import EngineSettings
from .config import TYPES, Sample

QUESTION = "Describe the picture."
_NAME = "largest"
_BITS = 12  # of the longest side that is tried, in pixels


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


def feeds(runner: Runner, picture: Picture | None) -> dict[str, Arrays]:
    """Inputs of vision and of both prefills for a question about `picture`, its embeddings zero; None: without one."""
    seen, out = Pictures(), dict[str, Arrays]()
    if picture is not None:
        empty = runner.tower.no_pictures().outputs
        rows = {n: np.zeros((picture.tokens, *v.shape[1:]), v.dtype) for n, v in empty.items()}
        seen, out = Pictures(rows, (picture.layout,)), {"vision": runner.tower.feeds([picture])}
    request = runner.request(runner.chat.encode(QUESTION, None, seen.layouts), seen)
    values = prefill_feeds(request) | sparse_feeds(request, runner.recipe)
    values |= kept_slots(request, values)
    return {**out, "prefill": values, "prefill_dense": values}


def write(folder: Path, described: Mapping[str, Any], values: Arrays) -> Sample:
    """The sample of one model, its counted inputs in files below `folder`."""
    inputs: dict[str, tuple[str, tuple[int, ...], str | None]] = {}
    for port in described["inputs"]:
        value, file = values[port["name"]], None
        if value.dtype.kind != "f":
            file = f"{_NAME}.{port['name']}"
            (folder / "warmup").mkdir(exist_ok=True)
            (folder / "warmup" / file).write_bytes(np.ascontiguousarray(value).tobytes())
        inputs[port["name"]] = TYPES[port["dtype"]], value.shape, file
    return Sample("largest picture" if "pixel" in "".join(inputs) else "largest prompt", inputs)
