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
from cm_export.source import checkpoint, directory
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


@pytest.mark.parametrize(
    ("alias", "folder"), [("demo", aliases.DEMO), ("scenes", aliases.SCENES), ("scenes-llava", aliases.SCENES_LLAVA)]
)
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
        ("qwen25-vl-3b", ("did you mean 'qwen2.5-vl-3b'?",)),
        ("qwen3vl-2b", ("did you mean 'qwen3-vl-2b'?",)),
        ("Qwen3-VL-4B", ("did you mean 'qwen3-vl-4b'?",)),
        ("qwen3-0.6", ("did you mean 'qwen3-0.6b'?",)),
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
        (_safetensors({"__metadata__": {"format": None}}), ("damaged", "__metadata__")),
        (_safetensors({"__metadata__": []}), ("damaged",)),
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


@pytest.mark.parametrize("alias", [name for name, alias in aliases.ALIASES.items() if alias.hub_id])
def test_an_alias_that_is_not_here_says_which_repository_and_commit_to_download(alias, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    meant = aliases.ALIASES[alias]
    _refused(alias, f"hf download {meant.hub_id} --revision {meant.revision} --local-dir DIR")


def test_a_cache_that_holds_a_configuration_alone_asks_the_hub_for_the_weights(cache):
    commit, blobs = cache
    (blobs.parent / "snapshots" / commit / "model.safetensors").unlink()
    _refused(f"owner/name@{commit}", "no model.safetensors")
    assert not directory.has_weights(blobs.parent / "snapshots" / commit)


# ---------------------------------------------------------------- what else lies in a directory


def _adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    _write(folder / "adapter_config.json", {"base_model_name_or_path": "owner/base", "peft_type": "LORA"})


def _half(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "abc.incomplete").write_bytes(b"half")


def _tensors(**tensors: np.ndarray):
    return lambda folder: save_file(tensors, folder / "model.safetensors")


def _eight_bits(folder: Path) -> None:
    header = {"w.weight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    (folder / "model.safetensors").write_bytes(_safetensors(header, b"00"))


def _inside(folder: Path) -> None:
    (folder / "checkpoint-9").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-9" / "config.json")


def _dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")


def _renamed(to: str):
    return lambda folder: (folder / "model.safetensors").rename(folder / to)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
LYING = {
    "an adapter without its base": (_adapter, "adapter of owner/base", "merge"),
    "an adapter beside full weights": (lambda f: _write(f / "adapter_config.json", {"r": 8}), "beside", "peft"),
    "an adapter's tensors": (_tensors(**{"layers.0.q_proj.lora_A.weight": np.ones(2, np.float32)}), "lora_A", "merge"),
    "eight-bit floats": (_eight_bits, "quantised", "w.weight", "F8_E4M3", "original float"),
    "whole numbers": (_tensors(**{"q_proj.weight": np.ones(2, np.int8)}), "quantised", "q_proj.weight", "I8"),
    "packed weights": (_tensors(**{"q_proj.qweight": np.ones(2, np.int32)}), "quantised", "qweight"),
    "scales": (_tensors(**{"q_proj.weight_scale_inv": np.ones(2, np.float32)}), "quantised", "weight_scale_inv"),
    "a half download": (_half, "no model.safetensors", "interrupted", "hf download"),
    "a link into nowhere": (_dangling, "model.safetensors", "link to ../../blobs/gone"),
    "other weights only": (_renamed("consolidated.safetensors"), "only consolidated.safetensors", "rename"),
    "a shard without an index": (_renamed("model-00001-of-00002.safetensors"), "without model.safetensors.index.json"),
    "GGUF": (_renamed("model-Q4.gguf"), "model-Q4.gguf", "GGUF is not read"),
    "the directory above": (_inside, "no config.json", "checkpoint-9"),
    "weights named by config.json": (
        lambda f: _write(f / "config.json", {"model_type": "qwen2_vl", "transformers_weights": "x.safetensors"}),
        "transformers_weights",
    ),
    "a byte-order mark": (
        lambda f: (f / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "qwen2_vl"}'),
        "config.json",
        "byte-order mark",
    ),
    "UTF-16": (lambda f: (f / "config.json").write_text("{}", encoding="utf-16"), "config.json", "UTF-16"),
    "an empty file": (lambda f: (f / "config.json").write_text(""), "config.json", "is empty"),
    "a page for config.json": (lambda f: _write(f / "config.json", "\n<!DOCTYPE html><html>"), "web page", "/resolve/"),
    "an error for config.json": (lambda f: _write(f / "config.json", "<?xml version='1.0'?><Error/>"), "web page"),
    "a page for the weights": (lambda f: _write(f / "model.safetensors", "<!doctype html>" * 9), "web page"),
    "a page for the tokenizer": (lambda f: _write(f / "tokenizer.json", "<html><body>"), "tokenizer.json", "web page"),
    "a pointer for config.json": (lambda f: _write(f / "config.json", LFS), "config.json", "git lfs pull"),
    "a pointer for the tokenizer": (lambda f: _write(f / "tokenizer.json", LFS), "tokenizer.json", "git lfs pull"),
    "a byte-order mark in the template": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ x }}"),
        "chat_template.jinja",
        "byte-order mark",
    ),
}


