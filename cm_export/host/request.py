"""One prompt on the host: token ids and pictures become the feeds of the prefill, and later tokens those of decode.

ids [S], Pictures -> embeddings [1,S,D], positions [A,1,S], masks; original positions survive any token cut
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..base.core_index import image_token_count
from ..base.errors import InputError
from ..families import Arrays, Family, Pictures, Shape
from ..recipe.recipe import Recipe


class Table(Protocol):
    """A token embedding [V,D]: an array, or low-bit weights that are read a row at a time."""

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Rows [N,D] of ids [N]."""


@dataclass(frozen=True)
class Request:
    """A prompt ready to run; arrays as the graphs take them, batch 1."""

    picture: np.ndarray  # [1,S] int64: the number of the picture that a token belongs to, -1 for text
    position_ids: np.ndarray  # [A,1,S] int64
    next_position: int  # of the first answer token
    inputs_embeds: np.ndarray  # [1,S,D]
    embedding: Table  # [V,D]
    rows: Arrays = field(default_factory=dict)  # the tower's further outputs [1,S,..], zero at text tokens
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [S]; a repetition penalty counts them

    @classmethod
    def of(cls, input_ids: np.ndarray, pictures: Pictures, family: Family, shape: Shape, embedding: Table) -> Request:
        """Raises InputError if ids are outside the vocabulary or image tokens and pictures do not match."""
        ids = np.asarray(input_ids, np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= shape.vocab:
            raise InputError(f"token ids must lie in 0..{shape.vocab - 1}", where="prompt")
        is_image, counts = ids == shape.image_token, pictures.counts
        if any(layout.is_clip for layout in pictures.layouts):  # else its token is text like any other
            is_image |= ids == shape.clip_token
        if is_image.sum() != sum(counts):
            raise InputError(f"{is_image.sum()} image tokens for pictures that need {sum(counts)}", where="prompt")
        # By count and not by where runs end: two pictures may stand side by side.
        picture = np.full(len(ids), -1, np.int64)
        picture[is_image] = np.repeat(np.arange(len(counts)), counts)
        embeds, rows = embedding[ids].astype(np.float32), {}
        for i, (name, found) in enumerate(pictures.outputs.items()):
            if i == 0:
                embeds[is_image] = found
            else:
                rows[name] = np.zeros((1, len(ids), *found.shape[1:]), np.float32)
                rows[name][0, is_image] = found
        positions, following = family.positions(picture, pictures)
        return cls(picture[None], positions[:, None], following, embeds[None], embedding, rows, ids)

    @property
    def is_image(self) -> np.ndarray:
        """[1,S] bool."""
        return self.picture >= 0

    @property
    def tokens(self) -> int:
        """Prompt tokens S, image tokens included."""
        return int(self.picture.shape[1])

    @property
    def image_tokens(self) -> int:
        """Image tokens of all pictures."""
        return int(self.is_image.sum())

    def picture_sizes(self, before: int | None = None) -> list[int]:
        """Image tokens of each picture among the first `before` tokens (None: all); [0] without pictures."""
        numbers = self.picture[0, :before]
        counts = np.bincount(numbers[numbers >= 0], minlength=max(1, int(self.picture.max()) + 1))
        return [int(count) for count in counts]

    def embedded(self, ids: Sequence[int]) -> np.ndarray:
        """[N,D] float32: embeddings of text tokens."""
        return self.embedding[np.asarray(ids, np.int64)].astype(np.float32)

    def positions_after(self, read: int, count: int) -> np.ndarray:
        """[A,count] int64: positions of text tokens, of which the first follows `read` others after the prompt."""
        positions = np.empty((len(self.position_ids), count), np.int64)
        positions[:] = np.arange(self.next_position + read, self.next_position + read + count)
        return positions

    def extended(self, ids: Sequence[int]) -> Request:
        """The same context with these text tokens read after it, at the positions that follow."""
        n = len(ids)
        zeros = {name: np.zeros((1, n, *rows.shape[2:]), np.float32) for name, rows in self.rows.items()}
        return replace(
            self,
            picture=np.concatenate([self.picture, np.full((1, n), -1, np.int64)], 1),
            position_ids=np.concatenate([self.position_ids, self.positions_after(0, n)[:, None]], 2),
            next_position=self.next_position + n,
            inputs_embeds=np.concatenate([self.inputs_embeds, self.embedded(ids)[None]], 1),
            rows={name: np.concatenate([rows, zeros[name]], 1) for name, rows in self.rows.items()},
            ids=np.concatenate([self.ids, np.asarray(ids, np.int64)]),
        )


def prefill_feeds(request: Request) -> Arrays:
    """What every prefill graph takes: embeddings, positions, masks, and whose pictures the image tokens are."""
    return {
        "inputs_embeds": request.inputs_embeds,
        "position_ids": request.position_ids,
        "attention_mask": np.ones((1, request.tokens), np.int64),
        "image_mask": request.is_image,
        "picture": request.picture,
        **request.rows,
    }


def sparse_feeds(request: Request, recipe: Recipe, token_share: float | None = None, seed: int | None = None) -> Arrays:
    """The token budget of one request: image_keep (with its clamp for the knee rule) and the seed of random policies.

    image_keep is [1], or [1,C] where every picture has its own quota. `token_share` overrides the recipe's budget and
    pins the knee rule to it; a first cut never keeps less than the second one.
    """
    t = recipe.tokens
    share = t.share if token_share is None else token_share
    counted = t.budget == "count" and token_share is None
    knee = t.budget == "knee" and token_share is None
    values: dict[str, list[int]] = {}
    for n in request.picture_sizes() if t.quota == "each" else [request.image_tokens]:
        count = min(t.count, n) if counted else image_token_count(share, n)
        low, high = (image_token_count(s, n) for s in (t.min_share, t.max_share)) if knee else (count, count)
        first = max(image_token_count(t.first_share, n), low if knee else count)
        for name, value in (("", count), ("_low", low), ("_high", high), ("_first", first)):
            values.setdefault(f"image_keep{name}", []).append(value)
    feeds = {k: np.array([v] if t.quota == "each" else v, np.int64) for k, v in values.items()}
    return feeds | {"seed": np.array([recipe.seed if seed is None else seed], np.int64)}


def kept_slots(request: Request, feeds: Arrays) -> Arrays:
    """Inputs whose length says how many prompt tokens stay: kept_slots [T], kept_slots_first [T1] int32.

    For graphs in which a length cannot come out of data. `feeds` as from `sparse_feeds`; the knee rule gets its largest T.
    """
    out, before_last = {}, request.picture_sizes(before=-1)  # the last token always stays, as text
    for name, keep in (("kept_slots", feeds["image_keep_high"]), ("kept_slots_first", feeds["image_keep_first"])):
        sizes = before_last if keep.ndim == 2 else [sum(before_last)]
        images = sum(min(int(k), size) for k, size in zip(keep.ravel(), sizes, strict=True))
        out[name] = np.zeros(request.tokens - sum(before_last) + images, np.int32)
    return out
