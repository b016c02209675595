"""Qwen2.5-VL: what is particular to `model_type = qwen2_5_vl`: Qwen2-VL's pictures and positions, a tower with windows.

    patches [N,..] -> most blocks:  attention inside windows of side x side image tokens; the last ones of a row are smaller
                      a few blocks: attention among all patches of a picture (fullatt_block_indexes)

transformers puts the patches of a window side by side, and the image tokens back in order at the end. Here they never
leave their order: a block with windows gathers the patches of each window into one row of a batch, and gathers the answer
back, by two lists from the host. Nothing but attention looks at a neighbour, so that both compute the same.

Source: Qwen2.5-VL (arXiv 2502.13923), section 2.1.1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base import dims
from ..base.errors import InputError
from . import Arrays, Config, Frames, Layout, Picture, Port, Range
from .qwen2_vl import Qwen2VL, Qwen2VLTower, attend_within_pictures

# transformers hands `cu_seq_lens_q` to implementations whose name contains "flash" and loops over lengths otherwise.
ATTENTION = "cm_export_windows_flash"
WINDOWS = "windows"


class Qwen25VL(Qwen2VL):
    """Qwen2-VL's decoder; pictures have its positions, too."""

    model_class = "Qwen2_5_VLForConditionalGeneration"
    tower_output = "out_hidden_size"

    def check_config(self, config: Config) -> None:
        """Refuse what a static graph cannot hold rightly. Raises InputError naming the setting."""
        super().check_config(config)
        vision = config["vision_config"]
        size = vision["window_size"]
        if type(size) is not int or size < vision["patch_size"] * vision["spatial_merge_size"]:
            what = f"vision_config.window_size = {size!r} is less than one image token"
            raise InputError(what, where="config.json")
        blocks = vision["fullatt_block_indexes"]
        if not all(type(block) is int for block in blocks):
            what = f"vision_config.fullatt_block_indexes = {blocks!r} are not whole numbers"
            raise InputError(what, where="config.json")

    def sample(self, seed: int) -> dict[str, Any]:
        """Qwen2-VL's decoder; windows that are no divisor of pictures, and one block or several without."""
        r, base = random.Random(seed), super().sample(seed)
        patch, merge, heads = r.choice([2, 4]), r.choice([1, 2, 2, 3]), r.choice([1, 2, 4])
        depth = r.choice([2, 3])
        vision = {
            "depth": depth, "hidden_size": heads * r.choice([8, 16]), "intermediate_size": r.choice([20, 33]),
            "hidden_act": r.choice(["silu", "gelu"]), "num_heads": heads, "patch_size": patch, "spatial_merge_size": merge,
            "temporal_patch_size": r.choice([1, 2]), "in_channels": 3,
            "window_size": patch * merge * r.choice([2, 3]) + r.choice([0, 1]),
            "fullatt_block_indexes": sorted(r.sample(range(depth), r.choice([1, depth - 1]))),
            "out_hidden_size": base["text_config"]["hidden_size"],
        }  # fmt: skip
        return base | {"model_type": "qwen2_5_vl", "vision_config": vision}

    def tower(self, config: Config) -> Qwen25VLTower:
        """The vision tower of a checkpoint."""
        return Qwen25VLTower(config["vision_config"])


