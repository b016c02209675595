"""The reference run: what stock transformers answers to a fixed synthetic prompt with two pictures of unequal size.

seed -> patches, grids, token ids -> vision embeddings, prefill logits and cache, 8 greedy steps      (PyTorch, float32)

A decoder without vision gets the same words without the pictures.
"""

from typing import Any

import numpy as np

STEPS = 8
TEXT_TOKENS = 12


def probe(shape: Any, config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the reference run: pixel_values [N,..], grid [2,3], input_ids [S]; smooth pictures, random words.

    Without vision: N = 0, grid [0,3], and as many words.
    """
    rng = np.random.default_rng(seed)
    m = shape.merge
    grid = np.array([[1, 4 * m, 3 * m], [1, 2 * m, 5 * m]] if shape.sees else np.zeros((0, 3)), np.int64)
    patches = int(grid.prod(1).sum())
    phase = rng.uniform(0, 6.28, (1, shape.patch_dim))
    pixels = np.sin(np.linspace(0, 9, patches)[:, None] + phase) + 0.3 * rng.standard_normal((patches, shape.patch_dim))
    special = {
        config.get(k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    words = np.setdiff1d(np.arange(shape.vocab), [t for t in special if t is not None])

    def text(n: int) -> list[int]:
        return rng.choice(words, n).tolist()

    ids = text(TEXT_TOKENS // 3)
    for n in grid.prod(1) // m**2:
        ids += [shape.image_token] * int(n) + text(TEXT_TOKENS // 3)
    ids += text(TEXT_TOKENS - sum(i != shape.image_token for i in ids))
    return {"pixel_values": pixels.astype(np.float32), "grid": grid, "input_ids": np.array(ids, np.int64)}


def reference(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stock transformers on the probe; `model` as from_pretrained returns it, float32, on CPU.

    Returns logits [V], cache.{i}.key/value [Hk,S,d], position_ids [A,S] as the rotary embedding got them, for the greedy
    steps tokens [STEPS] and step_logits [STEPS,V], and where there are pictures image_embeds [I,D].
    """
    import torch

    ids = torch.from_numpy(inputs["input_ids"])[None]
    grid, pixels = torch.from_numpy(inputs["grid"]), torch.from_numpy(inputs["pixel_values"])
    pictures, result, seen = {}, {}, []

    def watch(_, args, kwargs):
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    with torch.no_grad():
        if len(grid):
            kinds = (ids == model.config.image_token_id).int()
            pictures = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
            embeds = model.get_image_features(pixels, grid, return_dict=True).pooler_output
            result["image_embeds"] = torch.cat(tuple(embeds))
        hook = model.get_decoder().rotary_emb.register_forward_pre_hook(watch, with_kwargs=True)
        out = model(input_ids=ids, use_cache=True, **pictures)
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
