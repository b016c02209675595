"""Opens the pictures that a user names: any common format becomes upright 8-bit RGB, anything else one clear line.

path, pipe, standard input -> bytes (picture_source.py) -> frame with content -> RGB (to_rgb.py) -> upright -> Opened
"""

import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..base.errors import InputError
from ..base.paths import expanded
from . import picture_source
from .picture_notes import Note, is_one_colour, on_colour
from .to_rgb import to_rgb

# What Pillow's decoders raise on damaged files, besides OSError: the formats differ, and none of it is our bug.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
_NO_PIXELS = ("EPS", "WMF", "EMF", "MPEG", "BUFR", "GRIB", "HDF5")  # known to Pillow, drawn or read by other programs
_ONE_PICTURE = ("MPO", "PSD", "ICNS", "ICO")  # frames of these are previews, depths and layers of the first
_SEARCHED_PIXELS = 100_000_000  # of an animation, in search of a frame that shows something
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Opened:
    """A picture that was read: 8-bit RGB, what to call it, and what its user should know."""

    image: Image.Image
    name: str
    notes: tuple[Note, ...] = ()

    @property
    def pixels(self) -> int:
        """How many are in memory."""
        return self.image.width * self.image.height


def open_image(path: str | Path) -> Image.Image:
    """The picture at `path` as `opened` reads it, without its remarks."""
    return opened(path).image


def opened(path: str | Path) -> Opened:
    """The picture at `path`: EXIF-upright, transparency over white, of an animation the first frame that shows something.

    A pipe is read to its end. Raises InputError for a URL, a missing, empty, truncated or foreign file, and for pictures
    of an absurd size.
    """
    text = str(path)
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", text):
        raise InputError("URLs are not fetched", where=text[:80], fix="download the picture and give its path")
    if not text.strip():
        raise InputError("the path of the picture is empty", where="image", fix="give a path, or - for standard input")
    path = expanded(path)
    with picture_source.open_file(path) as file:
        return _read(file, str(path))


def opened_standard_input() -> Opened:
    """The picture that is piped into the program. Raises InputError."""
    with picture_source.standard_input() as file:
        return _read(file, "standard input")


def given(picture: object, name: str) -> Opened:
    """What a program hands over as a picture, converted as `opened` does. `name`: for one that has no path.

    Opened, a path, the bytes of a picture file, a PIL image of any mode, or an array uint8 [H,W,3]. Raises InputError.
    """
    if isinstance(picture, Opened):
        return picture
    if isinstance(picture, str | os.PathLike):
        return opened(os.fsdecode(picture))
    if isinstance(picture, bytes | bytearray | memoryview):
        if not len(picture):
            raise InputError("is empty", where=name, fix="give the bytes of a picture file")
        return _read(BytesIO(picture), name)
    what = type(picture).__name__
    if isinstance(picture, np.ndarray):
        what = f"an array of {picture.dtype}{list(picture.shape)}"
        if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
            picture = Image.fromarray(np.ascontiguousarray(picture))
    if not isinstance(picture, Image.Image):
        fix = "give a path, the bytes of a picture file, a PIL image, or a numpy array uint8 [height,width,3]"
        raise InputError(f"{what} is not taken as a picture", where=name, fix=fix)
    return _in_memory(picture, name)


def check_size(image: Image.Image, min_side: int, max_ratio: float = math.inf, where: object = "image") -> None:
    """Raises InputError for a picture that the tower cannot cut into patches; both bounds are the tower's.

    min_side: pixels of the shorter side. max_ratio: long side / short side.
    """
    width, height = image.size
    if min(width, height) < min_side:
        raise InputError(
            f"{width}x{height} pixels is too small", where=where, fix=f"both sides need at least {min_side} pixels"
        )
    if max(width, height) > max_ratio * min(width, height):
        raise InputError(
            f"{width}x{height} pixels is too long and thin", where=where, fix=f"crop it to at most {max_ratio:g} : 1"
        )


