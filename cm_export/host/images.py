"""Opens the pictures that a user names: any common format becomes upright 8-bit RGB, anything else one clear line."""

import io
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
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..base.errors import InputError

# What Pillow's decoders raise on damaged files, besides OSError: the formats differ, and none of it is our bug.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, struct.error, zlib.error)


@dataclass(frozen=True)
class Opened:
    """A picture that was read: 8-bit RGB, and what to call it."""

    image: Image.Image
    name: str


def open_image(path: str | Path) -> Image.Image:
    """The picture at `path` as RGB: EXIF-upright, transparency over white, first frame of an animation.

    Raises InputError for a URL, a missing, empty, truncated or foreign file, and for pictures of an absurd size.
    """
    text = str(path)
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", text):
        raise InputError("URLs are not fetched", where=text[:80], fix="download the picture and give its path")
    path = Path(path).expanduser()
    with _in_words(path):
        _check_file(path)
        return _decoded(path, path)


def given(picture: object, name: str) -> Opened:
    """What a program hands over as a picture, converted as `open_image` does. `name`: for one that has no path.

    A path, the bytes of a picture file, a PIL image of any mode, or a numpy array uint8 [H,W,3]. Raises InputError.
    """
    if isinstance(picture, str | os.PathLike):
        path = os.fsdecode(picture)
        return Opened(open_image(path), path)
    with _in_words(name):
        if isinstance(picture, bytes | bytearray | memoryview):
            if not len(picture):
                raise InputError("is empty", where=name, fix="give the bytes of a picture file")
            return Opened(_decoded(io.BytesIO(picture), name), name)
        if (
            isinstance(picture, np.ndarray)
            and picture.dtype == np.uint8
            and picture.ndim == 3
            and picture.shape[2] == 3
        ):
            picture = Image.fromarray(np.ascontiguousarray(picture))
        if isinstance(picture, Image.Image):
            _check_pixels(picture, name)
            _load(picture, name)
            return Opened(_to_rgb(ImageOps.exif_transpose(picture), name), name)
    what = type(picture).__name__
    if isinstance(picture, np.ndarray):
        what = f"an array of {picture.dtype}{list(picture.shape)}"
    fix = "give a path, the bytes of a picture file, a PIL image, or a numpy array uint8 [height,width,3]"
    raise InputError(f"{what} is not taken as a picture", where=name, fix=fix)


def _load(picture: Image.Image, name: str) -> None:
    try:
        picture.load()
    except (*DAMAGE, AssertionError) as e:  # Pillow asserts that the file of a picture is open
        what = f"its pixels cannot be read ({str(e) or 'its file was closed'})"
        raise InputError(what, where=name, fix="open it again, and call its load() before its file is closed") from e


# Which warnings are errors is a fact of the whole process, so one thread at a time may change it and change it back.
_WARNINGS = threading.Lock()


def _decoded(source: Path | io.BytesIO, where: object) -> Image.Image:
    """The picture in a file, as RGB. Raises what `_in_words` puts into words."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            image.load()  # of an animation: the first frame
            return _to_rgb(ImageOps.exif_transpose(image), where)


@contextmanager
def _in_words(where: object) -> Iterator[None]:
    """What goes wrong with a picture becomes an InputError of one line."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise _too_large(where) from e
    except UnidentifiedImageError as e:
        raise InputError("is not a picture that can be read", where=where, fix="give a PNG, JPEG, WebP, BMP...") from e
    except PermissionError as e:
        raise InputError("no permission to read it", where=where, fix="check its owner and mode") from e
    except DAMAGE as e:
        raise InputError(f"damaged or truncated ({e})", where=where, fix="get the picture again") from e


def _check_pixels(image: Image.Image, where: object) -> None:
    """Raises InputError for a picture of which Pillow would not open the file."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(where)


def _too_large(where: object) -> InputError:
    limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
    return InputError(f"more than {limit} million pixels", where=where, fix="scale the picture down first")


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


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError("is a directory", where=path, fix="give one picture")
    if not path.exists():
        raise InputError("no such file", where=path, fix="check the path of the picture")
    if not path.is_file():  # reading a pipe or a device could wait forever
        raise InputError("is not a regular file", where=path, fix="save the picture to a file first")
    if path.stat().st_size == 0:
        raise InputError("is empty", where=path, fix="get the picture again")


def _to_rgb(image: Image.Image, where: object) -> Image.Image:
    """8-bit RGB of any Pillow mode; Pillow's own convert() clips 16-bit grey instead of scaling it."""
    if image.mode.startswith("I;16") or image.mode == "I":
        _, high = image.getextrema()
        if isinstance(high, (int, float)) and high > 65535:  # one band, so its extrema are two numbers
            raise InputError("has 32 bits per pixel", where=where, fix="save it with 8 or 16 bits")
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode == "F":
        raise InputError("holds float pixels of unknown range", where=where, fix="save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
