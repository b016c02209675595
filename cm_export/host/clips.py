"""Opens clips: a file through PyAV, or frames that a program has; only the frames that the model reads are kept.

clip.mp4 -> number of frames, frames a second -> which are read (families: Tower.frames_of) -> decoded -> Clip
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..base.errors import InputError
from ..base.paths import expanded
from ..base.settings import is_number
from ..families import Frames
from .images import Opened, given

Choose = Callable[[int, float | None], list[int]]  # (frames, frames a second) -> which


@dataclass(frozen=True)
class Clip(Opened):
    """A clip in the place of a picture; `image` is its first frame that is read."""

    frames: Frames = field(default_factory=lambda: Frames((), (), 0, None))


def taken(source: Any, fps: float | None, rate: float | None, count: float | None, choose: Choose) -> Clip:
    """What `Runner.clip` is given: the path of a file, or a sequence of frames and their `fps`. Raises InputError."""
    if rate is not None and count is not None:
        raise InputError("a rate and a number of frames were given", where="clip", fix="give one of them")
    for name, value in (("fps", fps), ("rate", rate), ("count", count)):
        if value is not None and (not is_number(value) or value <= 0):
            raise InputError(f"{name} = {value!r} is not a number above 0", where="clip", fix="give another")
    if isinstance(source, str | os.PathLike):
        return opened_clip(os.fspath(source), choose)
    if not isinstance(source, Sequence | np.ndarray) or isinstance(source, bytes):
        raise InputError(f"is a {type(source).__name__}", where="clip", fix="give a path, or a sequence of frames")
    return given_clip(list(source), fps, None if rate is count is None else choose)


def opened_clip(path: str | Path, choose: Choose) -> Clip:
    """The frames of a file that `choose` asks for. Raises InputError for a file that cannot be read."""
    try:
        import av
    except ImportError as e:
        fix = "pip install 'cm-export[video]', or hand over frames (docs/python.md)"
        raise InputError("clips are read by PyAV, which is not installed", where=str(path), fix=fix) from e
    file = expanded(path)
    if not file.is_file():
        raise InputError("no such file", where=file, fix="give the path of a clip")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise InputError("has no pictures that move", where=file, fix="give a clip such as clip.mp4")
            stream = container.streams.video[0]
            fps = float(stream.average_rate) if stream.average_rate else None
            total = stream.frames or sum(1 for _ in container.decode(stream))
            if not total:
                raise InputError("has no frames", where=file, fix="check the file")
            container.seek(0)
            places = choose(total, fps)
            shown = _decoded(container.decode(stream), places)
    except (av.FFmpegError, OSError) as e:
        raise InputError(f"cannot be read ({e})", where=file, fix="give a clip such as clip.mp4") from e
    if len(shown) < len(places):
        what = f"ends after {len(shown)} of {len(places)} frames that were chosen of {total}"
        raise InputError(what, where=file, fix="the file is damaged, or says more frames than it has")
    return Clip(shown[0], str(file), frames=Frames(shown, places, total, fps))


def _decoded(frames: Any, places: Sequence[int]) -> list[Image.Image]:
    """Frames at these ascending places, no other one converted."""
    wanted, out = set(places), []
    for i, frame in enumerate(frames):
        if i in wanted:
            out.append(Image.fromarray(frame.to_ndarray(format="rgb24")))
        if i >= places[-1]:
            break
    return out


def given_clip(frames: Sequence[Any], fps: float | None, choose: Choose | None, name: str = "clip") -> Clip:
    """Frames of a program, each as `images.given` takes a picture; `choose`: None reads all. Raises InputError."""
    if not len(frames):
        raise InputError("has no frames", where=name, fix="give at least one")
    places = list(range(len(frames))) if choose is None else choose(len(frames), fps)
    shown = [given(frames[i], f"{name}: frame {i}").image for i in places]
    if len({image.size for image in shown}) > 1:
        raise InputError("its frames differ in size", where=name, fix="give frames of one size")
    return Clip(shown[0], name, frames=Frames(shown, places, len(frames), fps))
