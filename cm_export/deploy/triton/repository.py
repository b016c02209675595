"""A bundle becomes a model repository for Triton: every graph as a model, `vlm` that answers, all on one copy of the weights.

model_repository/
  README.md, Dockerfile, requirements.txt, alive.py, cm-export.json   how to run it, and what was written
  vlm/config.pbtxt, vlm/1/model.py, vlm/1/cm_export/*          the Python model, and the package that it runs
  vlm/1/bundle/*                                               the bundle: second names of its files where links work, else copies
  vision/config.pbtxt, vision/1/model.plan (or model.onnx)     further names of files of that bundle; prefill, decode, ...

It is put together in a folder beside its place, where it appears, or replaces an older one, in one step.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from ... import __version__
from ...base import atomic, disk
from ...base.errors import CmExportError, InputError
from ...base.json_file import read_object
from ...base.links import behind_links
from ...bundle.bundle import MANIFEST, Bundle
from ...families import Arrays
from ...host.loaded import LoadedBundle
from ...serving.triton_settings import Settings
from ...serving.warm_up import largest
from . import config, fit, pages, runtime, warm_up

RECORD, FORMAT = "cm-export.json", 1
Step = Callable[..., None]


def deploy(
    path: Path, out: Path, settings: Settings, backend: str | None = None, progress: Step = lambda *_: None
) -> dict[str, Any]:
    """Write the repository; returns what it is. Raises InputError, BundleError, CmExportError.

    `backend`: what `vlm` runs on; None: what the bundle was built for. With settings.warm_up_pixels 0 the largest picture
    is found out.
    """
    out = Path(os.path.abspath(out))
    check_out(out)
    progress("open the bundle")
    bundle = Bundle(path)
    plan = fit.plan(bundle, backend, settings.execution)
    fit.check_shares(bundle, settings.neuron_share, settings.token_share)
    progress("verify the bundle's weights")
    bundle.wait_verified()
    runner = LoadedBundle(bundle, threads=1, backend=config.ONNXRUNTIME)  # no session is made here
    _ = runner.chat  # raises where the checkpoint had no tokenizer: nothing could be asked
    picture = None
    if settings.warm_up_pixels == 0 and bundle.tower is not None:
        progress("find the largest picture")
        side, picture = largest(runner, bundle.recipe.engine)
        settings = replace(settings, warm_up_pixels=side)
    settings = replace(settings, backend=plan.backend)
    feeds = {} if settings.warm_up_pixels < 0 else warm_up.feeds(runner, picture)
    with _replacing(out) as folder, disk.writing(out.parent):
        progress("link the bundle")
        copied = _bundle(bundle, folder / pages.INSIDE)
        progress("write the models")
        runtime.copy(folder / "vlm" / "1")
        for file, text in pages.files(bundle, out.name, plan, settings).items():
            (folder / file).write_text(text, encoding="utf-8")
        for name, described in plan.graphs.items():
            _graph(folder, name, described, plan, feeds.get(name))
        about = {**plan.to_dict(), "settings": asdict(settings)}
        record = {"format": FORMAT, "tool": {"name": "cm-export", "version": __version__}, "seal": bundle.seal, **about}
        record["files"] = [*_files(folder), RECORD]
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return {"path": str(out), "bytes": _size(out), "copied_bytes": copied, **about}


def _bundle(bundle: Bundle, folder: Path) -> int:
    """The bundle's own files, by a second name or copied; returns how many bytes were copied."""
    folder.mkdir(parents=True)
    sources = {name: behind_links(bundle.path / name) for name in (MANIFEST, *bundle.manifest["files"])}
    elsewhere = [s.stat().st_size for s in sources.values() if s.stat().st_dev != folder.stat().st_dev]
    disk.require(disk.Need(folder, sum(elsewhere), "--out"))
    copied = 0
    for name, source in sources.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.link_or_copy(source, target)
        copied += 0 if source.samefile(target) else target.stat().st_size
    return copied


def _graph(folder: Path, name: str, described: Mapping[str, Any], plan: fit.Plan, feeds: Arrays | None) -> None:
    """One graph as a model of its own."""
    model = folder / name
    (model / "1").mkdir(parents=True)
    for file, inside in plan.files(name).items():
        disk.link_or_copy(folder / pages.INSIDE / inside, model / "1" / file)
    samples = [] if feeds is None else [warm_up.write(model, described, feeds)]
    text = config.graph(name, described, plan.how, samples)
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- its place
def check_out(out: Path) -> None:
    """Raises InputError unless `out` is free, empty, or a repository in which everything is ours."""
    atomic.check_name(out)
    if not out.parent.is_dir():
        raise InputError(f"no directory {out.parent}", where=out, fix="make it, or give another --out")
    if out.is_symlink():
        raise InputError("is a symbolic link", where=out, fix=f"give --out {os.path.realpath(out)}")
    if out.exists() and not out.is_dir():
        raise InputError("exists and is no directory", where=out, fix="give another --out")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out.parent} is not writable", where=out, fix="give another --out")
    if os.path.ismount(out):
        raise InputError("is a mount point, which cannot be replaced in one step", where=out, fix="give --out below it")
    if out.is_dir() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise InputError("holds something that is no repository of ours", where=out, fix="give another --out")
        ours = set(read_object(out / RECORD, "give another --out").get("files", ()))
        foreign = [f for f in _files(out) if f not in ours]
        if foreign:
            fix = "move it elsewhere, or give another --out"
            raise InputError(f"holds {foreign[0]}, which `deploy` did not write", where=out, fix=fix)


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    What killed runs of the same `out` have left is removed first.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        folder.mkdir()
    except OSError as e:
        raise InputError(f"cannot write beside it ({e.strerror})", where=out, fix="give another --out") from e
    try:
        yield folder
        if out.exists() and not atomic.exchange(folder, out):
            out.rename(old)
        if not out.exists():
            folder.rename(out)
    except OSError as e:
        if e.errno in disk.FULL:
            raise
        raise CmExportError(f"cannot be written ({e.strerror})", where=out, fix="check the disk and the path") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _size(folder: Path) -> int:
    """Bytes on the disk, a file with several names counted once."""
    found = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(found.values())
