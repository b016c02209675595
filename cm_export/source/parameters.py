"""Which parameter of transformers' model a tensor of a file is, whichever release of transformers the file was named by.

    checkpoint   visual.blocks.0.attn.qkv.weight             ->   model.visual.blocks.0.attn.qkv.weight
    adapter      model.layers.3.self_attn.q_proj (older)     ->   model.language_model.layers.3.self_attn.q_proj

transformers' own list of renamings is asked: the one by which it reads a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import InputError
from ..families import Family
from .directory import weight_files
from .model import skeleton
from .quiet import in_short


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model by name, and how names in files lead to them."""

    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    ties_head: bool  # whether the LM head is the embedding, so that it has no parameter of its own
    _renamed: Callable[[str], str]

    def has(self, name: str) -> bool:
        """Whether `name` means a parameter."""
        return self.find(name) is not None

    def find(self, name: str) -> str | None:
        """The parameter that `name` means; None where it means none, or only a part of one."""
        renamed = name if name in self.shapes else self._renamed(name)
        return renamed if renamed in self.shapes else None

    def check_files(self, path: Path) -> None:
        """Raises InputError where tensors have other sizes than these; only headers are read.

        transformers would take memory for the model that config.json asks for first, however large.
        """
        from safetensors import safe_open

        wrong = []
        for file in weight_files(path):
            with safe_open(file, "np") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    found, own = tuple(f.get_slice(name).get_shape()), self.find(name)
                    if own is not None and found != self.shapes[own]:
                        wrong.append(f"{name} is {[*found]}, and config.json asks for {[*self.shapes[own]]}")
        if wrong:
            others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InputError(f"{wrong[0]}{others}", where=path, fix="the checkpoint does not fit its config.json")


def parameters(path: Path, family: Family) -> Parameters:
    """Those of the configuration at `path`; no weight is read, and no memory taken for any."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with torch.device("meta"):
        model = skeleton(path, family)
    try:
        mapping = get_model_conversion_mapping(model)
    except Exception as e:  # such as a model_type that is no name, of a part
        raise InputError(f"transformers cannot name its weights ({in_short(e)})", where=path / "config.json") from e
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state, prefix = dict.fromkeys(model.state_dict(), True), model.base_model_prefix

    def renamed(name: str) -> str:
        found, makes = rename_source_key(name, renamings, converters, prefix, state)
        return found if makes is None else ""  # one of several tensors that transformers makes a parameter of

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return Parameters(shapes, family.embedding, tied, renamed)
