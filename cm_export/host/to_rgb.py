"""Any mode of Pillow as 8-bit RGB, the same as transformers makes of it, and 16-bit values that Pillow would clip or cut.

    16 bits     0 ... 65535  ->  0 ... 255    value * 255 / 65535, rounded
    12 bits     0 ...  4095  ->  0 ... 255    where the file says so, or where no value needs more: then with a remark
    transparent                  over white

Pillow's own convert() clips 16-bit grey, and of 16-bit colour it reads the upper bytes only: both show 12 bits as black.
"""

import struct
import sys
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..base.errors import InputError
from .picture_notes import Note, extrema

# Raw modes of 16-bit pixels as Pillow reads them, and those that read the lower bytes of the same pixels.
_NATIVE, _OTHER = ("L", "B") if sys.byteorder == "little" else ("B", "L")
_LOWER = {f"{m};16{e}": f"{m};16{o}" for m in ("RGB", "RGBA", "RGBX") for e, o in ("LB", "BL", ("N", _OTHER))}
_LOWER["LA;16B"] = "RGBA"  # as four bytes: upper and lower of the grey value, upper and lower of its opacity
_BITS, _LIKELY = 16, (8, 10, 12)
_DARK = 2**14  # a 16-bit picture whose values end below has at most a quarter of the full brightness


def to_rgb(image: Image.Image, where: object, file: BinaryIO | None = None) -> tuple[Image.Image, list[Note]]:
    """The picture as RGB, and remarks. `file`: what it was opened from, and not loaded yet. Raises InputError."""
    raw, declared = _raw_mode(image), _declared_bits(image, file)
    image.load()
    if image.mode == "F":
        raise InputError("holds float pixels of unknown range", where=where, fix="save it with 8 or 16 bits")
    if image.mode == "LAB":
        raise InputError("holds LAB colours, which are not read", where=where, fix="save it as RGB")
    if image.mode.startswith("I"):
        return _grey(image, declared, where)
    if file is not None and raw in _LOWER and all(high < 16 for _, high in extrema(image.convert("RGB"))):
        return _deep(image, _lower_bytes(file), declared)
    return _over_white(image), []


def _over_white(image: Image.Image) -> Image.Image:
    """8 bits a band, transparent or not."""
    if not _is_transparent(image):
        return image.convert("RGB")
    rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    # As transformers asks; Pillow's own property for it came with 10.1.
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or image.info.get("transparency") is not None


def _grey(image: Image.Image, declared: int, where: object) -> tuple[Image.Image, list[Note]]:
    """16 bits of grey, which Pillow also opens as 32."""
    values = np.asarray(image)
    if values.min() < 0:
        raise InputError("holds values below 0", where=where, fix="save it with 8 or 16 bits without a sign")
    if values.max() >= 2**_BITS:
        raise InputError("has 32 bits per pixel", where=where, fix="save it with 8 or 16 bits")
    levels, notes = _levels(values, declared)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        levels = np.where(values == hidden, np.uint8(255), levels)
    return Image.fromarray(levels).convert("RGB"), notes


def _deep(upper: Image.Image, lower: np.ndarray, declared: int) -> tuple[Image.Image, list[Note]]:
    """16 bits of colour whose upper bytes hold next to nothing, and whose lower bytes are read as well."""
    values = (np.asarray(upper, np.uint16) << 8) + lower
    levels, notes = _levels(values[..., :3], declared)
    if upper.mode != "RGBA":
        return Image.fromarray(levels), notes
    opacity, _ = _levels(values[..., 3], declared)
    return _over_white(Image.fromarray(np.dstack([levels, opacity]))), notes


def _levels(values: np.ndarray, declared: int) -> tuple[np.ndarray, list[Note]]:
    """0..255 of values of up to 16 bits, uint8. declared: bits, 0 where the file says nothing."""
    high, bits, notes = int(values.max()), _BITS, []
    if declared and high < 2**declared:
        bits = declared
    elif 0 < high < 2 ** _LIKELY[-1] and not declared:
        bits = next(b for b in _LIKELY if high < 2**b)
        text = f"its 16-bit values end at {high} of {2**_BITS - 1}, so they are read as {bits} bits"
        notes.append(Note(text, "with 16-bit values that use few of their bits"))
    if bits == _BITS and 0 < high < _DARK:
        text = f"is dark: its 16-bit values end at {high} of {2**_BITS - 1}; if they have fewer bits, scale them up"
        notes.append(Note(text, "with 16-bit values that stay dark"))
    top = 2**bits - 1
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8), notes


def _raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, before it is loaded; "" where Pillow does not say."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _lower_bytes(file: BinaryIO) -> np.ndarray:
    """[H,W,bands] uint8: the lower byte of every value of a file whose upper ones Pillow reads."""
    file.seek(0)
    again: Any = Image.open(file)
    raw = _raw_mode(again)
    tiles = []
    for codec, box, offset, args in again.tile:
        lower = _LOWER[raw]
        tiles.append((codec, box, offset, (lower, *args[1:]) if isinstance(args, tuple) else lower))
    kind = type(again.tile[0])
    again.tile = [kind(*tile) if hasattr(kind, "_fields") else tile for tile in tiles]
    again.load()
    values = np.asarray(again)
    return values[..., [1, 1, 1, 3]] if raw == "LA;16B" else values


def _declared_bits(image: Image.Image, file: BinaryIO | None) -> int:
    """The bits of a value as a TIFF's tags or a PNG's chunk sBIT state them; 0 where nothing does."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        per_sample = _numbers(tags.get(258))  # BitsPerSample
        if per_sample and 8 < max(per_sample) < _BITS:
            return max(per_sample)
        for tag in (341, 281):  # SMaxSampleValue, MaxSampleValue: a range only where all bits are set
            top = max(_numbers(tags.get(tag)), default=0)
            if 2**8 <= top < 2**_BITS and not top & (top + 1):
                return top.bit_length()
    return _significant_bits(file) if image.format == "PNG" and file is not None else 0


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, tuple) else (value,)
    return [int(v) for v in values if isinstance(v, (int, float))]


def _significant_bits(file: BinaryIO) -> int:
    """The chunk sBIT of a PNG, which stands before the pixels."""
    at = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return max(file.read(length)[:4], default=0)
            if kind == b"IDAT":
                return 0
            file.seek(length + 4, 1)
        return 0
    finally:
        file.seek(at)
