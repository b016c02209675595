"""What lies in a checkpoint directory: which files belong to the model, and what anything else there is called.

config.json, tokenizer and processor files, model.safetensors or its shards     read, hashed, recorded
tensors in few bits, with a quantization_config that packings/ reads             read as well
an adapter, other quantised tensors, a half download, a page for a file         refused, each in its own words
other weights, READMEs, pickles beside safetensors                              not read
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import families
from ..base.errors import InputError
from ..base.json_file import check_content, read_object
from ..base.links import dead
from ..base.safetensors_file import FLOATS, INTEGERS, damaged, tensor_types
from . import packings
from .not_yet import PAGE, why_not

INDEX = "model.safetensors.index.json"
# Beside the weights: what transformers or this package reads of a checkpoint.
NAMES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", INDEX,
)  # fmt: skip
OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")  # forms that can run code, or are not read
ADAPTER = "adapter_config.json"
_LOW_BIT_NAME = re.compile(r"\.(qweight|qzeros|g_idx|weight_scale(_inv|_2)?|weight_packed|absmax|SCB)$|quant_state")
_ADAPTER_NAME = re.compile(r"\.lora_|^base_model\.model\.")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def check(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """(config.json, the files that belong to the model) of a directory that holds a whole one. Raises InputError."""
    if not folder.is_dir():
        what = "is a file, not a checkpoint directory" if folder.exists() else "no such directory"
        raise InputError(what, where=folder, fix="give the directory that holds config.json")
    _check_adapter(folder)
    if not _there(folder / "config.json"):
        raise InputError("no config.json here", where=folder, fix=_elsewhere(folder))
    config = read_object(folder / "config.json")
    _check_config(folder, config)
    shards = weight_files(folder)
    _check_layers(config, sum(len(tensor_types(shard)) for shard in shards), folder / "config.json")
    texts = [folder / name for name in NAMES if _there(folder / name)]
    for file in texts:
        if file.name not in ("tokenizer.model", "merges.txt"):  # no text, and text that may be empty
            check_content(file)
    if shards == [folder / "model.safetensors"]:  # transformers prefers it over an index, too
        texts = [file for file in texts if file.name != INDEX]
    return config, sorted({*texts, *shards})


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index lists, complete and of float tensors. Raises InputError."""
    packed = (
        bool(read_object(folder / "config.json").get("quantization_config"))
        if _there(folder / "config.json")
        else False
    )
    single, index = folder / "model.safetensors", folder / INDEX
    if _there(single):
        _check_tensors(single, tensor_types(single), packed)
        return [single]
    if not _there(index):
        raise _no_weights(folder)
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise damaged(index, "no weight_map of tensor names to files")
    names = sorted(set(shards.values()))
    for shard in names:
        if re.search(r"[/\\:]", shard) or not shard.endswith(".safetensors"):
            raise InputError(f"names {shard!r} as a shard", where=index, fix="shards are *.safetensors files beside it")
    if absent := [shard for shard in names if not _there(folder / shard)]:
        fix = _half_download(folder) or f"download them again ({index.name} lists them)"
        raise InputError(f"missing {_some(absent)}", where=folder, fix=fix)
    held = {shard: tensor_types(folder / shard) for shard in names}
    if lost := sorted(tensor for tensor, shard in shards.items() if tensor not in held[shard]):
        raise InputError(f"not in the shard it names: {_some(lost)}", where=index, fix="download the checkpoint again")
    for shard, types in held.items():
        _check_tensors(folder / shard, types, packed)
    return [folder / shard for shard in names]


def has_weights(folder: Path) -> bool:
    """Whether the weight files are all there; nothing is said about what they hold."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return (folder / "model.safetensors").is_file()
    shards = read_object(folder / INDEX).get("weight_map")
    return isinstance(shards, dict) and all((folder / str(shard)).is_file() for shard in shards.values())


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER).is_file():
        return
    base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    whole = [name for name in ("model.safetensors", INDEX) if (folder / name).exists()]
    if whole:
        raise InputError(
            f"lies beside {whole[0]}: transformers adds the adapter to these weights only where peft is installed",
            where=folder / ADAPTER,
            fix="move the adapter_* files away to export the weights alone, or into a folder of their own for --adapter",
        )
    fix = f"give --model {base or 'DIRECTORY'} --adapter {folder}: the build merges it into the weights"
    raise InputError(
        f"is an adapter of {base or 'a base model that it does not name'}, not a whole model", where=folder, fix=fix
    )


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        values = config if name == "config.json" else read_object(folder / name) if _there(folder / name) else {}
        parts = [values, *(v for v in values.values() if isinstance(v, dict))]
        if any(part.get("auto_map") for part in parts):
            raise InputError(
                "asks to run its own Python code (auto_map), which is never done",
                where=folder / name,
                fix="use a checkpoint that plain transformers loads",
            )
        if name == "config.json" and values.get("quantization_config"):
            packings.find(values["quantization_config"], folder / name)
            parts = parts[1:]  # it is read as a whole
        if any(part.get("quantization_config") for part in parts):
            raise _quantised(folder / name, "quantization_config")
    if config.get("transformers_weights"):
        fix = "rename that file to model.safetensors and remove the key"
        raise InputError("names its own weight file (transformers_weights)", where=folder / "config.json", fix=fix)
    known, model_type = families.names(), config.get("model_type")
    if model_type not in known:
        said = f"model_type {model_type!r} is not supported" if model_type else "no model_type"
        reason, fix = why_not(model_type), f"supported: {', '.join(known) or 'none'}"
        if reason:
            said, fix = f"{said}, it {reason}", f"{fix}; {PAGE} says what each of the others lacks"
        raise InputError(said, where=folder / "config.json", fix=fix)


def _check_layers(part: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Raises InputError for more layers than there are tensors, which transformers would begin to make one by one."""
    for key, value in part.items():
        if isinstance(value, dict):
            _check_layers(value, tensors, where)
        elif key in ("num_hidden_layers", "depth") and isinstance(value, int) and value > tensors:
            fix = "the checkpoint does not fit its config.json"
            raise InputError(f"{key} = {value}, and the files hold {tensors} tensors", where=where, fix=fix)


