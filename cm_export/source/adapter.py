"""A LoRA adapter as PEFT saves it, and the weights with the adapter merged into them, one at a time.

    W' = W + s B A      s = alpha / r, or alpha / sqrt(r) with use_rslora; r and alpha may differ by module
    W' = m (W + s B A) / |W + s B A|      with use_dora, |.| of each output's row

adapter_config.json, adapter_model.safetensors  ->  read  ->  Adapter  ->  fitted to a model  ->  Merge.apply(name, W)

Source: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353); the names and their meaning are PEFT's.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError
from ..base.hashes import file_sha256
from ..base.json_file import read_object
from ..base.safetensors_file import FLOATS, tensor_types
from ..base.settings import is_number
from ..recipe.aliases import ALIASES
from .parameters import Parameters

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)(?P<base>\.base_layer)?\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector|weight|bias)"
)
_MERGED = "merge it with peft (merge_and_unload, then save_pretrained) and give the merged directory as --model"
# Settings that change what an adapter computes in ways that are not computed here, and the values that leave it as it is.
_OTHERS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Ways to begin that leave the base as it was; pissa, olora, corda, loftq and others change it, and the file does not hold that.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A directory that passed every check which needs no model."""

    path: Path
    config: Mapping[str, Any]
    files: dict[str, str]  # name -> sha256 (hex)
    keys: tuple[str, ...]  # tensors of the weight file

    @property
    def base(self) -> str | None:
        """What it says that it was trained on: a hub id, or somebody's directory."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None


@dataclass
class Change:
    """What an adapter does to one parameter; names of tensors in its file."""

    value: str | None = None  # takes the parameter's place
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    bias: str | None = None  # is added, times the scale
    scale: float = 1.0
    rank: float = 0
    turned: bool = False  # of an embedding, whose B A is the transpose


@dataclass(frozen=True)
class Merge:
    """An adapter that fits a model: parameter -> what changes in it."""

    adapter: Adapter
    changes: Mapping[str, Change] = field(repr=False)

    def apply(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """float32: the parameter with the adapter merged, in float32 throughout; as it is where the adapter changes nothing."""
        import torch
        from safetensors import safe_open

        if name not in self.changes:
            return weight
        change = self.changes[name]
        with safe_open(self.adapter.path / WEIGHTS, "pt") as f:

            def read(key: str) -> torch.Tensor:
                value = f.get_tensor(key).to(torch.float32)
                if not torch.isfinite(value).all():
                    raise InputError(f"{key} holds NaN or infinity", where=self.adapter.path / WEIGHTS)
                return value

            merged = weight.to(torch.float32) if change.value is None else read(change.value)
            if change.bias is not None:
                merged = merged + read(change.bias) * change.scale
            if change.a is None or change.b is None:
                return merged
            a, b = read(change.a), read(change.b)
            delta = b.flatten(1) @ a.flatten(1)  # of a convolution as well: B is 1 x 1 there
            delta = (delta.t() if change.turned else delta).reshape(merged.shape) * change.scale
            if change.magnitude is None:
                return merged + delta
            length = torch.linalg.norm(merged + delta, dim=1)
            return (read(change.magnitude).flatten() / length)[:, None] * (merged + delta)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: name, hashes and what it changes."""
        config = self.adapter.config
        return {
            "name": self.adapter.path.name,
            "files": self.adapter.files,
            "base": self.adapter.base,
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "weights": len(self.changes),
        }


