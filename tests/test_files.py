"""Files and file systems: links, locks, full disks, and what the user has put where a build writes."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ONE_THREAD, cm_export, here, take_stages
from random_models import random_checkpoint, random_config
from traces import traced_once

from cm_export.base import atomic, disk, lock
from cm_export.base.errors import BundleError, CmExportError, InputError
from cm_export.build import build as builds
from cm_export.build.stages import Stages
from cm_export.bundle import directory
from cm_export.bundle.bundle import MANIFEST, Bundle, read_manifest, write_manifest
from cm_export.deploy.jetson import archive
from cm_export.host.images import open_image
from cm_export.recipe.recipe import Recipe
from cm_export.source import checkpoint

CUT = Recipe().replace(tokens__prune_layer=1)


@pytest.fixture
def place(bare_bundle, tmp_path) -> Path:
    """A finished bundle with its stages, in a folder of its own."""
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(bare_bundle.with_name(name), tmp_path / name)
    return tmp_path / "x.plan"


@pytest.fixture
def small_disk(tmp_path) -> Iterator:
    """size -> a directory that is a file system of that size; skipped where none may be mounted."""
    mounted = []

    def mount(size: str) -> Path:
        (folder := tmp_path / f"disk{len(mounted)}").mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        mounted.append(folder)
        return folder

    if not shutil.which("mount"):
        pytest.skip("no mount here")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)  # weights may still be mapped


def small(folder: Path, text: str) -> None:
    """The least that write_manifest seals."""
    (folder / "a.txt").write_text(text)
    write_manifest(folder, {"text": text})


def bundle_at(out: Path, text: str = "old") -> Path:
    with directory.assemble(out) as folder:
        small(folder, text)
    return out


def linked(folder: Path, target: Path) -> None:
    """`folder` as a copy of `target` in which every file is a link to the file there."""
    for file in (p for p in target.rglob("*") if p.is_file()):
        link = folder / file.relative_to(target)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)


# ---------------------------------------------------------------- links: checkpoints


def test_a_checkpoint_of_links_as_in_a_volume_or_a_store_is_read(bare_checkpoint, tmp_path):
    linked(tmp_path / "..2026_01_01", bare_checkpoint)  # a Kubernetes volume: links through one that is swapped
    (tmp_path / "..data").symlink_to("..2026_01_01")
    (tmp_path / "model").mkdir()
    for file in bare_checkpoint.iterdir():
        (tmp_path / "model" / file.name).symlink_to(f"../..data/{file.name}")
    (tmp_path / "link").symlink_to("model")
    real = checkpoint.resolve(str(bare_checkpoint))
    for name in ("model", "link"):
        assert checkpoint.resolve(str(tmp_path / name)).files == real.files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_a_checkpoint_that_links_to_nothing_is_named_as_such(bare_checkpoint, tmp_path, name):
    folder = shutil.copytree(bare_checkpoint, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/gone")
    with pytest.raises(InputError, match=rf"{name}: is a symbolic link to \.\./\.\./blobs/gone, which is not there"):
        checkpoint.resolve(str(folder))
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(InputError, match="link: is a symbolic link to gone, which is not there"):
        checkpoint.locate(str(tmp_path / "link"))


def test_a_picture_that_links_to_nothing_is_named_as_such(tmp_path):
    (tmp_path / "x.png").symlink_to("..data/x.png")
    with pytest.raises(InputError, match=r"x\.png: is a symbolic link to \.\.data/x\.png, which is not there"):
        open_image(tmp_path / "x.png")


# ---------------------------------------------------------------- links: bundles


def test_a_bundle_in_a_hub_cache_opens_and_runs(bare_bundle, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(p for p in bare_bundle.rglob("*") if p.is_file())):
        shutil.copyfile(file, blobs / f"{i}")
        link = snapshot / file.relative_to(bare_bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{i}", link.parent))
    Bundle(snapshot).wait_verified()
    done = cm_export("bench", snapshot, "--image-tokens", "16", "--json", env=ONE_THREAD)
    assert done.returncode == 0, done.stderr


def test_a_bundle_whose_links_stay_inside_it_opens_and_others_are_named_with_the_command_that_helps(place, tmp_path):
    (place / "..data").mkdir()
    for file in [p for p in place.iterdir() if p.is_file()]:
        file.rename(place / "..data" / file.name)
        file.symlink_to(f"..data/{file.name}")
    Bundle(place).wait_verified()
    shutil.copytree(place, tmp_path / "store", symlinks=True)
    linked(tmp_path / "profile", tmp_path / "store")
    with pytest.raises(BundleError, match=r"is behind a symbolic link to .*store.*which is not inside it; .*cp -rL"):
        Bundle(tmp_path / "profile")
    shutil.copytree(tmp_path / "profile", tmp_path / "copy")  # as cp -rL
    Bundle(tmp_path / "copy").wait_verified()
    (place / "..data" / "decode.onnx").unlink()
    with pytest.raises(
        BundleError, match=r"decode\.onnx: is a symbolic link to \.\.data/decode\.onnx, which is not there"
    ):
        Bundle(place)


def about(place, built) -> list[str]:
    """The notes of a build on the directory that it wrote; others are on the checkpoint."""
    return [note for note in built["notes"] if str(place) in note]


def test_a_bundle_of_links_is_replaced_by_one_of_files(bare_checkpoint, place):
    (place.parent / "store").mkdir()
    for file in [p for p in place.iterdir() if p.is_file()]:
        file.rename(place.parent / "store" / file.name)
        file.symlink_to(f"../store/{file.name}")
    built = builds.build(str(bare_checkpoint), place, CUT.replace(neurons__share=0.3))
    assert built["stages_reused"] == ["weights", "trace"] and about(place, built) == []
    assert not [p for p in place.rglob("*") if p.is_symlink()] and (place / "weights.safetensors").stat().st_nlink == 1
    assert len(os.listdir(place.parent / "store")) == 7
    Bundle(place).wait_verified()


def test_an_out_that_is_a_link_stays_one_and_what_it_leads_to_is_built(bare_bundle, bare_checkpoint, tmp_path):
    (tmp_path / "large").mkdir()
    take_stages(bare_bundle, tmp_path / "large" / "x.plan")
    (tmp_path / "x.plan").symlink_to("large/x.plan")  # there is nothing behind it yet
    first = builds.build(str(bare_checkpoint), tmp_path / "x.plan", CUT)
    again = builds.build(str(bare_checkpoint), tmp_path / "x.plan", CUT)
    assert first["path"] == again["path"] == str(tmp_path / "large" / "x.plan")
    assert again["stages_reused"] == ["weights", "trace", "graphs", "gates"]
    assert os.readlink(tmp_path / "x.plan") == "large/x.plan" and os.listdir(tmp_path) != []
    Bundle(tmp_path / "x.plan").wait_verified()
    assert sorted(os.listdir(tmp_path / "large")) == [".x.plan.stages", "x.plan"]


def test_an_out_that_links_to_a_missing_directory_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "x.plan").symlink_to("usb/x.plan")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x.plan", "loop"):
        with pytest.raises(InputError, match="is a symbolic link to"):
            directory.given(tmp_path / name)
    assert not (tmp_path / "usb").exists()


# ---------------------------------------------------------------- links and devices: single files


def test_a_file_that_is_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "report.json").symlink_to("far/report.json")
    for text in ("first", "second"):
        atomic.write(tmp_path / "report.json", text)
        assert (tmp_path / "far" / "report.json").read_text() == text
    assert (tmp_path / "report.json").is_symlink() and os.listdir(tmp_path / "far") == ["report.json"]


def test_an_archive_and_a_drawing_follow_a_link_too(tmp_path):
    import numpy as np
    from PIL import Image
    from test_images import draw_overlay

    (tmp_path / "far").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    for name in ("x.tar.gz", "x.png"):
        (tmp_path / name).symlink_to(f"far/{name}")
    archive.write(tmp_path / "in", tmp_path / "x.tar.gz")
    draw_overlay(Image.new("RGB", (64, 64)), np.ones((2, 2), bool), tmp_path / "x.png")
    for name in ("x.tar.gz", "x.png"):
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / name).stat().st_size > 0


def test_a_device_and_a_pipe_are_written_into_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    atomic.write(tmp_path / "pipe", "through it")
    reader.join(30)
    assert got == ["through it"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(CmExportError, match="/dev: no space left on the disk"):
        atomic.write(Path("/dev/full"), "x" * 100_000)
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


# ---------------------------------------------------------------- locks


def test_two_builds_of_one_out_with_two_work_directories_exclude_each_other(tmp_path, monkeypatch):
    inside, go_on, outcome = threading.Event(), threading.Event(), []

    def slow(*_args):
        inside.set()
        go_on.wait(30)
        return {"ok": True, "notes": []}

    monkeypatch.setattr(builds, "_run", slow)
    (tmp_path / "link.plan").symlink_to("x.plan")

    def one() -> None:
        outcome.append(builds.build("demo", tmp_path / "x.plan", Recipe(), work_dir=tmp_path / "a"))

    thread = threading.Thread(target=one)
    thread.start()
    assert inside.wait(30)
    for name in ("x.plan", "link.plan"):
        with pytest.raises(InputError, match=r"x\.plan: another build of this bundle is running"):
            builds.build("demo", tmp_path / name, Recipe(), work_dir=tmp_path / "b")
    with pytest.raises(InputError, match=r"a: another build of this bundle is running"):
        builds.build("demo", tmp_path / "y.plan", Recipe(), work_dir=tmp_path / "a")
    go_on.set()
    thread.join()
    assert outcome[0]["ok"] and sorted(os.listdir(tmp_path)) == ["link.plan"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_told_and_still_keeps_out_a_second_build(tmp_path, monkeypatch, code):
    real = fcntl.flock

    def flock(file, how):
        if os.path.realpath(f"/proc/self/fd/{file.fileno()}").startswith(str(tmp_path / "lustre")):
            raise OSError(code, os.strerror(code))
        real(file, how)

    (tmp_path / "lustre").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    busy = InputError("another build")
    with lock.alone(tmp_path / "lustre" / "lock", busy) as note:
        assert "offers no locks" in note and os.strerror(code) in note
        with pytest.raises(InputError, match="another build"), lock.alone(tmp_path / "lustre" / "lock", busy):
            pass
        with lock.alone(tmp_path / "lustre" / "other", busy), lock.alone(tmp_path / "temporary" / "lock", busy) as none:
            assert none is None
    with lock.alone(tmp_path / "lustre" / "lock", busy):
        pass


def test_a_lock_that_fails_for_another_reason_is_not_called_another_build(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(InputError, match=r"cannot be locked \(Input/output error\)"),
        lock.alone(tmp_path / "l", InputError("busy")),
    ):
        pass
    with pytest.raises(InputError, match="cannot be written"), lock.alone(Path("/proc/x"), InputError("busy")):
        pass


def test_of_processes_that_take_a_passing_lock_in_turns_only_one_holds_it(tmp_path):
    """The file goes when its holder ends; who opened it before must not take the name's lock from the next one."""
    code = f"""if True:
        import os, sys, time
        from pathlib import Path
        from cm_export.base.errors import InputError
        from cm_export.base.lock import alone
        got, end = 0, time.time() + 1.5
        while time.time() < end:
            try:
                with alone(Path({str(tmp_path / "l")!r}), InputError("busy"), passing=True):
                    os.mkdir({str(tmp_path / "held")!r})
                    os.rmdir({str(tmp_path / "held")!r})
                    got += 1
            except InputError:
                pass
        print(got)
        """
    each = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [int(p.communicate(timeout=60)[0]) for p in each]
    assert all(p.returncode == 0 for p in each) and sum(counts) > 50 and os.listdir(tmp_path) == []