def _check_tensors(file: Path, types: Mapping[str, str], packed: bool) -> None:
    """Raises InputError for tensors that are not the weights of a whole model; `packed`: config.json says how codes are read."""
    if found := [name for name in types if _ADAPTER_NAME.search(name)]:
        fix = "give the model alone, and what peft saved as --adapter: the build merges it"
        raise InputError(f"holds tensors of an adapter, e.g. {found[0]}", where=file, fix=fix)
    for name, kind in types.items() if not packed else ():
        if in_few_bits(name, kind):
            raise _quantised(file, f"{name} is {kind}")


def in_few_bits(name: str, kind: str) -> bool:
    """Whether a tensor is one of those that a weight in few bits is stored as."""
    whole = kind in INTEGERS and name.endswith("weight")
    return bool(_LOW_BIT_NAME.search(name)) or whole or (kind not in FLOATS | INTEGERS and kind != "BOOL")


def _quantised(where: Path, why: str) -> InputError:
    return InputError(f"is a quantised checkpoint ({why})", where=where, fix="give the original float checkpoint")


def _no_weights(folder: Path) -> InputError:
    """What lies there in the place of weights."""
    fix = "only safetensors are read: convert it, or download the safetensors files"
    pickles = sorted(p.name for pattern in OTHERS for p in folder.glob(pattern))
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if half := _half_download(folder):
        return InputError("no model.safetensors here", where=folder, fix=half)
    if any(_SHARD.fullmatch(name) for name in others):
        return InputError(f"shards without {INDEX}", where=folder, fix=f"download {INDEX}, which lists them")
    if others:
        fix = "rename the one that holds the whole model, with transformers' tensor names, to model.safetensors"
        return InputError(f"no model.safetensors here, only {_some(others)}", where=folder, fix=fix)
    if gguf := sorted(p.name for p in folder.glob("*.gguf")):
        fix = "give the float safetensors that it was made from"
        return InputError(f"only {gguf[0]} here: GGUF is not read", where=folder, fix=fix)
    found = f"only {pickles[0]} here: pickles can run code" if pickles else "no model.safetensors here"
    return InputError(found, where=folder, fix=fix)


def _there(path: Path) -> bool:
    """Whether `path` is a file. Raises InputError for a link that leads nowhere, such as into a pruned cache."""
    if gone := dead(path):
        fix = _half_download(path.parent) or "copy it with the files that it links to, or download it again"
        raise InputError(gone, where=path, fix=fix)
    return path.is_file()


def _half_download(folder: Path) -> str | None:
    """What to do about a download that was interrupted; None where nothing says that one was."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    if not any(next(place.glob("*.incomplete"), None) for place in places):
        return None
    return "its download was interrupted (*.incomplete files): run the same `hf download` again, it resumes"


def _elsewhere(folder: Path) -> str:
    """Where the checkpoint may be that is not in `folder` itself."""
    own = [folder, *list(folder.parents)[:2]]
    cache = next((p for p in own if re.fullmatch(r"models--[\w.-]+?--[\w.-]+", p.name)), None)
    snapshots = sorted(cache.glob("snapshots/*/config.json"), key=lambda p: p.stat().st_mtime) if cache else []
    if cache:
        hub_id = "/".join(cache.name.split("--")[1:3])
        path = f", or its snapshot {snapshots[-1].parent}" if snapshots else ""
        return f"this is the hub's cache of {hub_id}: give --model {hub_id}{path}"
    inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if inner:
        return f"give the directory inside it that holds one: {_some([str(folder / name) for name in inner])}"
    return _half_download(folder) or "give a Hugging Face checkpoint directory"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
