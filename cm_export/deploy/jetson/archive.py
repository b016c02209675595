"""A directory as one .tar.gz whose bytes depend only on its contents and its name; written whole or not at all.

    folder/b, folder/a.sh  ->  name/SHA256SUMS, name/a.sh (0755), name/b (0644)      sorted, owner 0, one fixed time

Files are streamed: a model of any size needs a few megabytes of memory.
"""

import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ...base import atomic, disk
from ...base.errors import InputError
from ...base.hashes import file_sha256
from ...base.links import behind_links

SUMS = "SHA256SUMS"
SUFFIX = ".tar.gz"
_TIME = 315532800  # 1980-01-01, the oldest that no unpacker complains about
_STORED = ".safetensors"  # not compressed: weights would shrink by some 8 %, and 3 GB of them would take minutes


def check_out(out: Path) -> str:
    """The name within the archive. Raises InputError unless `out` can become one."""
    atomic.check_name(out)
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise InputError("is not the name of an archive", where=out, fix=f"let --out end in {SUFFIX}")
    if out.is_dir():
        raise InputError("is a directory", where=out, fix="give another --out")
    if out.exists() and not out.is_file():
        raise InputError("is not a regular file", where=out, fix="give another --out")
    if not out.parent.is_dir():
        raise InputError(f"no directory {out.parent}", where=out, fix="make it, or give another --out")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent} is not writable", where=out, fix="give another --out")
    return out.name.removesuffix(SUFFIX)


def files_of(folder: Path) -> list[str]:
    """Names of all files below `folder`, sorted. Raises InputError for a link or anything that is no plain file."""
    out = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError("is neither a plain file nor a directory", where=path, fix="report this")
        if path.is_file():
            out.append(path.relative_to(folder).as_posix())
    return sorted(out)


def write_sums(folder: Path, known: dict[str, str] | None = None) -> None:
    """Put SHA256SUMS of every other file into `folder`; `known`: hashes that need not be computed again."""
    names = [n for n in files_of(folder) if n != SUMS]
    lines = [f"{(known or {}).get(n) or file_sha256(folder / n)}  {n}\n" for n in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def write(folder: Path, out: Path, progress: Callable[..., None] = lambda *_: None) -> int:
    """`folder` as the archive `out`; returns its size in bytes. Raises InputError when it cannot be written."""
    name, names = check_out(out), files_of(folder)
    target = behind_links(out)
    part = target.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with disk.writing(target.parent), open(part, "wb") as raw:
            members = _Members(raw)
            # The stub asks for read and seek as well; writing needs neither.
            with tarfile.open(fileobj=members, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for i, file in enumerate(names):
                    progress("write the archive", i, len(names))
                    members.use(0 if file.endswith(_STORED) else 6)
                    _add(tar, folder / file, f"{name}/{file}")
                members.use(6)
            members.close()
            raw.flush()
            os.fsync(raw.fileno())
        size = part.stat().st_size
        part.replace(target)
        return size
    except PermissionError as e:
        raise InputError(f"cannot be written ({e.strerror})", where=out, fix="give another --out") from e
    finally:
        part.unlink(missing_ok=True)


class _Members:
    """gzip members one after the other, each with its own level; every unpacker reads them as one stream."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._level, self._size = raw, 6, 0
        self._member = self._open()

    def _open(self) -> gzip.GzipFile:
        # filename="" and mtime=0: a gzip header names neither the file nor the hour.
        return gzip.GzipFile("", "wb", self._level, self._raw, mtime=0)

    def use(self, level: int) -> None:
        if level != self._level:
            self._member.close()
            self._level = level
            self._member = self._open()

    def write(self, data: bytes) -> int:
        self._size += len(data)
        return self._member.write(data)

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        self._member.close()


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = path.stat().st_size, _TIME
    entry.mode = 0o755 if path.suffix == ".sh" else 0o644
    with open(path, "rb") as f:
        tar.addfile(entry, f)
