"""Where the bytes of a picture come from: a file, a pipe or standard input; and in words what lies there instead of one.

x.png -> the open file      <(curl ...), /dev/stdin, a named pipe -> all that comes through it      a folder -> one clear line
"""

import os
import re
import select
import stat
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..base.errors import InputError
from ..base.links import dead

PIPE_BYTES = 2**29  # of one picture: the largest that is read, 89 million pixels, in 16-bit colour without compression
WAIT_SECONDS = 5.0  # for somebody who writes into a pipe; whoever has opened it may take any time

# How pictures begin that are not read: what it is, and what to do.
_UNREAD = (
    (rb"....ftyp(?:heic|heix|hevc|heim|mif1|msf1)", "a HEIC photo, which is not read", "save it as JPEG"),
    (rb"....ftypavi[fs]", "an AVIF picture, which this Pillow was built without", "save it as PNG"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL picture, which is not read", "save it as PNG"),
    (rb"II\*\0|MM\0\*", "a TIFF that is truncated or of a kind that is not read", "get it again, or save it as PNG"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture whose beginning is damaged or truncated", "get it again"),
)
# How files begin that are given as pictures and are none.
_OTHERS = (
    (rb"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull` where it lies"),
    (rb"\s*<(?:!doctype html|html|head|body)", "an HTML page", "download the picture itself, not the page around it"),
    (rb"\s*<(?:[^<]*>\s*<)*svg", "an SVG drawing", "save it as PNG"),
    (rb"\s*<\?xml", "an XML text, perhaps a server's error", "download the picture again"),
    (rb"%PDF", "a PDF", "save the page as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing", "save it as PNG"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]", "a video", "save one of its frames as PNG"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "an archive", "unpack it and give a picture of it"),
    (rb"\x93NUMPY|\x89HDF", "an array", "save it as PNG"),
    (
        rb"\s*(?:data:image|iVBORw0KGgo|/9j/|R0lGOD|UklGR)",
        "a picture written as base64 text",
        "decode it with `base64 -d`",
    ),
    (rb"\0*\Z", "nothing but zero bytes, perhaps an unfinished download", "get the picture again"),
    (rb"(?:[\t\n\r\f -~]|[\xc2-\xf4][\x80-\xbf]+)*[\xc2-\xf4]?\Z", "text", "give a PNG, JPEG, WebP, BMP..."),
)


def open_file(path: Path) -> BinaryIO:
    """The bytes at `path`, from which can be read at any place. Raises InputError for what holds no file's bytes."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:  # ValueError: a zero byte in the name
        raise InputError(dead(path) or "no such file", where=path, fix="check the path of the picture") from e
    except PermissionError as e:
        raise InputError(
            "no permission to look for it", where=path, fix="check the owner and mode of its folder"
        ) from e
    except OSError as e:
        raise InputError(f"cannot be found ({e.strerror})", where=path, fix="check the path of the picture") from e
    if stat.S_ISDIR(status.st_mode):
        raise InputError("is a directory", where=path, fix="give one picture")
    if stat.S_ISFIFO(status.st_mode):
        return BytesIO(_of_pipe(path))
    if not stat.S_ISREG(status.st_mode):  # reading a device could wait forever, or never end
        raise InputError("is a device, not a regular file", where=path, fix="save the picture to a file first")
    if status.st_size == 0:
        raise InputError("is empty", where=path, fix="get the picture again")
    try:
        return path.open("rb")
    except PermissionError as e:
        raise InputError("no permission to read it", where=path, fix="check its owner and mode") from e
    except OSError as e:
        raise InputError(f"cannot be opened ({e.strerror})", where=path, fix="check the file") from e


def standard_input() -> BinaryIO:
    """All of standard input. Raises InputError where nothing can be piped."""
    if sys.stdin is None or sys.stdin.isatty():
        fix = "pipe a picture into it (... | cm-export run ... --image -), or give its path (./- for a file called -)"
        raise InputError("is a terminal" if sys.stdin else "is closed", where="standard input", fix=fix)
    try:
        data = sys.stdin.buffer.read(PIPE_BYTES + 1)
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where="standard input", fix="pipe a picture into it") from e
    return BytesIO(_checked(data, "standard input"))


def otherwise(head: bytes) -> tuple[str, str]:
    """What a file is that begins so and is not a picture, and how to mend it."""
    for begins, kinds in (("is", _UNREAD), ("is not a picture that can be read: it is", _OTHERS)):
        for pattern, what, fix in kinds:
            if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
                return f"{begins} {what}", fix
    return "is not a picture that can be read", "give a PNG, JPEG, WebP, BMP..."


def _of_pipe(path: Path) -> bytes:
    """Everything that is written into a pipe."""
    descriptor, data = os.open(path, os.O_RDONLY | os.O_NONBLOCK), bytearray()
    last = time.monotonic() + WAIT_SECONDS
    try:
        while len(data) <= PIPE_BYTES:
            try:
                part = os.read(descriptor, 2**20)
            except BlockingIOError:  # somebody has opened it to write, and has not written yet
                select.select([descriptor], [], [])
                continue
            data += part
            if not part:
                if data or time.monotonic() > last:
                    break
                time.sleep(0.02)  # nobody has opened it to write
    finally:
        os.close(descriptor)
    if not data:
        what = f"is a pipe, not a regular file, and nothing was written into it for {WAIT_SECONDS:g} seconds"
        raise InputError(what, where=path, fix="write a picture into it, once for every time that it is given")
    return _checked(bytes(data), path)


def _checked(data: bytes, where: object) -> bytes:
    if not data:
        raise InputError("is empty", where=where, fix="pipe a picture into it")
    if len(data) > PIPE_BYTES:
        what = f"brings more than {PIPE_BYTES // 2**20} MiB"
        raise InputError(what, where=where, fix="pipe one picture, or save it to a file")
    return data
