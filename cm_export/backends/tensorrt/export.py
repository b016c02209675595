"""A bundle's graphs, lowered for one TensorRT version, with one weight file of their own: what a builder reads.

folder/vision.onnx, prefill.onnx, decode.onnx      plugin nodes or written out, typed, shapes with their ranges
folder/weights.fp16.safetensors                    16-bit copies and the few float32 weights, shared by all of them
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...base import dims
from ...base.core_index import neuron_count
from ...bundle import weights as weight_files
from ...bundle.graph_facts import ports
from ...bundle.weights import Planned, WeightFile
from ...families import Range, Shape, Tower
from ...quant.precision import PRECISIONS
from ...quant.scheme import Scheme
from ...recipe.recipe import Recipe
from ...surgery.bind_weights import point_at
from ..onnxruntime.halve import as_half
from .lower import DECODES, PLUGINS, for_parser, lower
from .quantize import Part, Parts, quantize_graph, readers
from .targets import Target

INDEX_INPUTS = ("core_neurons", "core_tokens", "ffn.")  # graph inputs that say what decode reads
_ONE_PROMPT = {dims.BATCH: (1, 1, 1)}  # prompts and pictures are read one at a time
_TOP = 3840  # TopK's largest k
_PIECE = 1 << 25  # bytes of a weight that are converted at a time


@dataclass(frozen=True)
class Source:
    """The portable graphs that are lowered: of a bundle, or of one that is being built."""

    graph: Callable[[str], Path | onnx.ModelProto]
    graphs: tuple[str, ...]
    weights: WeightFile
    shape: Shape
    recipe: Recipe
    tower: Tower | None = None

    @classmethod
    def of(cls, bundle: Any) -> "Source":
        graphs = tuple(bundle.manifest["graphs"])
        return cls(bundle.graph, graphs, bundle.weights, bundle.shape, bundle.recipe, bundle.tower)

    def chosen(self, graphs: Iterable[str] | None = None) -> tuple[str, ...]:
        """Graphs to build: those asked for that exist; a later question's graph has no TensorRT form yet."""
        if graphs is None:
            graphs = [g for g in self.graphs if g != "turn" and (self.recipe.engine.dense or not g.endswith("_dense"))]
        return tuple(g for g in graphs if g in self.graphs)


def write_graphs(source: Source, folder: Path, target: Target, graphs: Iterable[str] | None = None) -> dict[str, Any]:
    """Write the lowered graphs and their weights into `folder`; returns what they are.

    {"version", "kv", "capacity", "precision", "graphs": {name: {"inputs", "outputs", "profile": {input: [min, opt, max]},
    "plugins": {op: how many}, "plugin_nodes": [names], "index_inputs", "weight_bytes"}}}. Raises InputError, SurgeryError.
    """
    engine, out, models = source.recipe.engine, {}, {}
    parts: Parts = {}
    ranges = axis_ranges(source.recipe, source.shape, source.tower)
    for name in source.chosen(graphs):
        models[name], packed = lowered_with_parts(source, name, target)
        parts |= packed
        out[name] = describe(models[name], ranges | ({} if name in DECODES else _ONE_PROMPT), target)
    file = weight_file(engine.precision)
    index = _write_weights(source.weights, folder / file, models.values(), parts)
    for name, model in models.items():
        _point_at(model, file, index)
        out[name]["weight_bytes"] = sum(index[w].length for w in {_key(t) for t in _external(model)})
        onnx.save(for_parser(model, target), folder / f"{name}.onnx")
    return {
        "version": target.name,
        "kv": target.kv,
        "capacity": engine.capacity,
        "precision": engine.precision,
        "weights": file,
        "graphs": out,
    }


def lowered(
    source: Source, name: str, target: Target, precision: str | None = None, weights: Path | None = None
) -> onnx.ModelProto:
    """One graph for `target`, functions of plugin ops in it, its weights in the bundle's own file.

    `weights`: a folder of `write_graphs`, whose weight file takes the place of that one.
    """
    model, _ = lowered_with_parts(source, name, target, precision)
    if weights:
        file = weight_file(source.recipe.engine.precision)
        _point_at(model, file, weight_files.index(weights / file))
    return model


def lowered_with_parts(
    source: Source, name: str, target: Target, precision: str | None = None
) -> tuple[onnx.ModelProto, Parts]:
    """The same, and how the initializers that hold packed weights are made."""
    engine, graph = source.recipe.engine, source.graph(name)
    model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    chosen = PRECISIONS[precision or engine.precision]
    model = lower(model, name, target, source.weights.tensors, engine.capacity, engine.max_prompt, chosen.products)
    return model, quantize_graph(model, chosen, target.plugins) if chosen.packs else {}