# ---------------------------------------------------------------- full disks


def full_disk(*_args: object, **_more: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_room_is_asked_for_by_file_system_and_all_that_goes_there_counts(tmp_path, monkeypatch):
    free = {1: 100, 2: 50}
    where = lambda p: 2 if "out" in str(p) else 1  # noqa: E731
    real = os.stat
    monkeypatch.setattr(
        disk.os, "stat", lambda p, **k: os.stat_result((*real(p, **k)[:2], where(p), *real(p, **k)[3:]))
    )
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(0, 0, free[where(p)]))
    (tmp_path / "out").mkdir()
    work, out, more = tmp_path / "work" / "deep", tmp_path / "out", tmp_path / "more"
    disk.require(disk.Need(work, 100, "--work-dir"), disk.Need(out, 50, "--out"))
    with pytest.raises(InputError, match=r"out: needs about 51 B, 50 B are free; .* --out on a larger disk"):
        disk.require(disk.Need(work, 100, "--work-dir"), disk.Need(out, 51, "--out"))
    with pytest.raises(InputError, match="needs about 101 B, 100 B are free"):
        disk.require(disk.Need(work, 100, "--work-dir"), disk.Need(more, 1, "--x"))


def test_a_build_looks_where_its_bytes_will_go(bare_checkpoint, place, small_disk, tmp_path):
    model = str(bare_checkpoint)
    with pytest.raises(InputError, match=r"disk0: needs about 55\d\.\d kB, .* a --out on a larger disk"):
        builds.build(model, small_disk("300k") / "x.plan", CUT, work_dir=tmp_path / "work")
    with pytest.raises(InputError, match=r"disk1/w: needs about 55\d\.\d kB, .* a --work-dir on a larger disk"):
        builds.build(model, tmp_path / "y.plan", CUT, work_dir=small_disk("300k") / "w")
    assert sorted(os.listdir(tmp_path)) == [".x.plan.stages", "disk0", "disk1", "x.plan"]
    assert os.listdir(tmp_path / "disk0") == os.listdir(tmp_path / "disk1") == []
    full = small_disk("1200k")  # weights once, and not twice
    for name in ("x.plan", ".x.plan.stages"):
        shutil.copytree(place.with_name(name), full / name)
    built = builds.build(model, full / "x.plan", CUT.replace(neurons__share=0.3))
    assert built["stages_reused"] == ["weights", "trace"] and shutil.disk_usage(full).free < 500_000


