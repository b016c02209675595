"""Which parameter of transformers' model a tensor of a file is, whichever release of transformers the file was named by.

    checkpoint   visual.blocks.0.attn.qkv.weight             ->   model.visual.blocks.0.attn.qkv.weight
    adapter      model.layers.3.self_attn.q_proj (older)     ->   model.language_model.layers.3.self_attn.q_proj

transformers' own list of renamings is asked: the one by which it reads a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..families import Family
from .model import skeleton


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


def parameters(path: Path, family: Family) -> Parameters:
    """Those of the configuration at `path`; no weight is read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = skeleton(path, family)
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state, prefix = dict.fromkeys(model.state_dict(), True), model.base_model_prefix

    def renamed(name: str) -> str:
        found, makes = rename_source_key(name, renamings, converters, prefix, state)
        return found if makes is None else ""  # one of several tensors that transformers makes a parameter of

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return Parameters(shapes, family.embedding, tied, renamed)