def weight_file(precision: str) -> str:
    return f"weights.{precision}.safetensors"


def axis_ranges(recipe: Recipe, shape: Shape, tower: Tower | None) -> dict[str, Range]:
    """Smallest, likely and largest length of every dynamic axis, from the recipe: the only place where they are written."""
    e = recipe.engine
    share = neuron_count(recipe.neurons.share, shape.ffn) if recipe.neurons.policy != "dense" else shape.ffn
    kept = min(e.max_prompt, _TOP)
    return {
        dims.BATCH: (1, e.max_batch, e.max_batch),  # requests that decode together
        dims.PROMPT: (2, max(2, e.max_prompt // 2), e.max_prompt),
        dims.KEPT: (1, max(1, kept // 4), kept),
        f"{dims.KEPT}_first": (1, max(1, kept // 2), kept),
        **(tower.axis_ranges(e.max_patches) if tower else {}),
        dims.PICTURES: (1, 1, 64),
        dims.CORE_NEURONS: (1, share, shape.ffn),
        dims.CORE_TOKENS: (1, max(1, e.capacity // 4), e.capacity),
    }


def describe(model: onnx.ModelProto, ranges: dict[str, Range], target: Target) -> dict[str, Any]:
    """Inputs and outputs with their types and axes, profiles, plugin nodes and index inputs of a lowered graph."""
    inputs, outputs = (ports(values) for values in (model.graph.input, model.graph.output))
    own = [n for n in model.graph.node if n.op_type in PLUGINS and target.plugins]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "profile": {v["name"]: _profile(v, ranges) for v in inputs},
        "plugins": {op: sum(n.op_type == op for n in own) for op in PLUGINS if own},
        "plugin_nodes": [n.name for n in own],
        "index_inputs": [v["name"] for v in inputs if v["name"].startswith(INDEX_INPUTS)],
    }


def _profile(value: dict[str, Any], ranges: dict[str, Range]) -> list[list[int]]:
    """[min, opt, max] shapes; layers that differ in their number of neurons have axes core_neurons.0, core_neurons.1, .."""

    def length(axis: int | str, i: int) -> int:
        return axis if isinstance(axis, int) else ranges[axis if axis in ranges else axis.partition(".")[0]][i]

    return [[length(axis, i) for axis in value["shape"]] for i in range(3)]


# ------------------------------------------------------------------------------------------------- weights
def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def _key(tensor: onnx.TensorProto) -> str:
    """Its name in the new file. A weight may be read in two types, each is written once."""
    return tensor.name if tensor.data_type != onnx.TensorProto.FLOAT else f"{tensor.name}/float32"


def _write_weights(
    stored: WeightFile, file: Path, models: Iterable[onnx.ModelProto], parts: Parts
) -> dict[str, weight_files.Tensor]:
    planned: dict[str, Planned] = {}
    fits: dict[tuple[str, Scheme], dict[str, Callable[[], np.ndarray]]] = {}
    for tensor in (t for model in models for t in _external(model)):
        if _key(tensor) in planned:
            continue
        part = parts.get(tensor.name)
        if part is None:
            planned[_key(tensor)] = _planned(stored, tensor)
            continue
        fit = part.weight, part.scheme
        if fit not in fits:
            fits[fit] = readers(stored, *fit)
        planned[_key(tensor)] = _packed(stored, _key(tensor), part, fits[fit][part.kind])
    weight_files.write(file, list(planned.values()))
    return weight_files.index(file)


def _planned(stored: WeightFile, tensor: onnx.TensorProto) -> Planned:
    name, dtype = tensor.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    source = stored.tensors[name]
    row = max(1, source.length // max(1, source.shape[0] if source.shape else 1))

    def read() -> Iterator[np.ndarray]:
        rows = np.atleast_1d(stored[name])
        for at in range(0, len(rows), max(1, _PIECE // row)):
            yield as_half(rows[at : at + max(1, _PIECE // row)], dtype, name)
        stored.release()

    return Planned(_key(tensor), dtype, source.shape, read)


def _packed(stored: WeightFile, key: str, part: Part, make: Callable[[], np.ndarray]) -> Planned:
    def read() -> Iterator[np.ndarray]:
        yield make()
        stored.release()

    return Planned(key, part.dtype, part.shape, read)


def _point_at(model: onnx.ModelProto, file: str, index: dict[str, weight_files.Tensor]) -> None:
    for tensor in _external(model):
        point_at(tensor, file, index[_key(tensor)])