def test_a_disk_that_is_full_is_named_wherever_a_build_runs_out(bare_checkpoint, small_disk, tmp_path):
    model, ends = str(bare_checkpoint), set()
    for size in ("560k", "672k"):
        disk_ = small_disk(size)
        with pytest.raises(CmExportError, match=rf"{disk_}\S*: no space left on the disk"), traced_once():
            builds.build(model, disk_ / "x.plan", CUT, progress=lambda what, *_: ends.add(what))
        assert not (disk_ / "x.plan").exists() and not list(disk_.rglob("*.tmp"))
    assert {"load the checkpoint", "trace the graphs"} <= ends


def test_a_full_disk_while_a_bundle_is_assembled_leaves_the_old_one(bare_checkpoint, place, monkeypatch):
    before = read_manifest(place)["seal"] if "seal" in read_manifest(place) else read_manifest(place)
    copy, here = shutil.copyfile, str(place.parent)
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: (full_disk if str(b).startswith(here) else copy)(a, b))
    with pytest.raises(CmExportError, match=rf"{place.parent}: no space left on the disk"):
        builds.build(str(bare_checkpoint), place, CUT.replace(neurons__share=0.3))
    assert read_manifest(place) == before and sorted(os.listdir(place.parent)) == [".x.plan.stages", "x.plan"]


