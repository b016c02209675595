"""What lies where a bundle was looked for, in words that help: an archive, a checkpoint, a file of a bundle, a typing error.

demo.plan/manifest.json   ->   not a bundle: it is a file of one; give the directory demo.plan
dmeo.plan                 ->   no such bundle; did you mean demo.plan?
"""

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..base.errors import InputError

MANIFEST = "manifest.json"
_ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
_ON_DEVICE = "run its script on the device (README.txt in it says how), or give the bundle that it was packed from"


def may_be(path: Path) -> bool:
    """Whether a directory lies there that holds a bundle's manifest; reads nothing of it."""
    return path.is_dir() and (path / MANIFEST).is_file() and not _is_unpacked(path)


def refusal(path: Path) -> InputError:
    """The error that says what lies at `path` in place of a bundle, and what to give."""
    what, fix = _directory(path) if path.is_dir() else _file(path) if path.exists() else _nothing(path)
    return InputError(what, where=path, fix=fix)


def _nothing(path: Path) -> tuple[str, str]:
    if path.is_symlink():
        return f"no such bundle: it is a link to {os.readlink(path)}, which is not there", "give the bundle's own path"
    if not path.parent.is_dir():
        return f"no such bundle, and no directory {path.parent}", "check the path"
    bundles = [p.name for p in path.parent.iterdir() if may_be(p)] if os.access(path.parent, os.R_OK) else []
    if close := get_close_matches(path.name, bundles, n=1):
        return "no such bundle", f"did you mean {path.parent / close[0]}?"
    return "no such bundle", "check the path, or make one with `cm-export build --model MODEL --out PATH`"


def _file(path: Path) -> tuple[str, str]:
    if path.name.endswith(_ARCHIVES):
        return "not a bundle: it is a file, an archive for a device", f"unpack it there and {_ON_DEVICE}"
    for folder in list(path.absolute().parents)[:2]:  # graphs lie in it, tokenizer.json one deeper
        if may_be(folder):
            return "not a bundle: it is a file of one", f"give the directory, {folder}"
    return "not a bundle: it is a file", "give a directory made by cm-export build"


def _directory(path: Path) -> tuple[str, str]:
    if _is_unpacked(path):
        return "not a bundle: it is an unpacked archive for a device", _ON_DEVICE
    if (path / "config.json").is_file():
        return "not a bundle: it is a checkpoint", f"build it first: cm-export build --model {path} --out NAME.plan"
    try:
        inside = sorted(p.name for p in path.iterdir() if may_be(p))
    except OSError as e:
        return f"cannot be read ({e.strerror})", "give a directory made by cm-export build"
    fix = (
        f"it holds {', '.join(inside[:3])}: give one of these" if inside else "give a directory made by cm-export build"
    )
    return "not a bundle (no manifest.json)", fix


def _is_unpacked(path: Path) -> bool:
    """Whether it is what `pack` writes: it has a manifest of its own kind."""
    return (path / "build_on_device.sh").is_file() and "seal" not in manifest(path)


def manifest(path: Path) -> dict[str, Any]:
    """What manifest.json in a directory says, whoever wrote it and whatever its seal; {} where no object can be read."""
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):  # whoever opens it says what is wrong
        return {}
    return found if isinstance(found, dict) else {}
