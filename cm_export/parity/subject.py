"""What is proved: one checkpoint with its traced graphs, the sparse ones of any recipe, and prompts that are asked of both sides.

checkpoint -> weights, dense graphs -> graphs of a recipe -> Backend, Runner         Prompt -> Request    (ours)
           -> stock transformers                                                     Prompt -> Stock      (theirs)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import families
from ..backends.onnxruntime.backend import Backend
from ..bundle import weights
from ..bundle.bundle import Bundle
from ..bundle.names import core_row_names
from ..families import IMAGE, Arrays, Family, Picture, Pictures
from ..host.request import Request
from ..host.runner import Runner
from ..recipe.recipe import Recipe
from ..source import model as hf
from ..source import trace
from ..source.probe import words_of
from ..source.quiet import quiet
from ..surgery import pipeline
from ..surgery.neuron_constants import neuron_constants

Graphs = dict[str, onnx.ModelProto]


@dataclass(frozen=True)
class Prompt:
    """Token ids [S] int64 in which pictures have their image tokens."""

    pictures: tuple[Picture, ...]
    ids: np.ndarray
    is_image: np.ndarray  # [S] bool


@dataclass(frozen=True)
class Stock:
    """What stock transformers answers to a prompt: greedy ids, logits [N,V] before each, keys and values [Hk,S,d] by name."""

    ids: list[int]
    logits: np.ndarray
    cache: Arrays


@dataclass(frozen=True)
class Subject:
    """A checkpoint of `family` at `path`; `folder` takes its weight file.

    traced: makes a folder of the dense graphs, or finds it; None: they are traced here. number: by which the
    policies of several subjects go around.
    """

    path: Path
    folder: Path
    family: Family
    traced: Callable[[], Path] | None = None
    number: int = 0

    @cached_property
    def config(self) -> dict[str, Any]:
        """transformers' normalised configuration."""
        return hf.read_config(self.path)

    @cached_property
    def shape(self) -> families.Shape:
        """Sizes of the decoder."""
        return self.family.shape(self.config)

    @cached_property
    def tower(self) -> families.Tower | None:
        """The vision tower."""
        return self.family.tower(self.config)

    @property
    def sees(self) -> families.Tower:
        """The vision tower of a model that has one."""
        assert self.tower is not None  # asked only of models that see
        return self.tower

    @cached_property
    def model(self) -> Any:
        """Stock transformers, untouched by our wrappers."""
        return hf.load(self.path, self.family)

    @cached_property
    def weights(self) -> weights.WeightFile:
        """Every parameter, as a bundle holds it."""
        file = self.folder / weights.FILE
        weights.write(file, [hf.planned(n, p, self.family) for n, p in self.model.named_parameters()])
        return weights.WeightFile(file)

    @cached_property
    def dense(self) -> Graphs:
        """The traced graphs, their weights bound."""
        if self.traced is None:
            return self.trace()
        folder = self.traced()
        return {name: onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in self.shape.traced}

    def trace(self) -> Graphs:
        """Trace them now."""
        skeleton, out = hf.skeleton(self.path, self.family), {}
        for spec in trace.specs(skeleton, self.family, self.config):
            out[spec.name], _ = pipeline.dense(spec.name, trace.trace(spec), self.weights.tensors, self.family)
        return out

    def graphs(self, recipe: Recipe, calibration: Any = None) -> Graphs:
        """All graphs under a recipe, as fresh copies."""
        constants = neuron_constants(recipe, self.weights, self.family, self.shape, calibration)
        prefill, _ = pipeline.sparse_prefill(copied(self.dense["prefill"]), self.family, self.shape, recipe, constants)
        decode, _ = pipeline.sparse_decode(copied(self.dense["decode"]), self.family, self.shape, recipe)
        dense = {n if n == "vision" else f"{n}_dense": copied(p) for n, p in self.dense.items()}
        if recipe.has_turn:
            dense["turn"], _ = pipeline.turn(copied(self.dense["decode"]), self.family, self.shape, recipe, constants)
        return dense | {"prefill": prefill, "decode": decode}

    def backend(self, recipe: Recipe | None = None, calibration: Any = None) -> Backend:
        """Sessions over the graphs of a recipe."""
        graphs = self.graphs(recipe or Recipe(), calibration)
        rows = core_row_names(self.family, self.shape.layers)
        return Backend(lambda n: copied(graphs[n]), self.weights, 1, row_names=rows, heads=self.shape.heads)

    def runner(self, recipe: Recipe) -> Runner:
        """What asks them, as it asks a bundle."""
        return Runner(_InMemory(self, recipe), threads=1, backend="onnxruntime")

    def prompt(
        self, pictures: Sequence[Picture], rng: np.random.Generator, words: int = 3, between: int | None = None
    ) -> Prompt:
        """So many random words before and after pictures, and `between` two of them (None: as many).

        The marks that stand between the image tokens of one picture become a few words, too.
        """
        known = words_of(self.shape, self.config)

        def text(count: int) -> list[int]:
            return rng.choice(known, count).tolist()

        ids = text(words)
        for number, picture in enumerate(pictures, 1):
            token = self.shape.clip_token if picture.layout.is_clip else self.shape.image_token
            for is_image, run in itertools.groupby(picture.layout.written(IMAGE), lambda c: c == IMAGE):
                count = len(list(run))
                ids += [token] * count if is_image else text(1 + count % 3)
            ids += text(words if between is None or number == len(pictures) else between)
        found = np.array(ids, np.int64)
        seen = [self.shape.image_token, *(self.shape.clip_token for p in pictures if p.layout.is_clip)]
        return Prompt(tuple(pictures), found, np.isin(found, seen))

    def request(self, runner: Runner, prompt: Prompt) -> Request:
        """The prompt as our graphs are asked it, each picture through the vision graph by itself."""
        parts = [Pictures(runner.backend.vision(self.sees.feeds([p])), (p.layout,)) for p in prompt.pictures]
        return runner.request(prompt.ids, Pictures.joined(parts))

    def stock(self, prompt: Prompt, steps: int) -> Stock:
        """What transformers' own generate() answers: so many greedy tokens, none of which ends the answer."""
        import torch

        given = self.sees.stock(prompt.pictures, prompt.is_image) if prompt.pictures else {}
        ids, settings = torch.from_numpy(prompt.ids)[None], self.model.generation_config
        ends, settings.eos_token_id = settings.eos_token_id, None
        try:
            with torch.no_grad(), quiet():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
                    return_dict_in_generate=True, output_logits=True, **{n: torch.from_numpy(v) for n, v in given.items()},
                )  # fmt: skip
        finally:
            settings.eos_token_id = ends
        cache, size = {}, ids.shape[1]
        for i, layer in enumerate(out.past_key_values.layers):
            cache[f"past.{i}.key"] = layer.keys[0, :, :size].numpy()
            cache[f"past.{i}.value"] = layer.values[0, :, :size].numpy()
        return Stock(out.sequences[0, size:].tolist(), torch.cat(out.logits).numpy(), cache)


class _InMemory(Bundle):
    """What a runner reads of a bundle, of graphs that were not written into one."""

    def __init__(self, of: Subject, recipe: Recipe):
        self.path, self.family, self.shape, self.tower, self.config = of.path, of.family, of.shape, of.tower, of.config
        self.recipe, self.calibration, self.packed, self.thresholds = recipe, None, None, None
        self.manifest, self.weights, self._graphs = {}, of.weights, of.graphs(recipe)

    def graph(self, name: str) -> Any:
        """A copy of one graph."""
        return copied(self._graphs[name])

    def processor(self, name: str) -> Path | None:
        """There is none."""
        return None


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, to be changed."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    return out
