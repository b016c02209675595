"""Random tiny checkpoints, generated and not hand-picked, and what tests need of one after export."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared
from conftest import wide
from traces import traced_once

from cm_export import families
from cm_export.families import Arrays, Family, Layout, Pictures
from cm_export.host.request import Request
from cm_export.parity.subject import Subject
from cm_export.parity.subject import copied as copy  # noqa: F401 - tests take it from here
from cm_export.source import random_weights

IMAGE, VIDEO, START, END = 5, 6, 3, 4
# Of the configurations of `random_config`: one head, and nine that read three in a model of three layers; more in the wide tests.
SEEDS = (1, 5, *(wide(seed) for seed in (2, 3, 4)))
family = families.find("qwen2_vl")


def random_config(seed: int) -> dict[str, Any]:
    """A valid Qwen2-VL configuration, drawn at random."""
    return family.sample(seed)


def random_text_config(model_type: str, seed: int, **fixed: Any) -> dict[str, Any]:
    """A valid configuration of a decoder without vision, drawn at random but for what is `fixed`."""
    return families.find(model_type).sample(seed) | fixed


def random_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0, **how: Any) -> Path:
    """Save a stock transformers checkpoint with random weights. `how`: arguments of save_pretrained."""
    return random_weights.write(config, families.find(config.get("model_type", "qwen2_vl")), folder, seed, **how)


@dataclass(frozen=True)
class Exported(Subject):
    """A checkpoint with its traced and bound graphs; sparse graphs are made for a recipe on demand."""

    family: Family = family


def shared_export(name: str, config: dict[str, Any], seed: int) -> Exported:
    """One checkpoint and one trace of it for all processes of a test run."""
    path = shared.once(name, lambda here: random_checkpoint(config, here / "checkpoint", seed)) / "checkpoint"
    x = Exported(path, shared.own(name), families.find(config.get("model_type", "qwen2_vl")))

    def save(folder: Path) -> None:
        with traced_once():
            graphs = x.trace()
        for graph, model in graphs.items():
            (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())

    return replace(x, traced=lambda: shared.once(f"{name}.graphs", save))


def prompt(shape: Any, grids: list[tuple[int, int]], rng: np.random.Generator, words: int = 3) -> np.ndarray:
    """Token ids: words, pictures of the given merged sizes (rows, columns) with words between, words."""

    def text(n):
        return rng.integers(7, shape.vocab, n).tolist()

    ids = text(words)
    for h, w in grids:
        ids += [START] + [IMAGE] * (h * w) + [END] + text(words)
    return np.array(ids, np.int64)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **config}))


def patch_grids(x: Exported, layout) -> np.ndarray:
    """Pictures of the given merged sizes (rows, columns) as patch grids [pictures,3]."""
    return np.array([(1, h * x.tower.merge, w * x.tower.merge) for h, w in layout], np.int64).reshape(-1, 3)


def request_of(x: Exported, ids: np.ndarray, grid: np.ndarray, embeds: np.ndarray | Arrays | None) -> Request:
    """A prompt with pictures of these patch grids and embeddings, or all outputs of a tower by name."""
    layouts = tuple(Layout((t, h // x.tower.merge, w // x.tower.merge)) for t, h, w in grid.tolist())
    seen = embeds if isinstance(embeds, dict) else {"image_embeds": embeds}
    pictures = Pictures(seen, layouts) if layouts else x.tower.no_pictures() if x.tower else Pictures()
    return Request.of(ids, pictures, x.family, x.shape, x.weights[x.family.embedding])


def numbered(image_mask: np.ndarray) -> np.ndarray:
    """[B,S] int64: the number of the picture that a token belongs to where runs of image tokens are pictures; else -1."""
    before = np.pad(image_mask, ((0, 0), (1, 0)))[:, :-1]
    return np.where(image_mask, (image_mask & ~before).cumsum(1) - 1, -1)


def request(x, seed, layout=((3, 4), (2, 2))):
    """A prompt with pictures of random embeddings, ready to run."""
    rng = np.random.default_rng(seed)
    ids = prompt(x.shape, list(layout), rng)
    tokens = int((ids == x.shape.image_token).sum())
    seen = {port.name: rng.standard_normal((tokens, *port.row)).astype(np.float32) for port in x.tower.outputs}
    return request_of(x, ids, patch_grids(x, layout), seen)
