"""The bytes of a picture that a client sent become pixels, if its kind is one of a few and its size is within bounds.

bytes -> kind and size, from the first bytes alone -> room in the request's pixels -> host/images.py decodes it

A file of some kilobytes can say that it holds billions of pixels, so its size is asked before anything is decoded. The kinds are
those that browsers show: the many others that Pillow reads would be as many parsers for data of strangers.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from ..base.errors import InputError
from ..host import picture_source
from ..host.images import DAMAGE, Opened, given

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass
class Pixels:
    """How many pixels the pictures of one request may still have."""

    left: int

    def take(self, count: int, where: str) -> None:
        """Raises InputError where that many are not left."""
        if count > self.left:
            what = f"has {count / 1e6:.3g} million pixels, {self.left / 1e6:.3g} million are left for this request"
            raise InputError(what, where=where, fix="scale the picture down first")
        self.left -= count


def decoded(data: bytes, where: str, room: Pixels) -> Opened:
    """The picture as `cm-export run` reads it. `where`: what to call it. Raises InputError."""
    if not data:
        raise InputError("is empty", where=where, fix="give the bytes of a picture file")
    room.take(_pixels(data, where), where)
    return given(data, where)


def _pixels(data: bytes, where: str) -> int:
    """What the picture says about its size; nothing is decoded."""
    try:
        with Image.open(BytesIO(data), formats=KINDS) as image:
            return image.width * image.height
    except UnidentifiedImageError as e:
        what, _ = picture_source.otherwise(data[:512])
        raise InputError(f"{what}, or of a kind that is not taken", where=where, fix=f"send {', '.join(KINDS)}") from e
    except Image.DecompressionBombError as e:
        raise InputError("has far too many pixels", where=where, fix="scale the picture down first") from e
    except DAMAGE as e:
        raise InputError(f"damaged or truncated ({e})", where=where, fix="get the picture again") from e
