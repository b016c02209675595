"""Room on disks: asked for before the work, where the bytes will go; a disk that is full all the same is named.

require(Need(work_dir, 4_400_000_000, "--work-dir"), Need(out.parent, 4_400_000_000, "--out"))
-> "/scratch: needs about 8.8 GB, 3.1 GB are free; free some, or give a --work-dir on a larger disk"
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CmExportError, InputError
from .units import size

FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left of the quota",
    errno.EFBIG: "a file grew beyond what the file system or a limit allows",  # such as FAT's 4 GB
}
TEMPORARY = "cm-export-"  # how our own directories in the temporary one begin


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below `folder` (or where it will be made); `option`: what puts them elsewhere."""

    folder: Path
    bytes: int
    option: str  # --out, --work-dir, TMPDIR


def require(*needs: Need) -> None:
    """Raises InputError when the needs of one file system, taken together, are more than what is free there."""
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        by_device.setdefault(os.stat(existing(need.folder)).st_dev, []).append(need)
    for together in by_device.values():
        place, wanted = existing(together[0].folder), sum(n.bytes for n in together)
        free = shutil.disk_usage(place).free
        if free < wanted:
            options = " and ".join(dict.fromkeys(n.option for n in together))
            if _is_temporary(place):  # a directory that the user has not named
                place, options = Path(tempfile.gettempdir()), "TMPDIR"
            fix = f"free some, or give a {options} on a larger disk"
            raise InputError(f"needs about {size(wanted)}, {size(free)} are free", where=place, fix=fix)


def _is_temporary(place: Path) -> bool:
    top = Path(tempfile.gettempdir())
    return place == top or (top in place.parents and place.relative_to(top).parts[0].startswith(TEMPORARY))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Writing into `folder`: when there is no room left, the error names it. Raises CmExportError."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise CmExportError(FULL[e.errno], where=folder, fix="free some, or write elsewhere, and run again") from e


@contextlib.contextmanager
def made(folder: Path, what: str = "directory") -> Iterator[None]:
    """`folder` and those above it are there inside the block; after it, those that were made and are empty go again.

    Raises InputError when they cannot be made.
    """
    new: list[Path] = []
    try:
        try:
            new = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fix = "give another --out or --work-dir"
            raise InputError(f"the {what} cannot be made ({e.strerror})", where=folder, fix=fix) from e
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it: that one and those above it stay
            for place in new:
                place.rmdir()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, which takes no room, or a copy on another file system; a symbolic link stays one."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.exists())
