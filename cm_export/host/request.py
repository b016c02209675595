"""One prompt on the host: token ids and picture grids become the feeds of the prefill and of every decode step.

ids [S], grids -> embeddings [1,S,D], positions [A,1,S], masks; original positions survive any token cut
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from ..base.core_index import image_token_count
from ..base.errors import InputError
from ..bundle.weights import WeightFile
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """A prompt ready to run; arrays as the graphs take them, batch 1."""

    is_image: np.ndarray  # [1,S] bool
    position_ids: np.ndarray  # [A,1,S] int64; A = 3 of M-RoPE, 1 of plain positions
    next_position: int  # of the first answer token
    inputs_embeds: np.ndarray  # [1,S,D]
    embedding: np.ndarray  # [V,D], the mapped token embedding

    @classmethod
    def of(
        cls,
        input_ids: np.ndarray,
        grid: np.ndarray,
        family: ModuleType,
        shape: Any,
        weights: WeightFile,
        image_embeds: np.ndarray | None,
    ) -> "Request":
        """Raises InputError if ids are outside the vocabulary or image tokens and embeddings do not match."""
        ids = np.asarray(input_ids, np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= shape.vocab:
            raise InputError(f"token ids must lie in 0..{shape.vocab - 1}", where="prompt")
        is_image = ids == shape.image_token
        expected = sum(family.image_tokens(grid, shape.merge))
        if is_image.sum() != expected:
            raise InputError(f"{is_image.sum()} image tokens for pictures that need {expected}", where="prompt")
        embedding = weights[family.EMBEDDING]
        embeds = embedding[ids].astype(np.float32)
        if expected:
            embeds[is_image] = image_embeds
        positions, nxt = family.position_ids(is_image, grid, shape.merge)
        return cls(is_image[None], positions[:, None], nxt, embeds[None], embedding)

    @property
    def tokens(self) -> int:
        """Prompt tokens S, image tokens included."""
        return self.is_image.shape[1]

    @property
    def image_tokens(self) -> int:
        return int(self.is_image.sum())

    def extended(self, ids: list[int]) -> "Request":
        """The same context with these text tokens read after it, at the positions that follow."""
        feeds = self.step_feeds(ids, 0)
        return replace(
            self,
            is_image=np.concatenate([self.is_image, np.zeros((1, len(ids)), bool)], 1),
            position_ids=np.concatenate([self.position_ids, feeds["position_ids"]], 2),
            next_position=self.next_position + len(ids),
            inputs_embeds=np.concatenate([self.inputs_embeds, feeds["inputs_embeds"]], 1),
        )

    def step_feeds(
        self,
        tokens: int | list[int],
        step: int,
        kept_mask: np.ndarray | None = None,
        core_tokens: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Feeds of a decode step that reads one or several answer tokens, the first of them being answer token `step`.

        kept_mask [1,T]: the prefill cut the cache to T rows. core_tokens [1,M]: the cache is whole, only these prompt
        rows (and the answer's own) are read.
        """
        ids = np.atleast_1d(np.asarray(tokens, np.int64))
        base = kept_mask if kept_mask is not None else np.ones((1, self.tokens), np.int64)
        positions = self.next_position + step + np.arange(len(ids))
        feeds = {
            "inputs_embeds": self.embedding[ids].astype(np.float32)[None],
            "position_ids": np.ascontiguousarray(np.broadcast_to(positions, (len(self.position_ids), 1, len(ids)))),
            "attention_mask": np.concatenate([base, np.ones((1, step + len(ids)), np.int64)], 1),
        }
        if core_tokens is not None:
            answer = np.arange(self.tokens, self.tokens + step + len(ids), dtype=np.int32)[None]
            feeds["core_tokens"] = np.concatenate([core_tokens, answer], 1)
        return feeds


def prefill_feeds(request: Request) -> dict[str, np.ndarray]:
    """What every prefill graph takes: embeddings, positions and the two masks."""
    return {
        "inputs_embeds": request.inputs_embeds,
        "position_ids": request.position_ids,
        "attention_mask": np.ones((1, request.tokens), np.int64),
        "image_mask": request.is_image,
    }


def sparse_feeds(
    request: Request,
    recipe: Recipe,
    token_share: float | None = None,
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    """The token budget of one request: image_keep (with its clamp for the knee rule) and the seed of random policies.

    image_keep is [1], or [1,C] where every picture has its own quota. `token_share` overrides the recipe's budget and
    pins the knee rule to it; a first cut never keeps less than the second one.
    """
    t = recipe.tokens
    share = t.share if token_share is None else token_share
    counted = t.budget == "count" and token_share is None
    knee = t.budget == "knee" and token_share is None
    values: dict[str, list[int]] = {}
    for n in picture_sizes(request.is_image[0]) if t.quota == "each" else [request.image_tokens]:
        count = min(t.count, n) if counted else image_token_count(share, n)
        low, high = (image_token_count(s, n) for s in (t.min_share, t.max_share)) if knee else (count, count)
        first = max(image_token_count(t.first_share, n), low if knee else count)
        for name, value in (("", count), ("_low", low), ("_high", high), ("_first", first)):
            values.setdefault(f"image_keep{name}", []).append(value)
    feeds = {k: np.array([v] if t.quota == "each" else v, np.int64) for k, v in values.items()}
    return feeds | {"seed": np.array([recipe.seed if seed is None else seed], np.int64)}


def kept_slots(request: Request, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs whose length says how many prompt tokens stay: kept_slots [T], kept_slots_first [T1] int32.

    For graphs in which a length cannot come out of data. `feeds` as from `sparse_feeds`; the knee rule gets its largest T.
    """
    before_last = request.is_image[0].copy()
    before_last[-1] = False  # the last token always stays, as text
    out = {}
    for name, keep in (("kept_slots", feeds["image_keep_high"]), ("kept_slots_first", feeds["image_keep_first"])):
        sizes = picture_sizes(before_last) if keep.ndim == 2 else [int(before_last.sum())]
        images = sum(min(int(k), size) for k, size in zip(keep.ravel(), sizes, strict=True))
        out[name] = np.zeros(request.tokens - int(before_last.sum()) + images, np.int32)
    return out


def picture_sizes(is_image: np.ndarray) -> list[int]:
    """Image tokens of each picture of a prompt [S]: the lengths of their runs, between which markers stand; [0] of none."""
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8), prepend=0, append=0))
    return (edges[1::2] - edges[::2]).tolist() or [0]
