"""Which checkpoints are accepted, and that every refusal names the file and what was found."""

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cm_export.base.errors import InputError
from cm_export.recipe import aliases
from cm_export.source import checkpoint
from cm_export.source.checkpoint import resolve, verify_hashes

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest directory that is a Qwen2-VL checkpoint; its weights are written by the safetensors library."""
    path = tmp_path / "model"
    path.mkdir()
    _write(path / "config.json", {"model_type": "qwen2_vl"})
    _write(path / "tokenizer.json", {})
    _write(path / "preprocessor_config.json", {})
    save_file(TENSORS, path / "model.safetensors")
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    for number, name in enumerate(TENSORS, 1):
        save_file({name: TENSORS[name]}, folder / f"model-{number:05}-of-00002.safetensors")
    shards = {name: f"model-{number:05}-of-00002.safetensors" for number, name in enumerate(TENSORS, 1)}
    _write(folder / "model.safetensors.index.json", {"weight_map": shards})
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def _refused(folder: Path | str, *words: str, revision: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        resolve(str(folder), revision)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    return message


def test_a_directory_is_accepted_with_hashes_and_config(folder):
    found = resolve(str(folder))
    assert (found.path, found.source, found.revision, found.model_type) == (folder, str(folder), None, "qwen2_vl")
    assert found.files["model.safetensors"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert set(found.files) == {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    assert found.config == {"model_type": "qwen2_vl"}


@pytest.mark.parametrize(("alias", "folder"), [("demo", aliases.DEMO), ("scenes", aliases.SCENES)])
def test_an_alias_of_a_shipped_model_is_its_directory(alias, folder):
    assert resolve(alias).path == folder.resolve()


@pytest.mark.parametrize("file", ["tokenizer.json", "preprocessor_config.json"])
def test_tokenizer_and_picture_rules_may_be_absent(folder, file):
    (folder / file).unlink()
    assert file not in resolve(str(folder)).files


def test_a_sharded_directory_is_accepted(sharded):
    assert len([name for name in resolve(str(sharded)).files if name.endswith(".safetensors")]) == 2


def test_hub_aliases_are_pinned_to_commits():
    hub = [alias for alias in aliases.ALIASES.values() if alias.hub_id]
    assert hub and all(checkpoint.COMMIT.fullmatch(alias.revision) for alias in hub)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2vl", ("did you mean 'qwen2-vl'?",)),
        ("demmo", ("did you mean 'demo'?",)),
        ("", ("no model named",)),
        ("./nowhere", ("no such directory",)),
        ("a/b/c", ("no such directory",)),
        ("x" * 5000, ("no alias",)),
        ("demo@main", ("no revision",)),
    ],
)
def test_a_name_that_is_nothing_is_refused(name, words):
    _refused(name, *words)


def test_a_revision_of_a_directory_is_refused_because_it_would_do_nothing(folder):
    _refused(folder, "no revision 'main'", revision="main")


def test_two_revisions_that_disagree_are_refused():
    _refused("qwen2-vl@aaa", "disagree", revision="bbb")


def test_a_file_is_not_a_checkpoint(folder):
    _refused(folder / "model.safetensors", "is a file")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, ("no config.json",)),
        ("config.json", '{"model_type": ', ("config.json", "JSON")),
        ("config.json", "[1]", ("not a JSON object",)),
        ("config.json", "[" * 100_000, ("config.json",)),
        ("config.json", {}, ("no model_type", "supported: ")),
        ("config.json", {"model_type": "mistral"}, ("'mistral'", "supported: ")),
        ("config.json", {"model_type": ["qwen2_vl"]}, ("not supported",)),
        ("config.json", {"model_type": "qwen2_vl", "auto_map": {"AutoModel": "x.Y"}}, ("auto_map",)),
        ("config.json", {"model_type": "qwen2_vl", "text_config": {"auto_map": {"AutoModel": "x.Y"}}}, ("auto_map",)),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y"]}}, ("tokenizer_config.json", "auto_map")),
        ("config.json", {"model_type": "qwen2_vl", "quantization_config": {"bits": 4}}, ("quantised",)),
        ("config.json", {"model_type": "qwen2_vl", "text_config": {"quantization_config": {"b": 4}}}, ("quantised",)),
        ("model.safetensors", None, ("no model.safetensors",)),
    ],
)
def test_a_wrong_or_missing_file_is_refused(folder, file, content, words):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        _write(folder / file, content)
    _refused(folder, *words)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_checkpoint_of_pickles_is_refused(folder, pickle):
    (folder / "model.safetensors").rename(folder / pickle)
    _refused(folder, pickle, "only safetensors are read")


def test_a_truncated_file_is_refused_with_expected_and_found_bytes(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    _refused(folder, str(path), f"expected {len(whole)} bytes, found {len(whole) - 1}")


def test_every_cut_of_a_safetensors_file_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        _refused(folder, "model.safetensors")


def test_a_header_with_any_one_byte_changed_never_leaks_another_error(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        for byte in (0, ord("9"), ord('"'), ord("}"), 0xFF):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            with contextlib.suppress(InputError):
                resolve(str(folder))


def _safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", ("git-lfs pointer",)),
        (b"\xff" * 64, ("not a safetensors file",)),
        (b"\x00" * 64, ("not a safetensors file",)),
        (_safetensors(b"not json at all"), ("damaged",)),
        (_safetensors(b"\xff\xfe\xfd"), ("damaged",)),
        (_safetensors([1, 2]), ("damaged",)),
        (_safetensors({"t": 3}), ("damaged",)),
        (_safetensors(_tensor(dtype="Q4"), b"0" * 8), ("dtype Q4",)),
        (_safetensors(_tensor(shape=(-2,)), b"0" * 8), ("damaged",)),
        (_safetensors(_tensor(shape=(True, 2)), b"0" * 8), ("damaged",)),
        (_safetensors(_tensor(offsets=(0, 8, 8)), b"0" * 8), ("damaged",)),
        (_safetensors(_tensor(shape=(3,)), b"0" * 8), ("offsets",)),
        (_safetensors(_tensor(offsets=(4, 12)), b"0" * 12), ("offsets",)),
        (_safetensors(_tensor(), b"0" * 9), ("1 bytes after the last tensor",)),
    ],
)
def test_a_damaged_safetensors_file_is_refused(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    _refused(folder, "model.safetensors", *words)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    _refused(sharded, "missing model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x.safetensors", "pytorch_model.bin"]
)
def test_a_shard_outside_the_directory_is_refused(sharded, shard):
    index = sharded / "model.safetensors.index.json"
    _write(index, {"weight_map": {"a": shard}})
    _refused(sharded, index.name, repr(shard))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_weight_map_is_refused(sharded, index):
    _write(sharded / "model.safetensors.index.json", index)
    _refused(sharded, "weight_map")


def test_a_tensor_that_no_shard_holds_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    _write(index, {"weight_map": {**shards, "lost.weight": shards["a"]}})
    _refused(sharded, "lost.weight")


def test_a_listed_hash_that_differs_is_refused(folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    _write(folder / "SHA256SUMS", f"{digest.upper()} *model.safetensors\n{'0' * 64}  README.md\n")
    resolve(str(folder))
    _write(folder / "SHA256SUMS", f"{'0' * 64}  ./model.safetensors\n")
    _refused(folder, "model.safetensors", digest, "0" * 64, "SHA256SUMS")


@pytest.mark.parametrize(("text", "word"), [("nonsense", "line 1"), (f"{'0' * 64}  gone.json", "gone.json is listed")])
def test_a_hash_list_that_does_not_fit_is_refused(folder, text, word):
    _write(folder / "SHA256SUMS", text)
    _refused(folder, word)


def test_verify_hashes_names_the_file_that_differs(folder):
    found = resolve(str(folder))
    verify_hashes(found, found.files)
    with pytest.raises(InputError, match=r"config\.json"):
        verify_hashes(found, {"config.json": "0" * 64})


def test_notes_of_hf_download_give_the_commit_and_the_hash(folder):
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    commit, digest = "c" * 40, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    _write(notes / "model.safetensors.metadata", f"{commit}\n{digest}\n1700000000.0\n")
    _write(notes / "config.json.metadata", f"{commit}\n{'d' * 40}\n1700000000.0\n")  # a git blob id: not comparable
    assert resolve(str(folder)).revision == commit
    _write(notes / "model.safetensors.metadata", f"{commit}\n{'0' * 64}\n1700000000.0\n")
    _refused(folder, "model.safetensors", "the hub's record")


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """A hub cache that holds `folder` as owner/name at one commit, laid out as the hub client does it."""
    commit, home = "a1" * 20, tmp_path / "hub"
    snapshot = home / "models--owner--name" / "snapshots" / commit
    blobs = home / "models--owner--name" / "blobs"
    for path in (snapshot, blobs, home / "models--owner--name" / "refs"):
        path.mkdir(parents=True)
    (home / "models--owner--name" / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commit, blobs


def test_a_cached_model_is_used_without_network_and_its_commit_recorded(cache):
    commit, _ = cache
    for name in ("owner/name", f"owner/name@{commit}", "owner/name@main"):
        assert resolve(name).revision == commit


def test_a_cached_blob_that_was_changed_is_refused(cache):
    _, blobs = cache
    blob = next(b for b in blobs.iterdir() if b.read_bytes() == b"{}")
    blob.write_text("{ }")
    _refused("owner/name", "the hub's record")


def test_without_network_a_hub_id_fails_within_seconds_and_says_how_to_get_it(tmp_path):
    code = "from cm_export.source.checkpoint import resolve\ntry: resolve('qwen2-vl')\nexcept Exception as e: print(repr(e))"
    # A closed port stands for every missing hub; nothing leaves this machine.
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "no_proxy": "127.0.0.1"}
    env.pop("HF_HUB_OFFLINE", None)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - start < 15  # the hub client's own retries take more than 23 s
    assert "hf download Qwen/Qwen2-VL-2B-Instruct --revision 895c3a49" in done.stdout
    assert done.stdout.startswith("InputError") and done.stderr == ""


def test_checkpoints_are_read_without_torch(folder):
    code = f"import sys, cm_export.source.checkpoint as c; c.resolve({str(folder)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