@pytest.mark.parametrize("name", LYING)
def test_what_lies_in_a_directory_in_the_place_of_a_model_is_called_what_it_is(folder, name):
    change, *words = LYING[name]
    change(folder)
    _refused(folder, *words)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_without_read_permission_is_called_that(folder, file, monkeypatch):
    opened = Path.open

    def refuse(self, *args, **kwargs):  # the superuser may read everything, so that chmod would not do
        if self.name == file:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    _refused(folder, file, "no permission", "owner and mode")


def test_only_files_that_belong_to_the_model_are_read(folder):
    for name in ("consolidated.safetensors", "training_args.json", "notes.txt", "model.fp16.safetensors", "odd.model"):
        (folder / name).write_bytes(b"not a word of this is looked at")
    _write(folder / "model.safetensors.index.json", "not read beside a whole file")
    (folder / "generation_config.json").write_text("{}")
    found = resolve(str(folder)).files
    assert set(found) == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
    }  # fmt: skip


def test_a_folder_of_the_hub_cache_points_to_its_snapshot(cache):
    commit, blobs = cache
    for inside in (blobs.parent, blobs.parent / "snapshots"):
        _refused(inside, "no config.json", "--model owner/name", f"snapshots/{commit}")
    _refused("models--owner--name", "--model owner/name")


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/owner/name", "https://huggingface.co/owner/name/", "huggingface.co/owner/name",
        "hf.co/owner/name", "https://hf.co/owner/name?library=transformers#usage", "hf://owner/name",
        "https://huggingface.co/owner/name/tree/main", "https://huggingface.co/owner/name/blob/main/config.json",
        "owner/name/", " owner/name ",
    ],
)  # fmt: skip
def test_an_address_of_the_hub_is_the_model_that_it_shows(cache, address):
    commit, _ = cache
    assert resolve(address).revision == commit
    wanted = "main" if "/main" in address else None
    assert checkpoint.locate(address) == ("owner/name", wanted)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("https://huggingface.co/datasets/owner/name", "no address of a model"),
        ("https://huggingface.co/models", "no address of a model"),
        ("https://example.org/owner/name", "addresses of other places"),
        ("s3://bucket/model", "addresses of other places"),
    ],
)
def test_an_address_of_anything_else_is_refused(address, word):
    _refused(address, word)


def test_a_revision_of_an_address_and_another_one_disagree():
    _refused("https://huggingface.co/owner/name/tree/main", "disagree", revision="v2")


def test_a_folder_that_shares_its_name_with_something_else_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert "the folder demo here is not read" in resolve("demo").notes[0]
    (tmp_path / "owner").mkdir()
    folder.rename(tmp_path / "owner" / "name")
    assert "not the model owner/name of the hub" in resolve("owner/name").notes[0]
    assert resolve("./owner/name").notes == ()


def test_checkpoints_are_read_without_torch(folder):
    code = f"import sys, cm_export.source.checkpoint as c; c.resolve({str(folder)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
