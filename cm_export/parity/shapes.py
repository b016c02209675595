"""Proofs that the dense graphs are stock transformers' decoder at shapes that were not traced, without a prompt.

prefill   padded batches of random embeddings at any positions: logits, keys and values
decode    several tokens at once after a cache of any length, batches padded, and transformers reading them one by one

The further outputs of a tower are zero here; proofs about prompts have them.
"""

from typing import Any

import numpy as np

from ..families import Arrays
from .answers import DENSE
from .proof import Found, compare
from .subject import Subject

PREFILL = ((3, 13), (1, 2), (2, 31))  # batch and length
DECODE = ((3, 5, 6), (1, 77, 1), (2, 1, 17))  # batch, length of the cache, new tokens


def prefill(of: Subject) -> Found:
    """Rows of padding are compared with nothing: they are never read."""
    backend, pairs = of.backend(DENSE), {}
    for batch, length in PREFILL:
        embeds, positions, mask = _asked(of, batch, length, length)
        rows = {
            p.name: np.zeros((batch, length, *p.row), np.float32) for p in (of.tower.outputs[1:] if of.tower else ())
        }
        logits, past = _decoder(of, embeds, positions, mask)
        feeds = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}
        found, kept = backend.prefill(feeds | rows, "prefill_dense")
        pairs[f"logits of {batch} x {length}"] = found["logits"], logits
        real, theirs = mask[:, None, :, None] == 1, _arrays(past)
        for name, value in kept.arrays().items():
            pairs[f"{name} of {batch} x {length}"] = value * real, theirs[name] * real
    return compare(pairs, f"{len(PREFILL)} shapes, padded on the left")


def decode(of: Subject) -> Found:
    """The cache is transformers' own."""
    session, pairs = of.backend(DENSE).session("decode_dense"), {}
    for batch, before, new in DECODE:
        embeds, positions, mask = _asked(of, batch, before + new, before)
        _, past = _decoder(of, embeds[:, :before], positions[..., :before], mask[:, :before])
        rows = {name: value.copy() for name, value in _arrays(past).items()}
        expected = []
        for at in range(before, before + new):
            here = slice(at, at + 1)
            logits, past = _decoder(of, embeds[:, here], positions[..., here], mask[:, : at + 1], past)
            expected.append(logits)
        feeds = {"inputs_embeds": embeds[:, before:], "position_ids": positions[..., before:], "attention_mask": mask}
        feeds |= rows
        given = {i.name: np.ascontiguousarray(feeds[i.name]) for i in session.get_inputs()}
        pairs[f"logits of {batch} x {new} after {before}"] = session.run(["logits"], given)[0], np.stack(expected, 1)
    return compare(pairs, f"{len(DECODE)} shapes, padded on the left")


def _asked(of: Subject, batch: int, length: int, padded: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [B,S,D], positions [A,B,S] and a mask [B,S] with padding before column `padded`, none in the first row."""
    rng = np.random.default_rng([batch, length])
    embeds = rng.standard_normal((batch, length, of.shape.hidden)).astype(np.float32)
    positions, mask = rng.integers(0, 50, (of.shape.position_axes, batch, length)), np.ones((batch, length), np.int64)
    for b in range(1, batch):
        mask[b, : rng.integers(0, padded)] = 0
    return embeds, positions, mask


def _decoder(
    of: Subject, embeds: np.ndarray, positions: np.ndarray, mask: np.ndarray, past: Any = None
) -> tuple[np.ndarray, Any]:
    """Logits [B,V] of the last token and the cache, of stock transformers' decoder."""
    import torch

    given = {"inputs_embeds": embeds, "position_ids": positions if len(positions) > 1 else positions[0]}
    tensors = {n: torch.from_numpy(v) for n, v in (given | {"attention_mask": mask}).items()}
    with torch.no_grad():
        out = of.model.get_decoder()(**tensors, past_key_values=past, use_cache=True)
        logits = of.model.get_output_embeddings()(out.last_hidden_state[:, -1])
    return logits.numpy(), out.past_key_values


def _arrays(past: Any) -> Arrays:
    parts = enumerate(past.layers)
    return {f"past.{i}.{part}": getattr(layer, f"{part}s").numpy() for i, layer in parts for part in ("key", "value")}
