"""Everything that touches transformers' model: reading the configuration, loading, tracing in a process of its own.

configuration -> skeleton without weights -> trace          checkpoint -> weight file -> reference
"""

import contextlib
import gc
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import families
from ..base.errors import GateFailed, InputError
from ..bundle import weights
from ..bundle.names import is_neuron_major, stored_name
from ..families import Family, Tower
from . import processor_files
from .directory import weight_files
from .probe import Probe, reference
from .quiet import in_short, quiet

REFERENCE = "reference.npz"
_CODES_OF_HEAD = re.compile(r"(^|\.)lm_head\.(qweight|weight_packed|weight_scale(_inv)?)$")


def read_config(path: Path) -> dict[str, Any]:
    """transformers' normalised configuration as plain values. Raises InputError when it does not hold together."""
    with quiet():
        from transformers.activations import ACT2FN

        try:
            found = _config(path)
            config = found.to_dict()
        except Exception as e:  # transformers validates with many exception types; all mean a bad config.json
            raise InputError(f"transformers refuses it ({in_short(e)})", where=path / "config.json") from e
    for part in (found, *(getattr(found, name) for name in found.sub_configs)):
        if not getattr(part, "return_dict", True):
            raise InputError("return_dict = false, with which transformers' model fails", where=path / "config.json")
        for key in ("hidden_act", "projector_hidden_act"):
            act = getattr(part, key, "silu")
            if act not in ACT2FN:
                raise InputError(f"transformers knows no {key} {act!r}", where=path / "config.json")
    # Where a checkpoint lies on this machine is no part of the model, of none of its towers either.
    return json.loads(
        json.dumps(config, default=str),
        object_hook=lambda part: {k: v for k, v in part.items() if k != "_name_or_path"},
    )


def _config(path: Path) -> Any:
    """transformers' configuration, without how weights are stored: that is read by packings/, and the model is a float one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton(path: Path, family: Family) -> Any:
    """The model of a configuration without weights: parameters are never initialised, so no memory is touched.

    Raises InputError where transformers makes none of it.
    """
    with quiet():
        import torch
        import transformers
        from transformers import initialization

        config = _config(path)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = torch.float32  # direct construction would follow what the checkpoint was saved as
        if head_differs(path):  # from_pretrained ties nothing then, whatever config.json says
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        try:
            with initialization.no_init_weights():
                model = getattr(transformers, family.model_class)(config)
        except Exception as e:  # a size or a name that only its layers look at, of many exception types
            raise InputError(f"transformers makes no model of it ({in_short(e)})", where=path / "config.json") from e
        model.tie_weights()
    return model.eval()


def head_differs(path: Path) -> bool:
    """Whether the checkpoint holds an embedding and an lm_head with other values."""
    import torch
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        where: dict[str, safe_open] = {}
        for file in weight_files(path):
            f = stack.enter_context(safe_open(file, "pt"))
            names = [*f.keys()]
            if any(_CODES_OF_HEAD.search(name) for name in names):
                return True  # the embedding is stored otherwise
            where |= {n: f for n in names if n.endswith(("lm_head.weight", "embed_tokens.weight"))}
        return len(where) == 2 and not torch.equal(*(f.get_tensor(n) for n, f in where.items()))


def trace_graph(path: Path, name: str, target: Path) -> None:
    """Trace one graph of the checkpoint at `path` into `target`; made to run in a process of its own."""
    import onnx
    import torch

    from .trace import specs, trace

    torch.set_num_threads(1)
    config = read_config(path)
    family = families.find(config["model_type"])
    spec = next(s for s in specs(skeleton(path, family), family, config) if s.name == name)
    onnx.save(trace(spec), target)


def load(path: Path, family: Family, dtype: str = "float32") -> Any:
    """Stock transformers, every weight from the checkpoint. Raises InputError naming weights that are not.

    With the type that the files hold (see `stored_dtype`) they are mapped: nothing is read before it is used.
    """
    return _load(path, family, dtype)[0]


def _load(path: Path, family: Family, dtype: str) -> tuple[Any, list[str]]:
    """The model, and the names of tensors in the files that it does not read."""
    with quiet():
        import transformers

        try:
            model, info = getattr(transformers, family.model_class).from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below; transformers would print a report and name none
            )
        except Exception as e:
            raise InputError(f"transformers cannot load it ({in_short(e)})", where=path) from e
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            some = sorted(map(str, info[what]))[:3]
            raise InputError(
                f"{len(info[what])} weights have {what.replace('_keys', '')} values, e.g. {', '.join(some)}",
                where=path,
                fix="the checkpoint does not fit its config.json",
            )
    return model.eval(), sorted(map(str, info.get("unexpected_keys") or ()))


def write_weights(
    path: Path,
    family: Family,
    folder: Path,
    tower: Tower | None,
    probe: Probe,
    progress: Callable[..., None],
    order: np.ndarray | None = None,
    merged: Callable[[str, Any], Any] = lambda name, parameter: parameter,
) -> dict[str, Any]:
    """Weight file, processor files and the reference answers of one checkpoint into `folder`.

    The file is read back with the safetensors library and compared with the checkpoint, value by value; the reference
    run of stock transformers then reads it. So the model is never in memory twice.
    order [L,F]: neurons are stored in this order (place -> id of the checkpoint), which changes no FFN's meaning.
    merged: (name, parameter) -> what is written in its place, such as with an adapter in it; the reference run reads that.
    """
    digest, unread = _write_and_compare(path, family, folder / weights.FILE, progress, order, merged)
    gc.collect()  # models hold cycles; the mapped files leave memory only now
    progress("ask PyTorch for the reference answers")
    stock = reading(path, folder / weights.FILE, family)
    try:
        found = reference(stock, probe, tower)
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as e:
        what = f"transformers' own model fails with it ({in_short(e)})"
        raise InputError(what, where=path / "config.json", fix="correct the setting that it names") from e
    del stock
    np.savez(folder / REFERENCE, **found)  # type: ignore[arg-type]  # the stub takes one for allow_pickle
    gc.collect()
    processor_files.copy(path, folder / "processor")
    return {"sha256": {weights.FILE: digest}, "unread": unread}


def _write_and_compare(
    path: Path,
    family: Family,
    file: Path,
    progress: Callable[..., None],
    order: np.ndarray | None,
    merged: Callable[[str, Any], Any],
) -> tuple[str, list[str]]:
    """Write the weight file, prove it equal to the checkpoint; (its sha256, tensors that the model does not read)."""
    loaded, unread = _load(path, family, stored_dtype(path))
    parameters = dict(loaded.named_parameters())
    del loaded  # nothing of it outlives the call
    value = {name: partial(merged, name, parameter.detach()) for name, parameter in parameters.items()}
    tensors, total, what = (
        [planned(n, p, family, neuron_order(n, family, order), value[n]) for n, p in parameters.items()],
        len(parameters),
        "write the weights: tensor",
    )
    digest = weights.write(
        file, [_announced(t, i, lambda i: progress(what, i + 1, total)) for i, t in enumerate(tensors)]
    )
    for i, name in enumerate(parameters):
        progress("compare the weights with the checkpoint: tensor", i + 1, total)
        _compare(file, name, value[name](), family, path, neuron_order(name, family, order))
    return digest, unread


def stored_dtype(path: Path) -> str:
    """The type that loses nothing: the one that all tensors share, float32 if they differ. Not what config.json claims."""
    from safetensors import safe_open

    found = set()
    for file in weight_files(path):
        with safe_open(file, "np") as f:
            found |= {f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118 (not a dict)
    return {"BF16": "bfloat16", "F16": "float16"}.get(found.pop(), "float32") if len(found) == 1 else "float32"


def reading(path: Path, file: Path, family: Family) -> Any:
    """Stock transformers in float32 whose parameters are views of a weight file."""
    import torch
    from safetensors import safe_open

    model = skeleton(path, family)
    with safe_open(file, "pt") as f, torch.no_grad():
        expected = {stored_name(name, family) for name, _ in model.named_parameters()}
        if odd := sorted(expected ^ set(f.keys())):
            raise InputError(
                f"config.json and weights disagree about {odd[0]}",
                where=path,
                fix="the checkpoint does not fit its config.json",
            )
        for name, parameter in model.named_parameters():
            value = f.get_tensor(stored_name(name, family))
            parameter.data = value.t() if is_neuron_major(name, family) else value
    return model


def neuron_order(name: str, family: Family, order: np.ndarray | None) -> np.ndarray | None:
    """[F]: the order in which this checkpoint weight's neurons are stored; None for weights without neurons."""
    layers = range(len(order)) if order is not None else ()
    parts = (family.gate, family.up, family.down)
    owner = (i for i in layers for part in parts if name == family.layer.format(layer=i) + part)
    layer = next(owner, None)
    return None if order is None or layer is None else order[layer]


