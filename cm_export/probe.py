"""The reference run: what stock transformers answers to a fixed synthetic prompt with two pictures of unequal size.

seed -> patches, grids, token ids -> vision embeddings, prefill logits and cache, 8 greedy steps      (PyTorch, float32)
"""

from typing import Any

import numpy as np

from .families import qwen2_vl as host_rules

STEPS = 8
TEXT_TOKENS = 12


def probe(shape: Any, config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the reference run: pixel_values [N,..], grid [2,3], input_ids [S]; smooth pictures, random words."""
    rng = np.random.default_rng(seed)
    m = shape.merge
    grid = np.array([[1, 4 * m, 3 * m], [1, 2 * m, 5 * m]], np.int64)
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
    for n in host_rules.image_tokens(grid, m):
        ids += [shape.image_token] * n + text(TEXT_TOKENS // 3)
    return {"pixel_values": pixels.astype(np.float32), "grid": grid, "input_ids": np.array(ids, np.int64)}


def reference(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stock transformers on the probe; `model` as from_pretrained returns it, float32, on CPU.

    Returns image_embeds [I,D], logits [V], cache.{i}.key/value [Hk,S,d], position_ids [3,S], and for the greedy steps
    tokens [STEPS] and step_logits [STEPS,V].
    """
    import torch

    ids = torch.from_numpy(inputs["input_ids"])[None]
    grid, pixels = torch.from_numpy(inputs["grid"]), torch.from_numpy(inputs["pixel_values"])
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        embeds = torch.cat(tuple(model.get_image_features(pixels, grid, return_dict=True).pooler_output))
        positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
        out = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=True)
        result = {"image_embeds": embeds, "logits": out.logits[0, -1], "position_ids": positions[:, 0]}
        for i, layer in enumerate(out.past_key_values.layers):
            result[f"cache.{i}.key"], result[f"cache.{i}.value"] = layer.keys[0].clone(), layer.values[0].clone()
        tokens, steps = [], []
        for _ in range(STEPS):
            tokens.append(out.logits[0, -1].argmax())
            out = model(input_ids=tokens[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1])
    result |= {"tokens": torch.stack(tokens), "step_logits": torch.stack(steps)}
    return {k: v.contiguous().numpy() for k, v in result.items()}
