"""The reference run: what stock transformers answers to a fixed made-up prompt with two pictures.

seed -> pictures, token ids -> outputs of the vision tower, prefill logits and cache, 8 greedy steps      (PyTorch, float32)

A decoder without vision gets the same words without the pictures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..families import Arrays, Config, Picture, Shape, Tower

STEPS = 8
TEXT_TOKENS = 12


@dataclass(frozen=True)
class Probe:
    """A made-up prompt: its pictures, and token ids [S] int64 in which they have their image tokens."""

    pictures: tuple[Picture, ...]
    ids: np.ndarray
    is_image: np.ndarray  # [S] bool


def probe(shape: Shape, tower: Tower | None, config: Config, seed: int = 0) -> Probe:
    """Smooth pictures between random words; no word is a token that stands for something else."""
    rng = np.random.default_rng(seed)
    pictures = tower.probes(rng) if tower else []
    words = words_of(shape, config)

    def text(n: int) -> list[int]:
        return rng.choice(words, n).tolist()

    ids = text(TEXT_TOKENS // 3)
    for picture in pictures:
        ids += [shape.image_token] * picture.tokens + text(TEXT_TOKENS // 3)
    ids += text(TEXT_TOKENS - sum(i != shape.image_token for i in ids))
    found = np.array(ids, np.int64)
    return Probe(tuple(pictures), found, found == shape.image_token)


def words_of(shape: Shape, config: Config) -> np.ndarray:
    """Ids of the vocabulary that stand for nothing else."""
    reserved = {v for k, v in config.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    return np.setdiff1d(np.arange(shape.vocab), [*reserved, *shape.seen_tokens])


def reference(model: Any, asked: Probe, tower: Tower | None) -> Arrays:
    """Stock transformers on the probe; `model` as from_pretrained returns it, float32, on CPU.

    Returns logits [V], cache.{i}.key/value [Hk,S,d], position_ids [A,S] as the rotary embedding got them, for the greedy
    steps tokens [STEPS] and step_logits [STEPS,V], and the tower's outputs by name.
    """
    import torch

    ids = torch.from_numpy(asked.ids)[None]
    given: dict[str, Any] = {}
    result: dict[str, Any] = {}
    seen: list[Any] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    with torch.no_grad():
        if tower:
            given = {n: torch.from_numpy(v) for n, v in tower.stock(asked.pictures, asked.is_image).items()}
            result |= tower.features(model, given)
        hook = model.get_decoder().rotary_emb.register_forward_pre_hook(watch, with_kwargs=True)
        out = model(input_ids=ids, use_cache=True, **given)
        hook.remove()
        result |= {"logits": out.logits[0, -1], "position_ids": seen[0].reshape(-1, ids.shape[1])}
        for i, layer in enumerate(out.past_key_values.layers):
            result[f"cache.{i}.key"], result[f"cache.{i}.value"] = layer.keys[0].clone(), layer.values[0].clone()
        tokens, steps = [], []
        for _ in range(STEPS):
            tokens.append(out.logits[0, -1].argmax())
            out = model(input_ids=tokens[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1])
    result |= {"tokens": torch.stack(tokens), "step_logits": torch.stack(steps)}
    return {k: v.contiguous().numpy() for k, v in result.items()}
