"""Random tiny checkpoints, generated and not hand-picked, and what tests need of one after export."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import shared
import torch
import transformers

from cm_export import families
from cm_export.backends.onnxruntime.backend import Backend
from cm_export.bundle import weights
from cm_export.bundle.names import core_row_names
from cm_export.families import Arrays, Family, Layout, Pictures
from cm_export.host.request import Request
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf
from cm_export.source import trace
from cm_export.surgery import pipeline
from cm_export.surgery.neuron_constants import neuron_constants

IMAGE, VIDEO, START, END = 5, 6, 3, 4
family = families.find("qwen2_vl")


def random_config(seed: int) -> dict[str, Any]:
    """A valid Qwen2-VL configuration: head counts, widths, rope, activation, tying and vision sizes drawn at random."""
    r = random.Random(seed)
    kv, group, head_dim = r.choice([1, 2, 3]), r.choice([1, 2, 3, 7]), r.choice([8, 12, 16])
    hidden = kv * group * head_dim
    half = head_dim // 2
    a = r.randint(1, half - 2)
    b = r.randint(1, half - a - 1)
    rope = {"rope_type": "default", "rope_theta": r.choice([50.0, 1e4, 1e6]), "mrope_section": [a, b, half - a - b]}
    if r.random() < 0.3:
        rope |= {"rope_type": "linear", "factor": 2.0}
    tied = r.random() < 0.5
    vision_heads = r.choice([1, 2, 4])
    return {
        "text_config": {
            "vocab_size": r.choice([61, 96, 131]),
            "hidden_size": hidden,
            "intermediate_size": r.choice([33, 64, 97, 160]),
            "num_hidden_layers": r.randint(2, 3),
            "num_attention_heads": kv * group,
            "num_key_value_heads": kv,
            "hidden_act": r.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"]),
            "rms_norm_eps": r.choice([1e-5, 1e-6]),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "rope_parameters": rope,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "depth": r.randint(1, 2),
            "embed_dim": vision_heads * r.choice([8, 16]),
            "hidden_size": hidden,
            "num_heads": vision_heads,
            "mlp_ratio": r.choice([2, 4]),
            "patch_size": r.choice([2, 4, 6]),
            "spatial_merge_size": r.choice([1, 2, 3]),
            "temporal_patch_size": r.choice([1, 2]),
            "in_channels": 3,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": tied,
    }


def random_text_config(model_type: str, seed: int, **fixed: Any) -> dict[str, Any]:
    """A valid configuration of a decoder without vision: sizes, rope, activation, tying and biases drawn at random."""
    r = random.Random(seed)
    kv, group, head_dim = r.choice([1, 2, 3]), r.choice([2, 3, 4]), r.choice([8, 12, 16])
    rope = {"rope_type": "default", "rope_theta": r.choice([50.0, 1e4, 1e6])}
    config = {
        "model_type": model_type,
        "vocab_size": r.choice([61, 96, 131]),
        "hidden_size": kv * group * head_dim,
        "intermediate_size": r.choice([33, 64, 97]),
        "num_hidden_layers": r.randint(2, 3),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "hidden_act": r.choice(["silu", "silu", "gelu", "relu"]),
        "rms_norm_eps": r.choice([1e-2, 1e-6]),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": r.random() < 0.5,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return config | fixed


def random_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0, **how: Any) -> Path:
    """Save a stock transformers checkpoint with weights large enough that a wrong mask or position shows.

    `how`: arguments of save_pretrained, such as max_shard_size.
    """
    torch.manual_seed(seed)
    kind = families.find(config.get("model_type", "qwen2_vl"))
    model_class = getattr(transformers, kind.model_class)
    model = model_class(model_class.config_class(**config)).eval()
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


@dataclass(frozen=True)
class Exported:
    """A checkpoint with its traced and bound graphs; sparse graphs are made for a recipe on demand."""

    path: Path
    folder: Path
    family: Family = family
    traced: Callable[[], Path] | None = None  # makes a folder of the dense graphs, or finds it

    @cached_property
    def config(self) -> dict[str, Any]:
        return hf.read_config(self.path)

    @cached_property
    def shape(self) -> families.Shape:
        return self.family.shape(self.config)

    @cached_property
    def tower(self) -> Any:
        return self.family.tower(self.config)

    @cached_property
    def model(self) -> Any:
        """Stock transformers, untouched by our wrappers."""
        return hf.load(self.path, self.family)

    @cached_property
    def weights(self) -> weights.WeightFile:
        file = self.folder / weights.FILE
        weights.write(file, [hf.planned(n, p, self.family) for n, p in self.model.named_parameters()])
        return weights.WeightFile(file)

    @cached_property
    def dense(self) -> dict[str, onnx.ModelProto]:
        if self.traced is None:
            return self.trace()
        folder = self.traced()
        return {name: onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in self.shape.traced}

    def trace(self) -> dict[str, onnx.ModelProto]:
        skeleton = hf.skeleton(self.path, self.family)
        out = {}
        for spec in trace.specs(skeleton, self.family, self.config):
            out[spec.name], _ = pipeline.dense(spec.name, trace.trace(spec), self.weights.tensors, self.family)
        return out

    def graphs(self, recipe: Recipe, calibration: Any = None) -> dict[str, onnx.ModelProto]:
        """All graphs under a recipe, as fresh copies."""
        constants = neuron_constants(recipe, self.weights, self.family, self.shape, calibration)
        prefill, _ = pipeline.sparse_prefill(copy(self.dense["prefill"]), self.family, self.shape, recipe, constants)
        decode, _ = pipeline.sparse_decode(copy(self.dense["decode"]), self.family, self.shape, recipe)
        dense = {n if n == "vision" else f"{n}_dense": copy(p) for n, p in self.dense.items()}
        if recipe.has_turn:
            dense["turn"], _ = pipeline.turn(copy(self.dense["decode"]), self.family, self.shape, recipe, constants)
        return dense | {"prefill": prefill, "decode": decode}

    def backend(self, recipe: Recipe | None = None, calibration: Any = None) -> Backend:
        graphs = self.graphs(recipe or Recipe(), calibration)
        rows = core_row_names(self.family, self.shape.layers)
        return Backend(lambda n: copy(graphs[n]), self.weights, 1, row_names=rows, heads=self.shape.heads)


def shared_export(name: str, config: dict[str, Any], seed: int) -> Exported:
    """One checkpoint and one trace of it for all processes of a test run."""
    path = shared.once(name, lambda here: random_checkpoint(config, here / "checkpoint", seed)) / "checkpoint"
    x = Exported(path, shared.own(name), families.find(config.get("model_type", "qwen2_vl")))

    def save(folder: Path) -> None:
        for graph, model in x.trace().items():
            (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())

    return replace(x, traced=lambda: shared.once(f"{name}.graphs", save))


def copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    return out


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
    merge = x.tower.merge if x.tower else 1
    layouts = tuple(Layout((t, h // merge, w // merge)) for t, h, w in grid.tolist())
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