class Qwen25VLTower(Qwen2VLTower):
    """Qwen2-VL's patches, and windows among them."""

    attention = ATTENTION

    def __init__(self, vision: Config):
        super().__init__({**vision, "embed_dim": vision["hidden_size"], "hidden_size": vision["out_hidden_size"]})
        self.side: int = vision["window_size"] // self.merge // self.patch  # image tokens along one side of a window
        self.most = (self.side * self.merge) ** 2  # patches of a window
        self.pace = vision.get("tokens_per_second", 4)  # positions of a second; transformers' default
        self.whole = frozenset(vision["fullatt_block_indexes"])
        self.inputs = (
            *self.inputs,
            Port("window_patches", np.int64, (WINDOWS, self.most)),
            Port("window_place", np.int64, (dims.PATCHES,)),
        )

    def register(self) -> None:
        """Tell transformers about what its blocks call."""
        register_attention()

    def compute(self, tower: Any, pixel_values: Any, **given: Any) -> tuple[Any, ...]:
        """What the vision graph gives (torch): the tower's own blocks, most of them with windows."""
        hidden = tower.patch_embed(pixel_values)
        rope = tower.rotary_pos_emb(hidden, given["position_ids"])
        windows = given["window_patches"], given["window_place"]
        for i, block in enumerate(tower.blocks):
            more = {} if i in self.whole else {"windows": windows}
            hidden = block(hidden, cu_seqlens=given["cu_seqlens"], max_seqlen=1, position_embeddings=rope, **more)
        return (tower.merger(hidden),)

    def clip_layout(self, frames: Frames, grid: tuple[int, int, int]) -> Layout:
        """Positions go with the time: in float32, as in transformers."""
        seconds = np.float32(self.temporal / frames.chosen_fps)
        return Layout(grid, pace=float(np.float32(self.pace) * seconds))

    def stock(self, pictures: Sequence[Picture], is_image: np.ndarray) -> Arrays:
        """Besides Qwen2-VL's: seconds between the frames of each clip."""
        paces = [p.layout.pace for p in pictures if p.layout.pace is not None]
        more = {"second_per_grid_ts": np.array(paces, np.float32) / np.float32(self.pace)} if paces else {}
        return super().stock(pictures, is_image) | more

    def feeds(self, pictures: Sequence[Picture]) -> Arrays:
        """Inputs of the vision graph for these pictures together."""
        members = window_patches([p.grid for p in pictures], self.merge, self.side)
        there = members.ravel() >= 0
        place = np.empty(there.sum(), np.int64)
        place[members.ravel()[there]] = np.flatnonzero(there)
        return super().feeds(pictures) | {"window_patches": members, "window_place": place}

    def engine_memory(self, patches: int, fused: bool) -> int:
        """Besides Qwen2-VL's: queries, keys, values and what comes out of them once more, by windows."""
        scores = 0 if fused else 2 * 2 * self.heads * patches * self.most
        again: int = 4 * 2 * patches * self.width + scores + 4 * patches * self.most
        return super().engine_memory(patches, fused) + again

    def axis_ranges(self, patches: int) -> dict[str, Range]:
        """One picture at a time. A strip of one row of image tokens has the most windows, a square the fewest."""
        tokens = max(1, patches // self.merge**2)
        most = math.ceil(tokens / self.side)
        return super().axis_ranges(patches) | {WINDOWS: (1, min(most, math.ceil(tokens / self.side**2)), most)}


# ---------------------------------------------------------------- what is traced


def register_attention() -> None:
    """Tell transformers about ATTENTION: as Qwen2-VL's, or in a block with windows [W,L] and places [N] in these."""
    from transformers import AttentionInterface

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, scaling: Any = None,
        cu_seq_lens_q: Any = None, windows: Any = None, **_: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        if windows is None:
            return attend_within_pictures(query, key, value, cu_seq_lens_q, scaling), None
        return attend_within_windows(query, key, value, windows, scaling), None

    AttentionInterface.register(ATTENTION, attend)


def attend_within_windows(query: Any, key: Any, value: Any, windows: tuple[Any, Any], scaling: Any) -> Any:
    """[1,H,N,d] -> [1,N,H,d] (torch): every window is a row of a batch [W,H,L,d], so that few patches are compared."""
    import torch

    members, place = windows
    heads, most, size = query.shape[1], members.shape[1], query.shape[3]
    rows = members.clamp(min=0).flatten()

    def cut(x: Any) -> Any:
        return x[0].index_select(1, rows).reshape(heads, -1, most, size).transpose(0, 1)

    mask = torch.where(members >= 0, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    mask = mask[:, None, None].expand(-1, 1, most, -1)
    out = torch.onnx.ops.attention(cut(query), cut(key), cut(value), mask, scale=scaling)[0]
    return out.transpose(1, 2).reshape(-1, heads, size).index_select(0, place)[None]


# ---------------------------------------------------------------- pictures


def window_patches(grids: Sequence[tuple[int, int, int]], merge: int, side: int) -> np.ndarray:
    """Patches of every window [W,L] int64, -1 behind those of a smaller one; grids of image tokens (frames, rows, columns).

    Windows lie frame by frame and row by row, image tokens in a window too; merge x merge patches follow one another.
    """
    found, start = [], 0
    for t, h, w in grids:
        tokens = np.arange(start, start + t * h * w).reshape(t, h, w)
        start += t * h * w
        padded = np.pad(tokens, ((0, 0), (0, -h % side), (0, -w % side)), constant_values=-1)
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        cut = padded.reshape(t, rows, side, columns, side).swapaxes(2, 3)
        found.append(cut.reshape(-1, side**2))
    tokens = np.concatenate(found)[..., None]
    return np.where(tokens < 0, -1, tokens * merge**2 + np.arange(merge**2)).reshape(len(tokens), -1)


FAMILY = Qwen25VL()
