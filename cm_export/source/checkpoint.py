"""What `--model` means: an alias, a directory or a hub id becomes a verified local directory of safetensors.

    qwen2-vl                         alias, pinned to a commit
    owner/name[@revision]            Hugging Face hub, or its address: https://huggingface.co/owner/name/tree/main
    ./some/dir                       a directory with config.json and model.safetensors (or shards and their index)

Nothing is unpickled, no code of a checkpoint runs, and torch is not imported. What a directory may hold is in directory.py.
"""

import dataclasses
import math
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.by_name import nearest
from ..base.errors import InputError
from ..base.hashes import file_sha256
from ..base.json_file import read_object
from ..base.links import dead
from ..base.safetensors_file import damaged
from ..recipe.aliases import ALIASES
from . import adapter as adapters
from . import directory
from .adapter import Adapter

PATTERNS = ("*.json", "*.txt", "*.jinja", "*.safetensors", "*.model")  # lines of SHA256SUMS about a checkpoint
HUB_TIMEOUT = 5.0  # seconds for the first question; the hub client retries for half a minute when asked for files
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_ADDRESS = re.compile(r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?P<path>[^?#]*)(?:[?#].*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A directory that passed every check here; `files` maps each file that may be read to its sha256 (hex)."""

    path: Path
    source: str  # as given: alias, hub id or path
    revision: str | None  # commit on the hub, where it is known
    model_type: str
    files: dict[str, str]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()  # what is no error and yet may surprise
    adapter: Adapter | None = None  # to be merged into the weights

    @property
    def identity(self) -> dict[str, str]:
        """File -> sha256 of all that the weights of a bundle depend on."""
        return self.files | {
            f"adapter/{name}": digest for name, digest in (self.adapter.files if self.adapter else {}).items()
        }


def resolve(model: str, revision: str | None = None, adapter: Path | None = None) -> Checkpoint:
    """The verified checkpoint that `model` names, and the adapter. Raises InputError; a first use of a hub id downloads it."""
    place, wanted = locate(model, revision)
    lora = adapters.read(adapter) if adapter else None  # before gigabytes are fetched or hashed
    named, shadowed = model.strip(), _shadowed(model)
    if isinstance(place, Path):
        found = _verified(place, None, named, shadowed)
    else:
        found = _verified(*_from_hub(place, wanted), named, shadowed)
    return (
        dataclasses.replace(found, adapter=lora, notes=(*found.notes, *adapters.notes(lora, named))) if lora else found
    )


def locate(model: str, revision: str | None = None) -> tuple[Path | str, str | None]:
    """(directory, None) or (hub id, revision) that `model` names; reads nothing. Raises InputError."""
    if not model.strip():
        raise InputError("no model named", where="--model", fix=f"give a directory, a hub id or {', '.join(ALIASES)}")
    # os.path, not Path: a name that is too long or holds an unknown ~user is simply no path.
    model = model.strip()
    given = os.path.expanduser(model)
    if not os.path.exists(given) and (address := HUB_ADDRESS.fullmatch(model)):
        model = _id_of(model, address["path"])
    name, _, tagged = (model, "", "") if os.path.exists(given) else model.partition("@")
    if tagged and revision and tagged != revision:
        raise InputError(f"{model!r} and --revision {revision} disagree", fix="give one of them")
    wanted, alias = tagged or revision, ALIASES.get(name)
    local = alias.path if alias else Path(given) if os.path.exists(given) else None
    if local is not None:
        if wanted:
            raise InputError(f"{name!r} is a directory here, it has no revision {wanted!r}", fix="leave it out")
        return local, None
    if alias:
        assert alias.hub_id is not None  # an alias has this or a path
        return alias.hub_id, wanted or alias.revision
    if os.path.islink(given):
        raise InputError(str(dead(Path(given))), where=given, fix="give the directory that holds config.json")
    if HUB_ID.fullmatch(name.rstrip("/")):
        return name.rstrip("/"), wanted
    if cached := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", name):
        fix = f"write --model {cached[1]}/{cached[2]}"
        raise InputError("no such directory; it is the hub's name for a folder of its cache", where=name, fix=fix)
    if re.match(r"[a-z][a-z0-9+.-]*://", name):
        fix = "give a directory, owner/name, or an address of huggingface.co"
        raise InputError("addresses of other places are not fetched", where=name, fix=fix)
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name:
        raise InputError("no such directory", where=name, fix="--model takes a directory, a hub id or an alias")
    raise InputError(f"no alias, directory or hub id {model!r}", where="--model", fix=nearest(name, list(ALIASES)))


def float32_bytes(checkpoint: Checkpoint) -> int:
    """What its weights take on disk in float32, from the headers of its files."""
    from safetensors import safe_open

    count = 0
    for name in (n for n in checkpoint.files if n.endswith(".safetensors")):
        with safe_open(checkpoint.path / name, "np") as f:
            count += sum(math.prod(f.get_slice(tensor).get_shape()) for tensor in f.keys())  # noqa: SIM118 (not a dict)
    return 4 * count


def verify_hashes(checkpoint: Checkpoint, expected: Mapping[str, str], where: str = "expected hashes") -> None:
    """Raises InputError naming the first file that is missing or whose sha256 is not the one in `expected`."""
    for name, digest in sorted(expected.items()):
        found = checkpoint.files.get(name)
        if found is None:
            raise InputError(f"{name} is listed in {where} but missing", where=checkpoint.path, fix="download it again")
        if found != digest.lower():
            raise InputError(
                f"sha256 is {found}, {where} says {digest.lower()}",
                where=checkpoint.path / name,
                fix="the file is corrupted or was edited: download it again",
            )


def _id_of(address: str, path: str) -> str:
    """owner/name[@revision] of the path of a hub address. Raises InputError for one that names no model."""
    parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
    if parts[0] in ("datasets", "spaces") or len(parts) < 2:
        raise InputError("is no address of a model", where=address, fix="write owner/name, as on the model's page")
    owner, name, *rest = parts
    at = f"@{rest[1]}" if len(rest) > 1 and rest[0] in ("tree", "blob", "resolve", "raw", "commit") else ""
    return f"{owner}/{name}{at}"


def _shadowed(model: str) -> tuple[str, ...]:
    """A note where the name means two things, a folder here and something else: which of them was taken."""
    name = model.strip().rstrip("/")
    if name in ALIASES and os.path.isdir(name):
        return (f"--model {name} is the alias; the folder {name} here is not read: write ./{name} for it",)
    if HUB_ID.fullmatch(name) and os.path.isdir(name):
        return (f"--model {name} is the folder of that name here, not the model {name} of the hub",)
    return ()


def _verified(folder: Path, commit: str | None, source: str, notes: tuple[str, ...]) -> Checkpoint:
    """`folder` as a Checkpoint after all checks, the cheap ones first and hashing last."""
    folder = folder.resolve()
    config, readable = directory.check(folder)
    files = {p.name: file_sha256(p) for p in readable}
    records = _hub_records(folder, readable)
    commits = {c for c, _ in records.values() if COMMIT.fullmatch(c)}
    commit = commit or (commits.pop() if len(commits) == 1 else None)
    checkpoint = Checkpoint(folder, source, commit, config["model_type"], files, config, notes)
    # An LFS file's etag is its sha256; small files carry a git blob id of 40 digits, which says nothing here.
    on_hub = {name: etag for name, (_, etag) in records.items() if re.fullmatch("[0-9a-f]{64}", etag)}
    verify_hashes(checkpoint, on_hub, "the hub's record")
    if (folder / "SHA256SUMS").is_file():
        listed = _sha256sums(folder / "SHA256SUMS")
        of_others = {name for name in listed if name not in files and (folder / name).is_file()}
        verify_hashes(checkpoint, {n: h for n, h in listed.items() if n not in of_others}, "SHA256SUMS")
    return checkpoint


def _from_hub(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Local snapshot and commit of a hub model; a pinned commit that is in the cache needs no network."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    def snapshot(of: str | None, cached: bool) -> Path:
        def get(*names: str) -> Path:
            return Path(hub.snapshot_download(hub_id, revision=of, allow_patterns=[*names], local_files_only=cached))

        # Not everything: a repository may hold the same weights in other forms as well, or other models.
        folder = get(*directory.NAMES, "adapter_config.json", "model.safetensors")
        index = folder / directory.INDEX
        shards = read_object(index).get("weight_map") if index.is_file() else None
        if isinstance(shards, dict) and not (folder / "model.safetensors").is_file():
            get(*sorted({str(shard) for shard in shards.values()}))
        return folder

    try:
        if revision and COMMIT.fullmatch(revision):
            try:
                folder = snapshot(revision, cached=True)
                if directory.has_weights(folder):  # other programs keep a configuration alone
                    return folder, revision
            except errors.LocalEntryNotFoundError:
                pass  # not here yet: ask the hub below
        # This one question is not retried, so that a machine without network fails in seconds.
        commit = hub.HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT).sha
        return snapshot(commit, cached=False), commit
    except errors.HFValidationError as e:
        raise InputError(f"not a hub id ({e})", where="--model", fix="write owner/name") from e
    except errors.GatedRepoError as e:
        raise InputError("the hub asks for a login", where=hub_id, fix="accept its terms, then `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise InputError(f"no revision {revision!r}", where=hub_id, fix="give a branch, a tag or a commit") from e
    except errors.RepositoryNotFoundError as e:
        raise InputError("neither on the hub nor a directory", where=hub_id, fix=nearest(hub_id, list(ALIASES))) from e
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as e:
        try:
            folder = snapshot(revision, cached=True)
            return folder, folder.name  # the cache keeps a snapshot under its commit
        except errors.LocalEntryNotFoundError:
            at = f" --revision {revision}" if revision else ""
            raise InputError(
                f"no such directory, not in the hub cache, and the hub did not answer ({type(e).__name__})",
                where=hub_id,
                fix=f"on a connected machine run `hf download {hub_id}{at} --local-dir DIR`, then give --model DIR",
            ) from e


def _hub_records(folder: Path, files: list[Path]) -> dict[str, tuple[str, str]]:
    """(commit, etag) of files the hub client wrote: a cache snapshot links to blobs/ETAG, a --local-dir has notes."""
    records = {}
    for path in files:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        if path.is_symlink() and path.readlink().parent.name == "blobs":
            records[path.name] = (folder.name, path.readlink().name)
        elif note.is_file():
            commit, etag, *_ = [*note.read_text(encoding="utf-8", errors="replace").split(), "", ""]
            records[path.name] = (commit, etag)
    return records


def _sha256sums(path: Path) -> dict[str, str]:
    """The lines `HEX  NAME` of a SHA256SUMS file, without those on files that are never read (README, pickles)."""
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?(.+)", line.strip())
        if line.strip() and not match:
            raise damaged(path, f"line {number} is not `HEX  NAME`")
        if match and "/" not in match[2] and any(Path(match[2]).match(pattern) for pattern in PATTERNS):
            listed[match[2]] = match[1]
    return listed
