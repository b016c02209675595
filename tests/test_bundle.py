"""A bundle: every kind of damage is refused in one line that names the file; writing is all or nothing."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cm_export.base.errors import BundleError, CmExportError, InputError
from cm_export.base.hashes import file_sha256, key_of
from cm_export.build import sources
from cm_export.build.stages import Stages
from cm_export.bundle import bundle as bundles
from cm_export.bundle.bundle import MANIFEST, WEIGHTS, Bundle, write_manifest
from cm_export.bundle.directory import assemble, check_out, sweep


@pytest.fixture
def bundle(demo_bundle, tmp_path) -> Path:
    """A bundle of its own for each test; the files are links to the shared ones, so tests replace and never rewrite."""
    shutil.copytree(demo_bundle, tmp_path / "x.plan", copy_function=os.link)
    return tmp_path / "x.plan"


def replace(file: Path, change: Callable[[bytes], bytes]) -> None:
    content = change(file.read_bytes())
    file.unlink()  # a hard link: writing into it would damage the shared bundle
    file.write_bytes(content)


def flipped(content: bytes, at: float = 0.5) -> bytes:
    i = min(int(len(content) * at), len(content) - 1)
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def edit(bundle: Path, change: Callable[[dict], object], seal: bool = True) -> None:
    """Change the manifest, and (as somebody would who knows how) seal it again."""

    def edited(content: bytes) -> bytes:
        manifest = json.loads(content)
        change(manifest)
        if seal:
            del manifest["seal"]
            manifest["seal"] = bundles._seal(manifest)
        return json.dumps(manifest).encode()

    replace(bundle / MANIFEST, edited)


def refused(path: Path, *words: str, error: type[CmExportError] = BundleError) -> str:
    with pytest.raises(error) as caught:
        Bundle(path).wait_verified()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------- damage


def test_an_untouched_bundle_opens_and_verifies(bundle):
    opened = Bundle(bundle)
    opened.wait_verified()
    assert opened.shape.layers >= 2 and len(opened.weights.tensors) > 10


def test_a_bundle_that_was_moved_opens(bundle):
    bundle.rename(bundle.with_name("elsewhere"))
    Bundle(bundle.with_name("elsewhere")).wait_verified()


FILES = (WEIGHTS, *(f"{g}.onnx" for g in bundles.GRAPHS), "vision.onnx", "processor/tokenizer.json")


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_and_the_file_named(bundle, name, at):
    replace(bundle / name, lambda content: flipped(content, at))
    refused(bundle, name.split("/")[-1], "build")


@pytest.mark.parametrize("at", [k / 40 for k in range(41)])
def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(bundle, at):
    replace(bundle / MANIFEST, lambda content: flipped(content, at))
    refused(bundle, MANIFEST)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_and_named(bundle, name, length):
    whole = (bundle / name).stat().st_size
    replace(bundle / name, lambda content: content[: min(length, whole - 1)])
    refused(bundle, name.split("/")[-1], f"the manifest says {whole}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_and_named(bundle, name):
    (bundle / name).unlink()
    refused(bundle, name.split("/")[-1], "missing")


def test_a_directory_in_the_place_of_a_file_is_refused(bundle):
    (bundle / "vision.onnx").unlink()
    (bundle / "vision.onnx").mkdir()
    refused(bundle, "vision.onnx")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 64,
        b"\x00" * 64,
        (20).to_bytes(8, "little") + b"this is no JSON text",
        (2).to_bytes(8, "little") + b"[]",
        (7).to_bytes(8, "little") + b'{"a":1}',
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,999999999999]}}'.ljust(70),
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}}'[:70],
        (80).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}}'.ljust(80),
        (80).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}'.ljust(80),
        (80).to_bytes(8, "little") + b'{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}'.ljust(80),
    ],
    ids=range(11),
)
def test_garbage_as_header_of_the_weights_is_refused_even_with_the_right_hash(bundle, header):
    replace(bundle / WEIGHTS, lambda content: header + content[len(header) :])
    refused(bundle, WEIGHTS)
    digest = file_sha256(bundle / WEIGHTS)
    edit(bundle, lambda m: m["files"][WEIGHTS].update(sha256=digest))
    refused(bundle, WEIGHTS, "unreadable weight file")


# ---------------------------------------------------------------- manifest


EDITS = {
    "recipe": lambda m: m["recipe"]["neurons"].update(share=0.9),
    "gate": lambda m: m["gates"][0].update(passed=False),
    "hash": lambda m: m["files"][WEIGHTS].update(sha256="0" * 64),
    "stop token": lambda m: m["model"]["config"].update(image_token_id=1),
    "added key": lambda m: m.update(note="hello"),
    "removed key": lambda m: m.pop("links"),
    "removed seal": lambda m: m.pop("seal"),
    "seal": lambda m: m.update(seal="0" * 64),
    "seal of another type": lambda m: m.update(seal=None),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_value_of_the_manifest_that_was_changed_by_hand_is_refused(bundle, name):
    edit(bundle, EDITS[name], seal=False)
    refused(bundle, MANIFEST, "manifest")


def test_layout_and_key_order_of_the_manifest_do_not_matter(bundle):
    replace(bundle / MANIFEST, lambda c: json.dumps(dict(reversed(json.loads(c).items()))).encode())
    Bundle(bundle).wait_verified()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(bundle, content):
    replace(bundle / MANIFEST, lambda _: content)
    refused(bundle, MANIFEST, "unreadable manifest")


@pytest.mark.parametrize("number", [0, 1, 99, "2", None])
def test_another_format_number_is_refused_and_both_are_told(bundle, number):
    edit(bundle, lambda m: m.update(format=number))
    refused(bundle, MANIFEST, f"bundle format {number}", f"reads {bundles.FORMAT}")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "processor/../../outside", "..\\outside", "..", "."])
def test_a_path_that_leads_out_of_the_bundle_is_refused_even_under_a_valid_seal(bundle, name):
    (bundle.parent / "outside").write_text("secret")
    entry = {"bytes": 6, "sha256": file_sha256(bundle.parent / "outside")}
    edit(bundle, lambda m: m["files"].update({name: entry}))
    refused(bundle, str(bundle))


@pytest.mark.parametrize("name", ["vision.onnx", "processor/tokenizer.json", WEIGHTS])
def test_a_link_in_the_place_of_a_file_is_refused(bundle, name):
    (bundle / name).rename(bundle.parent / "moved")
    (bundle / name).symlink_to(bundle.parent / "moved")
    refused(bundle, name, "not inside")


def test_a_linked_folder_inside_the_bundle_is_refused(bundle):
    (bundle / "processor").rename(bundle.parent / "processor")
    (bundle / "processor").symlink_to(bundle.parent / "processor")
    refused(bundle, "processor/", "not inside")


def test_a_link_two_folders_above_a_file_is_refused(bundle):
    (bundle.parent / "far" / "deep").mkdir(parents=True)
    (bundle.parent / "far" / "deep" / "f").write_text("secret")
    (bundle / "near").symlink_to(bundle.parent / "far")
    entry = {"bytes": 6, "sha256": file_sha256(bundle / "near" / "deep" / "f")}
    edit(bundle, lambda m: m["files"].update({"near/deep/f": entry}))
    refused(bundle, "near/deep/f", "not inside")


def test_a_link_to_a_bundle_opens(bundle):
    bundle.with_name("link.plan").symlink_to(bundle)
    Bundle(bundle.with_name("link.plan")).wait_verified()


@pytest.mark.parametrize("name", [WEIGHTS, "decode.onnx", "vision.onnx"])
def test_a_manifest_that_does_not_list_what_a_bundle_must_have_is_refused(bundle, name):
    edit(bundle, lambda m: m["files"].pop(name))
    refused(bundle, f"does not list {name}")


SHAPELESS = {
    "no files": lambda m: m.pop("files"),
    "files is a list": lambda m: m.update(files=[]),
    "entry is a number": lambda m: m["files"].update({"decode.onnx": 3}),
    "entry without bytes": lambda m: m["files"]["decode.onnx"].pop("bytes"),
    "hash is a number": lambda m: m["files"]["decode.onnx"].update(sha256=5),
    "no model": lambda m: m.pop("model"),
    "no config": lambda m: m["model"].pop("config"),
    "config without sizes": lambda m: m["model"].update(config={"text_config": {}, "vision_config": {}}),
    "unknown family": lambda m: m["model"].update(type="no_such"),
    "family is a list": lambda m: m["model"].update(type=[]),
    "NUL in a name": lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("name", SHAPELESS)
def test_a_sealed_manifest_without_what_is_needed_is_refused_in_one_line(bundle, name):
    edit(bundle, SHAPELESS[name])
    refused(bundle, error=CmExportError)


# ---------------------------------------------------------------- no bundle at all


def test_what_is_no_bundle_is_refused_and_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "none", "none: no such bundle", "cm-export build", error=InputError)
    refused(tmp_path / "empty", "empty: not a bundle", error=InputError)
    refused(tmp_path / "file", "file: not a bundle", error=InputError)


# ---------------------------------------------------------------- writing


def small(folder: Path, text: str) -> None:
    """The least that write_manifest seals."""
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text)
    write_manifest(folder, {"text": text})


def read(out: Path) -> str:
    manifest = bundles.read_manifest(out)
    for name, entry in manifest["files"].items():
        assert file_sha256(out / name) == entry["sha256"]
    assert {(out / n).read_text() for n in manifest["files"]} == {manifest["text"]}
    return manifest["text"]


def only(folder: Path, *names: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(names)


def test_a_finished_bundle_appears_and_replaces_the_old_one_with_all_its_files(tmp_path):
    out = tmp_path / "x.plan"
    for text in ("first", "second"):
        with assemble(out) as folder:
            if text == "first":
                (folder / "only-in-first").write_text("first")
            small(folder, text)
        assert read(out) == text
    assert not (out / "only-in-first").exists()
    assert out.stat().st_mode & 0o777 == 0o755
    only(tmp_path, "x.plan")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_the_old_bundle_or_nothing(tmp_path, error):
    out = tmp_path / "x.plan"
    for before in ((), ("x.plan",)):
        only(tmp_path, *before)
        with pytest.raises(error), assemble(out) as folder:
            small(folder, "half")
            raise error
        only(tmp_path, *before)
        if before:
            assert read(out) == "old"
        else:
            with assemble(out) as folder:
                small(folder, "old")


@pytest.mark.parametrize("exchange", [True, False], ids=["swapped in one step", "two renames"])
def test_killed_at_any_step_of_the_assembly_the_bundle_is_the_old_or_the_new_one(tmp_path, exchange):
    """A child process kills itself at the n-th call that changes the disk, for every n."""
    code = f"""if True:
        import os, signal, shutil, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from cm_export.bundle import directory as b
        from cm_export.bundle.bundle import write_manifest
        left = int(sys.argv[2])
        def counted(work):
            def call(*args, **kwargs):
                global left
                left -= 1
                if left == 0: os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **kwargs)
            return call
        for name in ("rename", "fsync", "unlink", "rmdir", "mkdir", "link"):
            setattr(os, name, counted(getattr(os, name)))
        b._exchange = counted(b._exchange) if {exchange} else lambda *_: False
        out = Path(sys.argv[1])
        b.sweep(out)
        with b.assemble(out) as folder:
            for name in ("a.txt", "c.txt"): (folder / name).write_text("new")
            write_manifest(folder, {{"text": "new"}})
        """
    out, killed, absent = tmp_path / "x.plan", 0, 0
    for n in range(1, 60):
        if not out.exists() or read(out) == "new":
            with assemble(out) as folder:
                small(folder, "old")
            (out / "results").mkdir(exist_ok=True)
            (out / "results" / "mine.txt").write_text("mine")
        done = subprocess.run(
            [sys.executable, "-c", code, str(out), str(n)], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        killed += 1
        if not out.exists():
            absent += 1
            sweep(out)
        assert read(out) in ("old", "new") and (out / "results" / "mine.txt").read_text() == "mine"
    assert read(out) == "new" and killed >= 6
    assert absent == (0 if exchange else 1)
    sweep(out)
    only(tmp_path, "x.plan")


def test_a_sweep_takes_leftovers_of_this_bundle_and_of_no_other(tmp_path):
    mine, others = [".a[1].plan.abcd_123.tmp", ".a[1].plan.old"], [".a[1].plan.more.abcd_123.tmp", ".a1.plan.old"]
    for name in [*mine, *others, ".a1.plan.abcd_123.tmp", "a[1].plan"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    sweep(tmp_path / "a[1].plan")
    only(tmp_path, *others, ".a1.plan.abcd_123.tmp", "a[1].plan")


def test_an_output_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match=name):
            check_out(tmp_path / name)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    check_out(tmp_path / "new" / "deeper" / "x.plan")


# ---------------------------------------------------------------- stages


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self):
        self.count = 0

    def __call__(self, folder: Path) -> dict:
        self.count += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "out.bin").write_text(f"result {self.count}")
        return {"answer": 40 + self.count}


@pytest.fixture
def work() -> Work:
    return Work()


def test_an_unchanged_stage_is_skipped_and_its_state_returned(tmp_path, work):
    first, again = Stages(tmp_path / "s"), Stages(tmp_path / "s")
    assert first.run("w", "key", work)[1]["answer"] == again.run("w", "key", work)[1]["answer"] == 41
    assert (work.count, first.reused, again.reused) == (1, [], ["w"])


def test_a_changed_key_redoes_the_stage(tmp_path, work):
    for key, count in (("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        folder, state = Stages(tmp_path / "s").run("w", key, work)
        assert (work.count, state["answer"]) == (count, 40 + count)
        assert (folder / "sub" / "out.bin").read_text() == f"result {count}"
    only(tmp_path / "s", "w")


def test_force_redoes_the_stage(tmp_path, work):
    Stages(tmp_path / "s").run("w", "key", work)
    forced = Stages(tmp_path / "s", force=True)
    forced.run("w", "key", work)
    assert (work.count, forced.reused) == (2, [])


@pytest.mark.parametrize("damage", ["flipped", "removed", "key removed", "key damaged", "key emptied"])
def test_a_damaged_stage_is_redone(tmp_path, work, damage):
    folder, _ = Stages(tmp_path / "s").run("w", "key", work)
    if damage == "flipped":
        (folder / "sub" / "out.bin").write_text("result X")
    elif damage == "removed":
        (folder / "sub" / "out.bin").unlink()
    elif damage == "key removed":
        (folder / "key.json").unlink()
    else:
        (folder / "key.json").write_text('{"key": "key"}' if damage == "key emptied" else "[")
    redone, _ = Stages(tmp_path / "s").run("w", "key", work)
    assert work.count == 2 and (redone / "sub" / "out.bin").read_text() == "result 2"


def test_a_stage_that_fails_leaves_the_finished_one_and_nothing_else(tmp_path, work):
    Stages(tmp_path / "s").run("w", "key", work)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Stages(tmp_path / "s").run("w", "other", fail)
    only(tmp_path / "s", "w")
    assert Stages(tmp_path / "s").run("w", "key", work)[1]["answer"] == 41


def test_a_key_depends_on_every_value_and_not_on_their_order():
    assert key_of(a=1, b=2) == key_of(b=2, a=1)
    assert len({key_of(a=1, b=2), key_of(a=1, b=3), key_of(a=1), key_of(a="1", b=2)}) == 4


@pytest.mark.parametrize("changed", ["build.steps.trace", "source.trace", "families.llama", "base.dims"])
def test_a_source_key_changes_with_any_file(changed, monkeypatch):
    module, file, content = "cm_export.build.steps.trace", sources.file_of(f"cm_export.{changed}"), sources.content
    before = sources.digest(module)
    monkeypatch.setattr(sources, "content", lambda f: content(f) + (b"#" if f == file else b""))
    assert before != sources.digest(module)


def test_the_second_of_two_builds_of_one_output_is_refused(tmp_path):
    with Stages(tmp_path / "s").lock():
        with pytest.raises(InputError, match="another build") as caught, Stages(tmp_path / "s").lock():
            pass
        assert str(tmp_path / "s") in str(caught.value)
    with Stages(tmp_path / "s").lock():
        pass  # free again


def test_two_builds_of_one_output_at_once_finish_one_and_refuse_one(tmp_path, monkeypatch):
    from cm_export.build import build as builds
    from cm_export.recipe.recipe import Recipe

    inside, go_on, outcome = threading.Event(), threading.Event(), []

    def slow(*_args):
        inside.set()
        go_on.wait(30)
        return {"ok": True, "notes": []}

    monkeypatch.setattr(builds, "_run", slow)

    def one() -> None:
        outcome.append(builds.build("demo", tmp_path / "x.plan", Recipe()))

    thread = threading.Thread(target=one)
    thread.start()
    assert inside.wait(30)
    half = tmp_path / ".x.plan.abcd_123.tmp"
    half.mkdir()  # what the first one is assembling
    with pytest.raises(InputError, match="another build"):
        builds.build("demo", tmp_path / "x.plan", Recipe())
    assert half.exists()
    go_on.set()
    thread.join()
    assert outcome[0]["ok"]


def test_the_stage_lock_sweeps_what_killed_stages_left(tmp_path):
    (tmp_path / "s" / "weights.x1.tmp" / "weights").mkdir(parents=True)
    with Stages(tmp_path / "s").lock():
        assert not list((tmp_path / "s").glob("*.tmp"))


def test_a_stage_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/x")):
        with pytest.raises(InputError, match="stages"):
            Stages(place)


def test_no_path_of_the_machine_is_in_a_bundle(bare_checkpoint, bare_bundle):
    for file in [*bare_bundle.glob("*.json"), *bare_bundle.glob("*.onnx")]:
        content = file.read_bytes()
        assert str(bare_checkpoint).encode() not in content and str(bare_bundle.parent).encode() not in content, file


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "prefill.onnx"])
def test_a_file_without_read_permission_is_called_that(bare_bundle, name, monkeypatch):
    # The superuser may read everything, so that chmod would not do.
    monkeypatch.setattr("cm_export.bundle.bundle.os.access", lambda path, _: Path(path).name != name)
    with pytest.raises(InputError, match=f"{name}: no permission to read it"):
        Bundle(bare_bundle)