def _compare(
    file: Path, name: str, parameter: Any, family: Family, path: Path, order: np.ndarray | None = None
) -> None:
    """Raises unless the stored tensor is the checkpoint's, exactly, and finite."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as f:  # opened for each tensor, so that the pages read do not add up
        stored = f.get_tensor(stored_name(name, family))
    expected = parameter.detach().to(torch.float32)
    if not torch.isfinite(expected).all():
        raise InputError(f"{name} holds NaN or infinity", where=path, fix="the checkpoint is damaged")
    if order is not None:
        back = torch.from_numpy(np.argsort(order))  # id -> place; not the gather that wrote the file
        stored = stored.index_select(0, back)
    if not torch.equal(stored.t() if is_neuron_major(name, family) else stored, expected):
        raise GateFailed("differs from the checkpoint", where=f"{weights.FILE}: {name}", fix="check disk and memory")


def read_reference(folder: Path) -> dict[str, np.ndarray]:
    """What `write_weights` recorded; plain arrays, never pickled objects."""
    with np.load(folder / REFERENCE, allow_pickle=False) as data:
        return dict(data)


def planned(
    name: str,
    parameter: Any,
    family: Family,
    order: np.ndarray | None = None,
    value: Callable[[], Any] | None = None,
) -> weights.Planned:
    """How a parameter is read: whole, or transposed a block of neurons at a time; `order` [F]: place -> neuron.

    value: makes what is written in its place, of its shape.
    """
    import torch

    turned = is_neuron_major(name, family)
    shape = tuple(parameter.shape)[::-1] if turned else tuple(parameter.shape)

    def read(block: int = 4096) -> Iterator[np.ndarray]:
        data = value() if value else parameter.detach()
        data = data.t() if turned else data
        if order is not None:
            for start in range(0, data.shape[0], block):
                ids = torch.from_numpy(order[start : start + block].astype(np.int64))
                yield data.index_select(0, ids).to(torch.float32).contiguous().numpy()
            return
        if not turned:
            yield data.to(torch.float32).contiguous().numpy()
            return
        for start in range(0, data.shape[0], block):
            yield data[start : start + block].to(torch.float32).contiguous().numpy()

    return weights.Planned(stored_name(name, family), np.dtype("<f4"), shape, read)


def _announced(tensor: weights.Planned, number: int, announce: Callable[[int], None]) -> weights.Planned:
    def read() -> Iterator[np.ndarray]:
        announce(number)
        yield from tensor.read()

    return weights.Planned(tensor.name, tensor.dtype, tensor.shape, read)
