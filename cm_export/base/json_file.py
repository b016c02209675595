"""Reads JSON that somebody else wrote; a file that is something else is named for what it is.

config.json, saved from a browser  ->  config.json: is a web page, not the file; download the file itself
"""

import json
from pathlib import Path
from typing import Any

from .errors import InputError

AGAIN = "download it again"


def read_object(path: Path, fix: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError that says what the file is instead."""
    check_content(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise InputError(f"cannot be read as JSON ({e})", where=path, fix=fix) from e
    if not isinstance(values, dict):
        raise InputError("is not a JSON object", where=path, fix=fix)
    return values


def check_content(path: Path) -> None:
    """Raises InputError for a text file that cannot be opened, is empty or begins like another kind of file."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except PermissionError as e:
        raise no_permission(path) from e
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where=path, fix="check the disk it lies on") from e
    if not start:
        raise InputError("is empty", where=path, fix=AGAIN)
    if start.startswith(b"version https://git-lfs"):
        raise InputError("is a git-lfs pointer, not the file", where=path, fix="run `git lfs pull` there")
    if start.startswith(b"\xef\xbb\xbf"):
        fix = "save it as UTF-8 without one: transformers refuses it, too"
        raise InputError("begins with a byte-order mark", where=path, fix=fix)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("is UTF-16 text", where=path, fix="save it as UTF-8 without a byte-order mark")
    begin = start.lstrip().lower()
    # A template may begin with a tag of its own; JSON never does.
    if begin.startswith((b"<!doctype html", b"<html")) or (path.suffix == ".json" and begin.startswith(b"<")):
        fix = "download the file itself: `hf download`, or the address with /resolve/ in place of /blob/"
        raise InputError("is a web page, not the file", where=path, fix=fix)


def no_permission(path: Path) -> InputError:
    """The error for a file that is there and may not be opened."""
    return InputError("no permission to read it", where=path, fix="check its owner and mode")
