"""Requests with which Triton warms vision and prefill up: those of the largest picture that the bundle reads.

    serving/warm_up.py: the largest picture -> inputs of its graphs -> vision/warmup/largest.cu_seqlens, ...

Floats are zeros that Triton makes itself; what is counted (positions, sizes, masks) must be true, so it lies in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...families import Arrays, Picture, Pictures
from ...host.request import kept_slots, prefill_feeds, sparse_feeds
from ...host.runner import Runner
from ...serving.warm_up import QUESTION
from .config import TYPES, Sample

_NAME = "largest"


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
