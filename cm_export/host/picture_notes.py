"""What a user should know about a picture that was read: remarks on one, and counts of them over many.

one picture     a.png: shows one colour only, #808080
many            pictures of one colour: 3 of 120, such as a.png: shows one colour only, #808080
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..families import Tower

ALIKE = 3  # of 255: pixels that differ by no more are called one colour, since JPEG and WebP write nearly equal ones
BLACK = 16  # of 255: a picture with no value above it shows nothing to the eye; it is where 12 bits of 16 end
ENLARGED = 4  # times the width or height, from which on a picture is said to be enlarged


@dataclass(frozen=True)
class Note:
    """One remark: what is said of this picture, and what the pictures are called of which it is said."""

    text: str
    kind: str


def is_one_colour(image: Image.Image) -> bool:
    """Whether all pixels of an RGB picture are practically equal."""
    return all(high - low <= ALIKE for low, high in extrema(image))


def on_colour(image: Image.Image) -> list[Note]:
    """A remark on a picture that shows nothing but one colour, or next to nothing."""
    if not is_one_colour(image):
        brightest = max(high for _, high in extrema(image))
        black = f"is nearly black: no value of it is above {brightest} of 255"
        return [Note(black, "that are nearly black")] if brightest <= BLACK else []
    low, high = zip(*extrema(image), strict=True)
    colour = "#" + "".join(f"{(a + b) // 2:02x}" for a, b in zip(low, high, strict=True))
    only = f"shows one colour only, {colour}"
    if low != high:
        only = f"shows nearly one colour, {colour}, from which no pixel differs by more than {ALIKE} of 255"
    return [Note(only, "of one colour")]


def on_size(image: Image.Image, tower: Tower, rule: object) -> list[Note]:
    """A remark on a picture that the tower reads enlarged many times. Raises InputError for a size that it refuses."""
    (width, height), (w, h) = image.size, tower.resized(image.size, rule)
    if max(w / width, h / height) < ENLARGED:
        return []
    times = f"{w / width:.3g} times" if w * height == h * width else f"{w / width:.3g} and {h / height:.3g} times"
    return [Note(f"{width}x{height} pixels are enlarged {times}, to {w}x{h}", f"enlarged {ENLARGED} times or more")]


def line(name: str, note: Note) -> str:
    """A remark with the picture's name, whatever characters a file's name may hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) + f": {note.text}"


def counted(notes: Mapping[str, Sequence[Note]], total: int) -> list[str]:
    """One line for each kind of remark: how many of `total` pictures it is about, and the first of them by name."""
    kinds: dict[str, list[str]] = {}
    for name, of_picture in notes.items():
        for note in of_picture:
            kinds.setdefault(note.kind, []).append(line(name, note))
    return [f"pictures {kind}: {len(found)} of {total}, such as {found[0]}" for kind, found in kinds.items()]


def extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Smallest and largest value of every band of an 8-bit picture."""
    bands: Any = image.getextrema()  # two numbers for each band; of a picture of one band Pillow gives the two alone
    return list(bands) if isinstance(bands[0], tuple) else [bands]