def read(folder: Path) -> Adapter:
    """The adapter in a directory. Raises InputError for what is none, or one that a merge here would not do justice to."""
    if not folder.is_dir():
        fix = "give the directory that holds adapter_config.json; of the hub: `hf download owner/name --local-dir DIR` first"
        what = "is a file, not an adapter's directory" if folder.exists() else "no such directory"
        raise InputError(what, where=folder, fix=fix)
    if not (folder / CONFIG).is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        fix = (
            f"give the directory inside it: {', '.join(inner[:3])}"
            if inner
            else "give what peft's save_pretrained wrote"
        )
        raise InputError(f"no {CONFIG} here", where=folder, fix=fix)
    config = read_object(folder / CONFIG)
    _check_settings(config, folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "only adapter_model.bin here: pickles can run code" if pickled else f"no {WEIGHTS} here"
        raise InputError(
            what, where=folder, fix="save it again with peft: save_pretrained(..., safe_serialization=True)"
        )
    types = tensor_types(weights)
    if odd := next((name for name, kind in types.items() if kind not in FLOATS), None):
        raise InputError(f"{odd} is {types[odd]}, not float", where=weights, fix=_MERGED)
    return Adapter(folder, config, {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}, tuple(types))


def _check_settings(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"peft_type {kind!r}: only LORA is merged here", where=where, fix=_MERGED)
    if found := next((name for name in _OTHERS if config.get(name)), None):
        raise InputError(f"{found} = {config[found]!r} is not merged here", where=where, fix=_MERGED)
    begins = config.get("init_lora_weights", True)
    if begins not in _BEGINNINGS:
        what = f"init_lora_weights {begins!r} changes the base weights, which the adapter's file does not hold"
        fix = "save it with path_initial_model_for_weight_conversion (peft), or " + _MERGED
        raise InputError(what, where=where, fix=fix)
    for name in ("r", "lora_alpha"):
        value: Any = config.get(name)
        least = 0 if name == "r" else -math.inf
        if not is_number(value) or value <= least or value == 0:
            bound = "above 0" if name == "r" else "other than 0, with which the adapter changes nothing"
            raise InputError(f"{name} {value!r} is not a number {bound}", where=where, fix="correct it")
    for name in ("rank_pattern", "alpha_pattern"):
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise InputError(f"{name} is not an object", where=where, fix="correct it")
        for key, value in values.items():  # an alpha of 0 switches a module off, of no rank there is nothing
            if not is_number(value) or (name == "rank_pattern" and value <= 0):
                bound = " above 0" if name == "rank_pattern" else ""
                raise InputError(f"{name}: {key} = {value!r} is not a number{bound}", where=where, fix="correct it")
    _check_names(config, where)


def _check_names(config: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for settings about which modules are adapted that PEFT could not read."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        if not isinstance(value, str | None) and not (
            isinstance(value, list) and all(isinstance(v, str) for v in value)
        ):
            raise InputError(f"{name} = {value!r} is no pattern and no list of names", where=where, fix="correct it")
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
        raise InputError(f"layers_to_transform = {layers!r} are no numbers of layers", where=where, fix="correct it")


def fit(adapter: Adapter, model: Parameters) -> Merge:
    """What it changes in this model. Raises InputError where it was made for another one."""
    changes: dict[str, Change] = {}
    for key in sorted(adapter.keys):
        match = _KEY.fullmatch(key)
        if match is None:
            fix = "it is no tensor of a LoRA adapter as peft saves it; " + _MERGED
            raise InputError(f"holds {key}", where=adapter.path / WEIGHTS, fix=fix)
        module, part = match["module"], match["part"]
        name = _parameter(adapter, model, module, "bias" if part.endswith("bias") else "weight")
        change = changes.setdefault(name, Change())
        if part in ("weight", "bias"):
            change.value = key
            continue
        change.rank = _of(adapter, "r", "rank_pattern", module, name)
        alpha = _of(adapter, "lora_alpha", "alpha_pattern", module, name)
        change.scale = alpha / (math.sqrt(change.rank) if adapter.config.get("use_rslora") else change.rank)
        if part == "lora_B.bias":
            change.bias = key
            continue
        _check_target(adapter, module, name)
        change.turned = part.startswith("lora_embedding")
        if part == "lora_magnitude_vector":
            change.magnitude = key
        elif part in ("lora_A.weight", "lora_embedding_A"):
            change.a = key
        else:
            change.b = key
    if not changes:
        raise InputError("holds no tensors", where=adapter.path / WEIGHTS, fix="give an adapter that was trained")
    _check_shapes(adapter, model, changes)
    return Merge(adapter, changes)


def notes(adapter: Adapter, source: str) -> tuple[str, ...]:
    """A sentence where the adapter names another base than `source`, a hub id or an alias; a directory has no such name."""
    base, hub_id = adapter.base, ALIASES[source].hub_id if source in ALIASES else source.partition("@")[0]
    if not base or Path(base).is_absolute() or base.count("/") != 1 or Path(source).exists() or base == hub_id:
        return ()
    return (f"the adapter says that it was trained on {base}, and is merged into {source}",)


def _parameter(adapter: Adapter, model: Parameters, module: str, part: str) -> str:
    """The parameter that a module's part is. Raises InputError for one that the model does not have."""
    name, where = model.find(f"{module}.{part}"), adapter.path / WEIGHTS
    said = f" ({adapter.base})" if adapter.base else ""
    if model.ties_head and (name == model.embedding or (name is None and module.endswith("lm_head"))):
        what = (
            f"changes {module}, and this model's head and embedding are one weight: only one of them would be changed"
        )
        raise InputError(what, where=where, fix="untie them with peft (merge, tie_word_embeddings = false, save) first")
    if name is None:
        fix = f"give the model that the adapter was trained on{said} as --model"
        raise InputError(f"is for a model with {module}.{part}, which this one does not have", where=where, fix=fix)
    return name


def _check_target(adapter: Adapter, module: str, parameter: str) -> None:
    """PEFT reads only what target_modules names, less what exclude_modules names, in layers of layers_to_transform."""
    config, own = adapter.config, (module, parameter.rpartition(".")[0])
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    named = targets == "all-linear" or _names(targets, own)
    fix = "peft would not read them: name the module there, or take the tensors out"
    if not named:
        what = f"target_modules does not name {module}, of which there are tensors"
        raise InputError(what, where=adapter.path, fix=fix)
    if _names(excluded, own):
        raise InputError(f"exclude_modules names {module}, of which there are tensors", where=adapter.path, fix=fix)
    if not isinstance(targets, str) and not any(_in_layers(config, name) for name in own):
        what = f"layers_to_transform leaves out {module}, of which there are tensors"
        raise InputError(what, where=adapter.path, fix=fix)


def _names(patterns: str | Sequence[str] | None, own: Iterable[str]) -> bool:
    """Whether a pattern fits one of these names whole, or one of them is in a list, or ends in an entry of it."""
    if isinstance(patterns, str):
        return any(_full(patterns, name) for name in own)
    return any(name == t or name.endswith(f".{t}") for name in own for t in patterns or ())


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """Whether a module lies in one of the layers that are adapted; the first number in its name is that of its layer."""
    layers, within = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if layers is None or layers == []:
        return True
    for pattern in [within] if isinstance(within, str) else within:
        if found := _compiled(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.").match(name):
            return int(found["layer"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _full(pattern: str, name: str) -> bool:
    return _compiled(pattern).fullmatch(name) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise InputError(f"{pattern!r} is no pattern ({e})", where=CONFIG, fix="correct it") from e


def _of(adapter: Adapter, setting: str, patterns: str, module: str, parameter: str) -> float:
    """A setting of one module: that of the first pattern that its name ends in, or the adapter's."""
    for name in (module, parameter.rpartition(".")[0]):
        for pattern, value in (adapter.config.get(patterns) or {}).items():
            if _full(rf"(.*\.)?({pattern})", name):
                return float(value)
    return float(adapter.config[setting])


def _check_shapes(adapter: Adapter, model: Parameters, changes: Mapping[str, Change]) -> None:
    """Raises InputError where a tensor is missing, or does not fit the parameter that it changes."""
    from safetensors import safe_open

    where = adapter.path / WEIGHTS
    with safe_open(where, "np") as f:
        shapes = {key: tuple(f.get_slice(key).get_shape()) for key in adapter.keys}
    for name, change in changes.items():
        if (change.a is None) != (change.b is None) or (change.magnitude and not change.a):
            raise InputError(f"of {name} it holds a part only", where=where, fix="download or save it again")
        _check_magnitude(adapter, name, change, model.shapes[name])
        given = [(key, model.shapes[name]) for key in (change.value,) if key]
        given += [(key, model.shapes[name][:1]) for key in (change.magnitude, change.bias) if key]
        if change.a and change.b:
            _check_low_rank(where, name, shapes[change.a], shapes[change.b], model.shapes[name], change)
        for key, shape in given:
            if shapes[key] not in (shape, (*shape, 1), (1, *shape)):
                raise _other_shape(where, key, shapes[key], name, model.shapes[name])


def _check_magnitude(adapter: Adapter, name: str, change: Change, shape: tuple[int, ...]) -> None:
    dora = bool(adapter.config.get("use_dora"))
    if change.a and bool(change.magnitude) != dora:
        what = f"of {name} there is {'no' if dora else 'a'} magnitude, and use_dora is {dora}"
        raise InputError(
            what, where=adapter.path, fix="its two files do not belong together: download or save both again"
        )
    if change.magnitude and (change.turned or len(shape) > 2):
        raise InputError(
            f"use_dora on {name} is not merged here, on linear layers only", where=adapter.path, fix=_MERGED
        )


def _check_low_rank(
    where: Path, name: str, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...], change: Change
) -> None:
    outputs, inputs = (weight[1:], weight[:1]) if change.turned else (weight[:1], weight[1:])
    if len(b) < 2:
        raise InputError(f"B of {name} is {list(b)}, no matrix", where=where, fix="download or save it again")
    if a[1:] != inputs or b[:1] != outputs or set(b[2:]) - {1}:
        raise _other_shape(where, "A and B", (*b[:1], *a[1:]), name, (*outputs, *inputs))
    if a[0] != b[1] or a[0] != change.rank:
        what = f"A and B of {name} have rank {a[0]} and {b[1]}, and {CONFIG} says {change.rank:g}"
        raise InputError(what, where=where, fix="the two files do not belong together: download or save both again")


def _other_shape(where: Path, key: str, found: Iterable[int], name: str, wanted: Iterable[int]) -> InputError:
    what = f"{key} is for a weight of {list(found)}, and {name} of this model is {list(wanted)}"
    return InputError(what, where=where, fix="give the model that the adapter was trained on as --model")