def test_a_limit_on_the_size_of_a_file_is_named_like_a_full_disk(bare_checkpoint, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        done = here("build", "--model", bare_checkpoint, "--out", tmp_path / "x.plan", "--prune-layer", "1", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1 and "this is a bug" not in done.stderr
    assert f"{tmp_path}/.x.plan.stages: a file grew beyond" in done.stderr


@pytest.mark.parametrize("what", ["file", "journal", "archive", "predictor"])
def test_whatever_else_is_written_names_the_directory_of_a_full_disk(
    what, bare_bundle, tmp_path, monkeypatch, small_disk
):
    folder = small_disk("8k")
    with contextlib.suppress(OSError):
        (folder / "filler").write_bytes(bytes(100_000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(os.urandom(100_000))

    def write() -> None:
        from cm_export.evals.journal import Journal

        if what == "file":
            atomic.write(folder / "x", "text")
        elif what == "journal":
            monkeypatch.setattr(Path, "replace", lambda self, target: target.touch())
            with Journal(folder / "x.json", "run") as journal:
                journal.add("row", 1, text="x" * 100_000)
        elif what == "archive":
            archive.write(tmp_path / "in", folder / "x.tar.gz")
        else:
            monkeypatch.setattr(disk.tempfile, "tempdir", str(folder))
            Bundle(bare_bundle).predictor  # noqa: B018

    with pytest.raises(CmExportError, match=rf"{folder}.*(no space left on the disk|needs about)"):
        write()


# ---------------------------------------------------------------- what is the user's


def test_a_rebuild_keeps_what_the_user_has_put_into_the_bundle_and_says_so(bare_checkpoint, place):
    (place / "notes.txt").write_text("mine")
    (place / "results" / "deep").mkdir(parents=True)
    (place / "results" / "deep" / "r.json").write_text("1")
    (place / "empty").mkdir()
    (place / "processor" / "my_tokens.txt").write_text("mine")
    (place / "link").symlink_to("/nowhere")
    (place / "notes.txt").chmod(0o640)
    os.utime(place / "notes.txt", (1, 1))
    for exchange in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not exchange:
                patch.setattr(directory, "_exchange", lambda *_: False)
            built = builds.build(str(bare_checkpoint), place, CUT.replace(neurons__share=0.3 if exchange else 0.4))
        assert about(place, built) == [f"empty, link, notes.txt and 2 more in {place} are kept"]
        assert (place / "notes.txt").read_text() == "mine" and (place / "notes.txt").stat().st_mtime == 1
        assert (place / "notes.txt").stat().st_mode & 0o777 == 0o640 and (place / "notes.txt").stat().st_nlink == 1
        assert (place / "results" / "deep" / "r.json").read_text() == "1" and (place / "empty").is_dir()
        assert (place / "processor" / "my_tokens.txt").exists() and os.readlink(place / "link") == "/nowhere"
        assert not {"notes.txt", "link", "processor/my_tokens.txt"} & set(read_manifest(place)["files"])
        Bundle(place).wait_verified()
        assert sorted(os.listdir(place.parent)) == [".x.plan.stages", "x.plan"]


def test_a_file_in_a_folder_that_the_new_bundle_does_not_have_is_kept(tmp_path):
    with directory.assemble(out := tmp_path / "x.plan") as folder:
        (folder / "engines").mkdir()
        (folder / "engines" / "decode.plan").write_text("old")
        small(folder, "old")
    (out / "engines" / "timings.json").write_text("mine")
    bundle_at(out, "new")
    assert os.listdir(out / "engines") == ["timings.json"] and read_manifest(out)["text"] == "new"


def test_a_bundle_keeps_the_mode_of_its_directory(tmp_path):
    bundle_at(out := tmp_path / "x.plan").chmod(0o700)
    assert bundle_at(out, "new").stat().st_mode & 0o777 == 0o700


def test_a_file_written_while_the_bundle_is_replaced_is_kept(tmp_path, monkeypatch):
    out, real = bundle_at(tmp_path / "x.plan"), directory._exchange

    def exchange(a: Path, b: Path) -> bool:
        (out / "late.json").write_text("mine")
        return real(a, b)

    monkeypatch.setattr(directory, "_exchange", exchange)
    bundle_at(out, "new")
    assert (out / "late.json").read_text() == "mine" and read_manifest(out)["text"] == "new"


def test_a_name_that_the_new_bundle_needs_is_refused_and_nothing_is_lost(tmp_path):
    out = bundle_at(tmp_path / "x.plan")
    (out / "turn.onnx").write_text("mine")
    with (
        pytest.raises(InputError, match=r"turn\.onnx is not of the bundle.*move turn\.onnx"),
        directory.assemble(out) as folder,
    ):
        (folder / "turn.onnx").write_text("new")
        small(folder, "new")
    assert (out / "turn.onnx").read_text() == "mine" and read_manifest(out)["text"] == "old"
    assert os.listdir(tmp_path) == ["x.plan"]


@pytest.mark.parametrize("damage", ["", "[", "{}"])
def test_of_a_bundle_whose_manifest_cannot_be_read_nothing_but_what_the_new_one_replaces_goes(place, tmp_path, damage):
    (place / "notes.txt").write_text("mine")
    (place / MANIFEST).write_text(damage)
    directory.check_out(place)
    bundle_at(place, "new")
    assert (place / "notes.txt").read_text() == "mine" and read_manifest(place)["text"] == "new"


def test_a_directory_with_a_manifest_of_something_else_is_not_taken_for_a_bundle(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(json.dumps({"name": "my app", "icons": []}))
    (tmp_path / "app" / "index.html").write_text("mine")
    with pytest.raises(InputError, match="holds something that is not a bundle"):
        directory.check_out(tmp_path / "app")


def test_a_mount_point_is_refused_before_any_work(small_disk):
    with pytest.raises(InputError, match=r"disk0: is a mount point.*--out .*disk0/NAME\.plan"):
        directory.check_out(small_disk("100k"))


def test_a_name_too_long_for_what_lies_beside_a_bundle_is_refused(tmp_path):
    for name in ("x" * 260, "x" * 250, "ü" * 125):
        with pytest.raises(InputError, match="give a shorter name"):
            directory.given(tmp_path / name)
    long = directory.given(tmp_path / ("x" * directory._LONGEST))
    bundle_at(long)
    Stages(long.with_name(f".{long.name}.stages"))
    with lock.alone(long.with_name(f".{long.name}.lock"), InputError("busy"), passing=True):
        directory.sweep(long)


def test_another_models_bundle_is_replaced_only_with_force(bare_checkpoint, place, tmp_path, monkeypatch):
    before = read_manifest(place)
    other = random_checkpoint(random_config(5), tmp_path / "other", 5)
    for work in (None, tmp_path / "work"):
        with pytest.raises(InputError, match=r"holds a bundle of another model, model; .*--force to replace it"):
            builds.build(str(other), place, CUT, work_dir=work)
    assert read_manifest(place) == before
    monkeypatch.setattr(builds, "_run", lambda *_: {"notes": []})
    told = builds.build(str(other), place, CUT, force=True)["notes"]
    assert told == [f"{place} was a bundle of model, and is replaced"]
    retrained = random_checkpoint(random_config(0), tmp_path / "again" / "model", seed=7)  # the same name
    told = builds.build(str(retrained), place, CUT)["notes"]
    assert told == [f"{place} was built from other weights of model, and is replaced"]
    assert builds.build(str(bare_checkpoint), place, CUT)["notes"] == []


def test_a_directory_of_the_users_is_no_place_for_stages(bare_checkpoint, tmp_path):
    (tmp_path / "mine" / "weights").mkdir(parents=True)
    (tmp_path / "mine" / "weights" / "model.bin").write_text("mine")
    (tmp_path / "mine" / "old.tmp").mkdir()
    with pytest.raises(
        InputError, match=r"mine: holds .*, which is no stage of a build; give a --work-dir that is new or empty"
    ):
        builds.build(str(bare_checkpoint), tmp_path / "x.plan", CUT, work_dir=tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine")) == ["old.tmp", "weights"] and not (tmp_path / "x.plan").exists()
    for work, out in (("mine", "mine/x.plan"), ("x.plan/stages", "x.plan"), ("x.plan", "x.plan")):
        with pytest.raises(InputError, match="would lie in each other"):
            builds.build(str(bare_checkpoint), tmp_path / out, CUT, work_dir=tmp_path / work)
    assert os.listdir(tmp_path) == ["mine"]


# ---------------------------------------------------------------- refused builds leave nothing


@pytest.mark.parametrize("wrong", ["recipe", "checkpoint", "stages"])
def test_a_refused_build_leaves_none_of_the_directories_that_it_made(bare_checkpoint, tmp_path, wrong):
    model, out, work = bare_checkpoint, tmp_path / "new" / "deep" / "x.plan", tmp_path / "w" / "deeper"
    if wrong == "checkpoint":
        shutil.copytree(bare_checkpoint, model := tmp_path / "m")
        (model / "model.safetensors").write_bytes(b"short")
    recipe = CUT.replace(tokens__prune_layer=99) if wrong == "recipe" else CUT
    if wrong == "stages":
        (tmp_path / "w").write_text("a file")
    with pytest.raises(InputError):
        builds.build(str(model), out, recipe, work_dir=work)
    assert sorted(os.listdir(tmp_path)) == {"recipe": [], "checkpoint": ["m"], "stages": ["w"]}[wrong]


def test_a_refused_build_takes_an_empty_folder_of_stages_that_a_killed_one_left(bare_checkpoint, tmp_path):
    (stages := tmp_path / ".x.plan.stages").mkdir()
    (stages / "lock").touch()
    with pytest.raises(InputError, match="prune_layer"):
        builds.build(str(bare_checkpoint), tmp_path / "x.plan", CUT.replace(tokens__prune_layer=99))
    assert os.listdir(tmp_path) == []
