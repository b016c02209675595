"""A checkpoint of a configuration with random weights, as transformers saves one: what a family is proved on.

config, seed -> folder/config.json, folder/model.safetensors
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..families import Family
from .quiet import in_short, quiet


def write(config: Mapping[str, Any], family: Family, folder: Path, seed: int = 0, **how: Any) -> Path:
    """Returns `folder`. Weights are large enough that a wrong mask, position or layer shows in the logits.

    `how`: arguments of save_pretrained, such as max_shard_size. Raises InputError for what transformers refuses.
    """
    with quiet():
        import torch
        import transformers

        torch.manual_seed(seed)
        kind = getattr(transformers, family.model_class, None)
        if kind is None:
            raise InputError(f"transformers {transformers.__version__} has no class {family.model_class}")
        try:
            model = kind(kind.config_class(**config)).eval()
        except Exception as e:  # transformers validates with many exception types
            raise InputError(f"transformers refuses the configuration ({in_short(e)})", where="sample") from e
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1:
                    p.normal_(0, 0.8 / p[0].numel() ** 0.5)
                elif "bias" in name:
                    p.normal_(0, 0.2)
                else:
                    p.normal_(1, 0.1)
        model.save_pretrained(folder, **how)
    return folder