def _in_memory(picture: Image.Image, name: str) -> Opened:
    """A PIL image; one that was opened by its own file may still have to be decoded."""
    _check_pixels(picture, name)
    if 0 in picture.size:
        raise InputError("has no pixels", where=name, fix="give a picture of at least 1x1")
    try:
        picture.load()
    except (*DAMAGE, AssertionError) as e:  # Pillow asserts that the file of a picture is open, or takes it for granted
        why = "its file was closed" if isinstance(e, AssertionError | AttributeError) else str(e)
        what = f"its pixels cannot be read ({why})"
        raise InputError(what, where=name, fix="open it again, and call its load() before its file is closed") from e
    with _faults(name):
        rgb, notes = to_rgb(picture, name)
        rgb, more = _upright(rgb, picture)
    return Opened(rgb, name, (*notes, *on_colour(rgb), *more))


# Which warnings are shown is a fact of the whole process, so one thread at a time may change it and change it back.
_WARNINGS = threading.Lock()


def _read(file: BinaryIO, name: str) -> Opened:
    with _faults(name, file), _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities of metadata; and bombs, which are refused below
        with Image.open(file) as image:
            if image.format in _NO_PIXELS:
                what = f"is of the format {image.format}, of which no pixels can be read"
                raise InputError(what, where=name, fix="save it as PNG")
            _check_pixels(image, name)
            rgb, notes = _first_shown(image, file, name)
            rgb, more = _upright(rgb, image)
            return Opened(rgb, name, (*notes, *on_colour(rgb), *more))


@contextmanager
def _faults(name: str, file: BinaryIO | None = None) -> Iterator[None]:
    """What Pillow raises, as one clear line."""
    try:
        yield
    except Image.DecompressionBombError as e:
        pixels = re.search(r"\((\d+) pixels\)", str(e))
        raise _too_many(int(pixels[1]) if pixels else 0, name) from e
    except UnidentifiedImageError as e:
        if file is not None:
            file.seek(0)
        what, fix = picture_source.otherwise(file.read(512) if file is not None else b"")
        raise InputError(what, where=name, fix=fix) from e
    except MemoryError as e:
        raise InputError("does not fit in memory", where=name, fix="scale the picture down first") from e
    except DAMAGE as e:
        raise InputError(f"damaged or truncated ({e})", where=name, fix="get the picture again") from e


def _first_shown(image: Image.Image, file: BinaryIO, name: str) -> tuple[Image.Image, list[Note]]:
    """The first frame; of an animation that begins with frames of one colour, the first frame of another kind."""
    first, notes = to_rgb(image, name, file)
    if image.format in _ONE_PICTURE:
        return first, notes
    kind, shown, more, number = "with several frames", first, notes, 0
    try:
        if not getattr(image, "is_animated", False):
            return first, notes
        if image.format == "TIFF":
            return first, [*notes, Note("has several pages, of which the first is read", "with several pages")]
        while is_one_colour(shown) and (number + 1) * first.width * first.height < _SEARCHED_PIXELS:
            number += 1
            image.seek(number)  # EOFError after the last one
            shown, more = to_rgb(image, name)
        if number and not is_one_colour(shown):
            text = (
                f"has several frames, of which number {number + 1} is read, since those before it show one colour only"
            )
            return shown, [*more, Note(text, kind)]
        why = f": it and {number} after it show one colour only" if number else ""
    except EOFError:
        why = ": all of them show one colour only"
    except DAMAGE as e:
        why = f"; what follows is damaged ({e})"
    return first, [*notes, Note(f"has several frames, of which the first is read{why}", kind)]


def _upright(rgb: Image.Image, image: Image.Image) -> tuple[Image.Image, list[Note]]:
    """Turned as the camera says."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except DAMAGE as e:
        text = f"its EXIF data is damaged ({e}), so it is read as if the camera was upright"
        return rgb, [Note(text, "with damaged EXIF data")]
    if orientation not in range(2, 9):
        return rgb, []
    rgb.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(rgb), []


def _check_pixels(image: Image.Image, name: str) -> None:
    """Pillow itself warns only, up to twice its limit."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_many(image.width * image.height, name)


def _too_many(pixels: int, name: str) -> InputError:
    limit = Image.MAX_IMAGE_PIXELS or 0
    has = f" (it has {pixels / 1e6:.4g} million)" if pixels else ""
    fix = f"scale it to {math.floor(100 * math.sqrt(limit / pixels))} % of its width and height first" if pixels else ""
    what = f"more than {limit // 1_000_000} million pixels are not read{has}"
    return InputError(what, where=name, fix=fix or "scale the picture down first")
