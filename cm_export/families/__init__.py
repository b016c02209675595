"""What every family's decoder has in common: the sizes that all stages read, and what a static graph cannot hold.

configuration of the decoder -> Shape; a family that sees pictures adds its tower's sizes, and "vision" to the graphs
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import InputError

# Rope types whose frequencies do not depend on the length seen so far: those that a static graph can hold.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Shape:
    """The numbers that every stage needs; letters as in dims.py."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str
    stop_ids: tuple[int, ...]
    max_positions: int | None  # longest prompt; None: not stated
    traced: tuple[str, ...] = ("prefill", "decode")  # graphs; whether a model sees pictures is whether "vision" is here
    position_axes: int = 1  # rows of position_ids [A,B,S]: one for plain rotary positions, three for M-RoPE
    patch_dim: int = 0
    merge: int = 1
    image_token: int = -1  # equals no token id, so that without pictures every token is text

    @property
    def sees(self) -> bool:
        """Whether pictures can be given."""
        return "vision" in self.traced


def decoder_shape(text: dict[str, Any], head_dim: int | None = None, **vision: Any) -> Shape:
    """Shape from the decoder's part of transformers' normalised configuration; `vision`: the fields a family adds."""
    heads, stop = text["num_attention_heads"], text.get("eos_token_id")
    return Shape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"] or heads,
        head_dim=head_dim or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        activation=text["hidden_act"],
        stop_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
        max_positions=text.get("max_position_embeddings"),
        **vision,
    )


def check_decoder(text: dict[str, Any], head_dim: int | None = None) -> None:
    """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
    if "sliding_attention" in (text.get("layer_types") or []):
        raise InputError("sliding-window attention is not supported", where="config.json: use_sliding_window")
    rope = (text.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        raise InputError(
            f"rope_type {rope!r} changes with the length and cannot be traced",
            where="config.json: rope_parameters",
            fix=f"supported: {', '.join(STATIC_ROPE)}",
        )
    if text.get("mlp_bias"):
        fix = "only FFNs without bias are supported"
        raise InputError(
            "the FFN's projections have a bias, which CoreFFN lacks", where="config.json: mlp_bias", fix=fix
        )
    if head_dim is None and text["hidden_size"] % text["num_attention_heads"]:
        raise InputError("hidden_size is not a multiple of num_attention_heads", where="config.json")
    if text["num_attention_heads"] % (text["num_key_value_heads"] or 1):
        raise InputError("num_attention_heads is not a multiple of num_key_value_heads", where="config.json")


# ---------------------------------------------------------------- the host side of a decoder without vision


def image_tokens(grid: np.ndarray, merge: int) -> list[int]:
    """No pictures, so of none of them; the engine refuses pictures before (generate.py)."""
    return []


def position_ids(is_image: np.ndarray, grid: np.ndarray, merge: int) -> tuple[np.ndarray, int]:
    """Plain positions [1,S] int64 of one prompt without padding, and the position of the first answer token."""
    return np.arange(len(is_image), dtype=np.int64)[None], len(is_image)
