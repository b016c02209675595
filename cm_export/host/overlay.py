"""Draws which image tokens were kept: kept patches at full brightness inside a thin outline, dropped ones dimmed.

kept [gh, gw]:  # # .        the picture is cut into gh x gw cells, one per image token after the patch merger
                # . .
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..base import atomic
from ..base.errors import InputError
from ..base.links import behind_links
from ..base.paths import expanded

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MIN_WIDTH, MAX_SIDE = 512, 2048  # pixels of the drawing
SHADE, SHADE_SHARE = (34, 36, 42), 0.66  # dropped patches are mixed with this: dark, yet their content stays readable
ACCENT = (255, 196, 0)
MAX_LINES = 4  # of the caption


def check_output(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """`path`, if a file can be written there; raises InputError, so that no long work is done for nothing."""
    path = expanded(path)
    if suffixes is not SUFFIXES:  # a picture's temporary name is cut, others are longer than the final one
        atomic.check_name(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {path.suffix or 'a file without a suffix'}", where=path, fix=_one_of(suffixes))
    try:
        is_directory = path.is_dir()
    except OSError as e:  # a name that is too long
        raise InputError(f"cannot be written ({e.strerror})", where=path, fix="give another name") from e
    if is_directory:
        raise InputError("is a directory", where=path, fix="give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"no directory {path.parent}", where=path, fix="create it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"no permission to write in {path.parent}", where=path, fix="write elsewhere")
    return path


def draw_overlay(image: Image.Image, kept: np.ndarray, out_path: str | Path, caption: str | None = None) -> Path:
    """Writes the drawing atomically and returns its path. kept: bool [gh, gw]. Raises InputError (`check_output`)."""
    out_path = check_output(out_path)
    _write(compose(image, kept, caption), out_path)
    return out_path


def compose(image: Image.Image, kept: np.ndarray, caption: str | None = None) -> Image.Image:
    """The drawing itself, RGB. kept: bool [gh, gw]."""
    kept = np.asarray(kept, dtype=bool)
    if kept.ndim != 2 or kept.size == 0:
        raise ValueError(f"kept must be a grid [gh, gw], not {kept.shape}")
    picture = _scaled(image.convert("RGB"), kept.shape)
    mask = Image.fromarray(kept).resize(picture.size, Image.Resampling.NEAREST)
    faded = Image.blend(picture, picture.convert("L").convert("RGB"), 0.4)
    dropped = Image.blend(faded, Image.new("RGB", picture.size, SHADE), SHADE_SHARE)
    _draw_grid(dropped, kept.shape)
    drawn = Image.composite(picture, dropped, mask)
    if not kept.all():
        cell = min(picture.width // kept.shape[1], picture.height // kept.shape[0])
        drawn.paste(ACCENT, mask=_outline(mask, thickness=min(3, max(1, cell // 16))))
    if caption:
        drawn = _with_caption(drawn, caption)
    return drawn


def _scaled(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The picture at a size that can be looked at; whole cells, so that every cell has the same number of pixels."""
    width, height = picture.size
    scale = min(max(1.0, MIN_WIDTH / width), MAX_SIDE / max(width, height))
    rows, columns = grid
    cell = max(1, round(width * scale / columns)), max(1, round(height * scale / rows))
    return picture.resize((cell[0] * columns, cell[1] * rows), Image.Resampling.BICUBIC)


def _draw_grid(picture: Image.Image, grid: tuple[int, int]) -> None:
    """Hairlines between dropped cells, so that tokens can be counted; left out where cells are too small for it."""
    rows, columns = grid
    cell_w, cell_h = picture.width // columns, picture.height // rows
    if min(cell_w, cell_h) < 10:
        return
    lines = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(lines)
    for x in range(cell_w, picture.width, cell_w):
        draw.line([(x, 0), (x, picture.height)], fill=28)
    for y in range(cell_h, picture.height, cell_h):
        draw.line([(0, y), (picture.width, y)], fill=28)
    picture.paste((255, 255, 255), mask=lines)


def _outline(mask: Image.Image, thickness: int) -> Image.Image:
    """The inner border of the kept regions; the frame of the picture counts as a border, too."""
    grown = Image.new("L", (mask.width + 2 * thickness, mask.height + 2 * thickness), 0)
    grown.paste(mask.convert("L"), (thickness, thickness))
    inner = grown.filter(ImageFilter.MinFilter(2 * thickness + 1))
    right, lower = mask.width + thickness, mask.height + thickness
    return ImageChops.subtract(grown, inner).crop((thickness, thickness, right, lower))


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """The picture above a dark strip with the caption, wrapped at its width; its own line breaks are kept."""
    size = max(14, picture.width // 32)
    font, pad = ImageFont.load_default(size), size // 2
    lines: list[str] = []
    for part in caption.splitlines():
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > picture.width - 2 * pad:
                lines.append(word)
            else:
                lines[-1] = longer
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1]} ..."]
    line_height = round(size * 1.35)
    framed = Image.new("RGB", (picture.width, picture.height + 2 * pad + line_height * len(lines)), (24, 24, 27))
    framed.paste(picture)
    draw = ImageDraw.Draw(framed)
    for number, line in enumerate(lines):
        draw.text((pad, picture.height + pad + number * line_height), line, fill=(235, 235, 235), font=font)
    return framed


def _write(drawn: Image.Image, path: Path) -> None:
    """Into a temporary name beside `path`, then renamed: a reader never sees half a picture."""
    target = behind_links(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{path.name[:16]}.", suffix=path.suffix)
        try:
            with os.fdopen(handle, "wb") as file:
                drawn.save(file, format=Image.registered_extensions()[path.suffix.lower()], quality=92)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise InputError(f"cannot be written ({e.strerror or e})", where=path, fix="check the disk and the path") from e


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it; mkstemp's private 0600 would surprise whoever opens the picture
    os.umask(mask)
    return mask


def _one_of(suffixes: Sequence[str]) -> str:
    return f"use {' or '.join(suffixes)}"
