"""Opens clips: a file through PyAV, or frames that a program has; only the frames that the model reads are kept.

clip.mp4 -> frames, frames a second, size -> which are read (families: Tower.frames_of) -> decoded, upright -> Clip

Nothing but the file itself is opened: formats that name other files or addresses (playlists) find none.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from ..base.errors import InputError
from ..base.links import dead
from ..base.paths import expanded
from ..base.settings import is_number
from ..base.units import size as in_words
from ..families import Frames
from .images import Opened, given
from .picture_notes import Note

# (frames, frames a second, (width, height)) -> which
Choose = Callable[[int, float | None, tuple[int, int]], list[int]]
_ANOTHER = "give a clip such as clip.mp4"
_FEWER = "read fewer frames with --fps or --frames, or give a smaller clip"
_LATE = 0.25  # seconds that a frame may lie beside its place among even ones before a note says so


@dataclass(frozen=True)
class Clip(Opened):
    """A clip in the place of a picture; `image` is its first frame that is read."""

    frames: Frames = field(default_factory=lambda: Frames((), (), 0, None))

    @property
    def pixels(self) -> int:
        """Of all frames that are read."""
        return len(self.frames.images) * super().pixels


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
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", str(path)):
        raise InputError("URLs are not fetched", where=str(path)[:80], fix="download the clip and give its path")
    file = expanded(path)
    try:
        if not file.is_file():
            what = "is a directory" if file.is_dir() else "is no regular file" if file.exists() else "no such file"
            raise InputError(dead(file) or what, where=file, fix="give the path of a clip")
        # Opened twice: not every format can be wound back to its beginning.
        with _container(file) as container:
            total, fps, size = _facts(container, file)
        places = _chosen(total, fps, size, choose, file)
        with _container(file) as container:
            shown, notes = _decoded(container.decode(container.streams.video[0]), places, fps)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise InputError(f"cannot be read ({_why(e)})", where=file, fix=_ANOTHER) from e
    except MemoryError as e:
        raise InputError("does not fit in memory", where=file, fix=_FEWER) from e
    if len(shown) < len(places):
        what = f"ends after {len(shown)} of {len(places)} frames that were chosen of {total}"
        raise InputError(what, where=file, fix="the file is damaged, or says more frames than it has: write it anew")
    _check_alike(shown, file)
    return Clip(shown[0], str(file), notes, frames=Frames(shown, places, total, fps))


@contextlib.contextmanager
def _container(file: Path) -> Iterator[Any]:
    """The file, of which FFmpeg gets the bytes alone: it may open nothing by a name or an address that stands in them."""
    import av

    with file.open("rb") as data, av.open(data, options={"protocol_whitelist": "none"}) as container:
        yield container


def _why(error: Exception) -> str:
    """What FFmpeg says, without the path, which stands before it."""
    return str(getattr(error, "strerror", None) or error)


def _facts(container: Any, file: Path) -> tuple[int, float | None, tuple[int, int]]:
    """(frames, frames a second, (width, height)) of the first stream of frames. Raises InputError where there is none."""
    moving = [s for s in container.streams.video if "attached_pic" not in str(getattr(s, "disposition", ""))]
    if not moving or moving[0] is not container.streams.video[0]:
        raise InputError("has no pictures that move", where=file, fix=_ANOTHER)
    stream = moving[0]
    if stream.codec_context is None:  # an index that ends before it names the codec
        raise InputError("cannot be read (no codec is named for its frames)", where=file, fix=_ANOTHER)
    size = (int(stream.codec_context.width or 0), int(stream.codec_context.height or 0))
    most = Image.MAX_IMAGE_PIXELS or size[0] * size[1]
    if size[0] * size[1] > most:
        what = f"frames of {size[0]}x{size[1]}: more than {most // 1_000_000} million pixels are not read"
        raise InputError(what, where=file, fix="scale the clip down first")
    total = stream.frames or sum(1 for _ in container.decode(stream))
    if not total:
        raise InputError("has no frames", where=file, fix="check the file")
    if total > file.stat().st_size:
        what = f"says that it has {total} frames, in a file of {in_words(file.stat().st_size)}"
        raise InputError(what, where=file, fix="the file is damaged: get it again")
    return total, float(stream.average_rate) if stream.average_rate else None, size


def _chosen(total: int, fps: float | None, size: tuple[int, int], choose: Choose, file: Path) -> list[int]:
    """Which frames are read. Raises InputError, also where they do not fit in memory."""
    try:
        places = choose(total, fps, size)
    except InputError as e:
        raise InputError(e.what, where=e.where or file, fix=e.fix) from e
    need, free = 3 * len(places) * size[0] * size[1], psutil.virtual_memory().available
    if need > free // 2:
        what = f"{len(places)} frames of {size[0]}x{size[1]} need {in_words(need)}, {in_words(free)} are free"
        raise InputError(what, where=file, fix=_FEWER)
    return places


def _decoded(frames: Any, places: Sequence[int], fps: float | None) -> tuple[list[Image.Image], tuple[Note, ...]]:
    """Frames at these ascending places, upright, no other one converted; and what to know about their times."""
    wanted, out, late = set(places), list[Image.Image](), 0.0
    first: float | None = None
    for i, frame in enumerate(frames):
        first = frame.time if first is None else first
        if i in wanted:
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            turned = int(getattr(frame, "rotation", 0) or 0)  # degrees, counter-clockwise, that make it upright
            out.append(image.rotate(turned, expand=True) if turned % 90 == 0 and turned % 360 else image)
            if fps and frame.time is not None and first is not None:
                late = max(late, abs(frame.time - first - i / fps))
        if i >= places[-1]:
            break
    if late <= _LATE:
        return out, ()
    text = (
        f"its frames come at uneven times, up to {late:.2g} s beside the even {fps:.4g} a second that the model is told"
    )
    return out, (Note(text, "with frames at uneven times"),)


def given_clip(frames: Sequence[Any], fps: float | None, choose: Choose | None, name: str = "clip") -> Clip:
    """Frames of a program, each as `images.given` takes a picture; `choose`: None reads all. Raises InputError."""
    if not len(frames):
        raise InputError("has no frames", where=name, fix="give at least one")
    first = given(frames[0], f"{name}: frame 0").image
    places = list(range(len(frames))) if choose is None else choose(len(frames), fps, first.size)
    shown = [given(frames[i], f"{name}: frame {i}").image if i else first for i in places]
    _check_alike(shown, name)
    return Clip(shown[0], name, frames=Frames(shown, places, len(frames), fps))


def _check_alike(frames: Sequence[Image.Image], where: object) -> None:
    if len({image.size for image in frames}) > 1:
        raise InputError("its frames differ in size", where=where, fix="give frames of one size")
