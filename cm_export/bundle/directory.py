"""The place of a bundle: it appears and is replaced in one step, and what the user has put into it stays.

.x.plan.a1b2c3d4.tmp/   the new files, and links to the user's      -- exchanged -->   x.plan/
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base import atomic, disk
from ..base.atomic import exchange as _exchange
from ..base.errors import InputError
from . import not_a_bundle
from .bundle import GRAPHS, MANIFEST
from .weights import FILE as WEIGHTS

_LEFTOVER = ".old"
_LONGEST = 255 - len("..a1b2c3d4.stages")  # of a name, in bytes: what lies beside a bundle has a longer one


@contextlib.contextmanager
def assemble(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends well and vanishes when it does not.

    Killed at any moment, `out` is the old bundle (or nothing, if there was none) or the new one. Raises InputError where
    the new bundle has a file of the same name as one that the user has put into the old one.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield folder
        folder.chmod((out.stat().st_mode & 0o777) | 0o700 if out.exists() else 0o755)
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        _take_over(out, folder, foreign(out), strict=bool(_manifest(out)))
        old = out.with_name(f".{out.name}{_LEFTOVER}")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists() and _exchange(folder, out):
            _take_over(folder, out, foreign(folder))  # what came while the others were linked
        else:
            if out.exists():
                os.rename(out, old)
            os.rename(folder, out)
            _take_over(old, out, foreign(old))
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- the user's files
def foreign(out: Path) -> list[Path]:
    """What lies in the bundle at `out` and is not listed in its manifest, relative to it, folders before what they hold.

    Where the manifest cannot be read, everything besides it may be the user's.
    """
    own = {Path(MANIFEST), *map(Path, _manifest(out).get("files", ()))}
    own |= {above for file in own for above in file.parents}
    found = []
    for place, folders, files in os.walk(out):
        names = sorted(n for n in (*folders, *files) if not n.startswith(".nfs"))  # deleted files that are still open
        found += [p for n in names if (p := Path(place, n).relative_to(out)) not in own]
    return found


def _take_over(old: Path, new: Path, names: list[Path], strict: bool = False) -> None:
    """Give files of `old` a second name below `new`, where there is none of that name; strict: else raise InputError."""
    for name in names:
        source, target = old / name, new / name
        if os.path.lexists(target):
            folders = target.is_dir() and source.is_dir() and not (target.is_symlink() or source.is_symlink())
            if folders or not strict:
                continue
            what = f"{name} is not of the bundle, and the new bundle has a file of that name"
            raise InputError(what, where=old, fix=f"move {name} elsewhere and build again")
        if source.is_dir() and not source.is_symlink():
            target.mkdir()
            shutil.copystat(source, target)
            continue
        with disk.writing(new.parent):
            target.parent.mkdir(parents=True, exist_ok=True)  # one of the old bundle's own, which the new one has not
            disk.link_or_copy(source, target)


# ------------------------------------------------------------------------------------------------- before a build
def given(out: Path) -> Path:
    """`--out` as an absolute path, behind a symbolic link: the link stays, what it leads to is written. Raises InputError."""
    out = Path(os.path.abspath(out))
    if len(os.fsencode(out.name)) > _LONGEST:
        what = f"{out.name[:20]}... has more than {_LONGEST} bytes"
        raise InputError(what, where="--out", fix="give a shorter name")
    if not out.is_symlink():
        return out
    target = Path(os.path.realpath(out))
    if target.is_symlink() or not target.parent.is_dir():
        what = f"is a symbolic link to {os.readlink(out)}, which is in no directory that is there"
        raise InputError(what, where=out, fix="give another --out, or make that directory")
    return target


def check_out(out: Path) -> None:
    """Raises InputError unless `out` is free or holds an older bundle, and its parent can be written."""
    try:
        _check_out(out)
    except OSError as e:
        raise InputError(f"cannot be looked at ({e.strerror})", where=out, fix="give another --out") from e


def _check_out(out: Path) -> None:
    atomic.check_name(out)
    if out.exists() and not out.is_dir():
        raise InputError("exists and is not a directory", where=out, fix="give another --out")
    if out.is_dir() and any(out.iterdir()) and not _is_bundle(out):
        raise InputError("holds something that is not a bundle", where=out, fix="give another --out or empty it")
    if os.path.ismount(out):
        what = "is a mount point, which cannot be replaced in one step"
        raise InputError(what, where=out, fix=f"give --out {out / 'NAME.plan'}")
    above = disk.existing(out.parent)
    if not above.is_dir():
        raise InputError(f"cannot create {out.parent} ({above} is a file)", where=out, fix="give another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{above} is not writable", where=out, fix="give another --out")


def _is_bundle(out: Path) -> bool:
    """Whether a build wrote `out`, also if it was damaged since: other things have a manifest.json, too."""
    return bool(_manifest(out)) or all((out / name).exists() for name in (MANIFEST, WEIGHTS, f"{GRAPHS[0]}.onnx"))


def model_of(out: Path) -> dict[str, Any] | None:
    """What the manifest of an older bundle at `out` says of its model: source, revision, files. None without one."""
    model = _manifest(out).get("model")
    return model if isinstance(model, dict) and isinstance(model.get("files"), dict) else None


def _manifest(out: Path) -> dict[str, Any]:
    """The manifest of a bundle that will be replaced, whatever its seal and format; {} where there is none to read."""
    found = not_a_bundle.manifest(out)
    return found if "seal" in found and isinstance(found.get("files"), dict) else {}


def sweep(out: Path) -> None:
    """Remove temporary directories that killed builds of the same `out` left behind. Call only under the build lock."""
    old = out.with_name(f".{out.name}{_LEFTOVER}")
    if old.exists() and not out.exists():  # killed between the two renames of `assemble`
        os.rename(old, out)
    # mkdtemp's eight characters hold no dot, so the directories of a build of `NAME.more` are not matched.
    for leftover in [*out.parent.glob(f".{glob.escape(out.name)}.{'?' * 8}.tmp"), old]:
        shutil.rmtree(leftover, ignore_errors=True)
