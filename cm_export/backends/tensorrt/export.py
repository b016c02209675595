"""A bundle's graphs, lowered for one TensorRT version, with one weight file of their own: what a builder reads.

folder/vision.onnx, prefill.onnx, decode.onnx      plugin nodes or written out, typed, shapes with their ranges
folder/weights.fp16.safetensors                    16-bit copies and the few float32 weights, shared by all of them
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from ...surgery.halve import as_half
from . import active, predicted
from .lower import DECODES, PLUGINS, Sizes, for_parser, lower
from .quantize import Part, Parts, quantize_graph, readers
from .targets import Target

INDEX_INPUTS = ("core_neurons", "core_tokens", "core_thresholds", "ffn.")  # graph inputs that say what decode reads
SEVERAL = 17  # tokens that a dense decode engine reads at once: a draft of the guard, and the dense model's own
_ONE_PROMPT = {dims.BATCH: (1, 1, 1)}  # prompts and pictures are read one at a time
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
    predictor: WeightFile | None = None  # low-bit copies, where decode chooses its neurons by them

    @classmethod
    def of(cls, bundle: Any) -> "Source":
        graphs = tuple(bundle.manifest["graphs"])
        copies = bundle.predictor if bundle.recipe.neurons.in_decode else None
        return cls(bundle.graph, graphs, bundle.weights, bundle.shape, bundle.recipe, bundle.tower, copies)

    def chosen(self, graphs: Iterable[str] | None = None) -> tuple[str, ...]:
        """Graphs to build: those asked for that exist, else what [engine] says."""
        engine = self.recipe.engine
        if graphs is None:
            left_out = {"turn": not engine.turns}
            graphs = [g for g in self.graphs if not left_out.get(g, g.endswith("_dense") and not engine.dense)]
        return tuple(g for g in graphs if g in self.graphs)


def write_graphs(source: Source, folder: Path, target: Target, graphs: Iterable[str] | None = None) -> dict[str, Any]:
    """Write the lowered graphs and their weights into `folder`; returns what they are.

    {"version", "kv", "capacity", "precision", "block", "graphs": {name: {"inputs", "outputs", "profile": {input: [min, opt,
    max]}, "profiles": [one for each kind of call, where there are several], "plugins": {op: how many}, "plugin_nodes": [names],
    "index_inputs", "weight_bytes"}}}. Raises InputError, SurgeryError.
    """
    engine, out, models = source.recipe.engine, {}, {}
    parts: Parts = {}
    block = listed_block(source.recipe, target)
    ranges = axis_ranges(source.recipe, source.shape, source.tower, block)
    for name in source.chosen(graphs):
        models[name], packed = lowered_with_parts(source, name, target)
        parts |= packed
        own = ranges | ({} if name in DECODES else _ONE_PROMPT) | (turn_ranges(source.recipe) if name == "turn" else {})
        out[name] = describe(models[name], own, target, kinds_of_calls(name, own))
    file = weight_file(engine.precision)
    index = _write_weights(source, folder / file, models.values(), parts)
    for name, model in models.items():
        _point_at(model, file, index)
        out[name]["weight_bytes"] = sum(index[w].length for w in {_key(t) for t in _external(model)})
        onnx.save(for_parser(model, target), folder / f"{name}.onnx")
    return {
        "version": target.name,
        "kv": target.kv,
        "capacity": engine.capacity,
        "precision": engine.precision,
        "block": block,
        "weights": file,
        "graphs": out,
    }


def lowered(
    source: Source, name: str, target: Target, precision: str | None = None, weights: Path | None = None
) -> onnx.ModelProto:
    """One graph for `target`, functions of plugin ops in it, its weights in the bundle's own file.

    `weights`: a folder of `write_graphs`, whose weight file takes the place of that one.
    """
    model, _ = lowered_with_parts(source, name, target, precision, turned=weights is not None)
    if weights:
        file = weight_file(source.recipe.engine.precision)
        _point_at(model, file, weight_files.index(weights / file))
    return model


def lowered_with_parts(
    source: Source, name: str, target: Target, precision: str | None = None, turned: bool = True
) -> tuple[onnx.ModelProto, Parts]:
    """The same, and how the initializers that hold packed weights are made.

    `turned`: weights lie as plugins read them, in a file of `write_graphs`; else as in the bundle's own.
    """
    engine, graph = source.recipe.engine, source.graph(name)
    model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    chosen = PRECISIONS[precision or engine.precision]
    sizes = Sizes(engine.capacity, engine.max_prompt, listed_block(source.recipe, target))
    model = lower(model, name, target, source.weights.tensors, sizes, chosen.products)
    parts = active.turn(model) if turned and target.plugins else {}
    return model, parts | (quantize_graph(model, chosen, target.plugins, parts) if chosen.packs else {})


def listed_block(recipe: Recipe, target: Target) -> int:
    """Neighbours that an id of core_neurons stands for: where rows are gathered on the host, one."""
    neurons = recipe.neurons
    lists = target.plugins and neurons.policy != "dense" and not neurons.by_threshold
    return neurons.block if lists or neurons.in_decode else 1


def weight_file(precision: str) -> str:
    return f"weights.{precision}.safetensors"


def axis_ranges(recipe: Recipe, shape: Shape, tower: Tower | None, block: int = 1) -> dict[str, Range]:
    """Smallest, likely and largest length of every dynamic axis, from the recipe: the only place where they are written.

    `block`: neighbours that an id of core_neurons stands for.
    """
    e = recipe.engine
    share = neuron_count(recipe.neurons.share, shape.ffn) if recipe.neurons.policy != "dense" else shape.ffn
    slot = recipe.neurons.block
    kept = min(e.max_prompt, predicted.TOP)
    return {
        dims.BATCH: (1, e.max_batch, e.max_batch),  # requests that decode together
        dims.NEW: (1, 1, min(SEVERAL, e.capacity - 1)),
        dims.PROMPT: (2, max(2, e.max_prompt // 2), e.max_prompt),
        dims.KEPT: (1, max(1, kept // 4), kept),
        f"{dims.KEPT}_first": (1, max(1, kept // 2), kept),
        **(tower.axis_ranges(e.max_patches) if tower else {}),
        dims.PICTURES: (1, 1, 64),
        dims.CORE_NEURONS: (1, max(1, share // block), shape.ffn // block),
        predicted.SLOTS: (1, max(1, min(share // slot, predicted.TOP)), min(shape.ffn // slot, predicted.TOP)),
        dims.CORE_TOKENS: (1, max(1, e.capacity // 4), e.capacity),
    }


def turn_ranges(recipe: Recipe) -> dict[str, Range]:
    """Of a later question and what it is read over; the sums must hold in each of the three shapes that a builder looks at."""
    new, past = recipe.engine.max_prompt, recipe.engine.capacity - 1
    kept = min(past + new, predicted.TOP)
    return {
        dims.NEW: (1, min(32, new), new),
        dims.PAST: (1, max(1, past // 2), past),
        dims.CONTEXT: (2, min(32, new) + max(1, past // 2), new + past),
        dims.KEPT: (1, max(1, kept // 4), kept),
    }


def kinds_of_calls(name: str, ranges: dict[str, Range]) -> list[dict[str, Range]]:
    """Ranges for which a decode engine is tuned apart: one request, several, and several tokens of one."""
    most, new = ranges[dims.BATCH][2], ranges[dims.NEW][2] if name == "decode_dense" else 1
    one: Range = (1, 1, 1)
    kinds: list[dict[str, Range]] = [{dims.BATCH: one, dims.NEW: one}]
    if most > 1:
        kinds.append({dims.BATCH: (2, most, most), dims.NEW: one})
    if new > 1:
        kinds.append({dims.BATCH: one, dims.NEW: (2, new, new)})
    return kinds if name in DECODES and len(kinds) > 1 else []


def describe(
    model: onnx.ModelProto, ranges: dict[str, Range], target: Target, kinds: Sequence[dict[str, Range]] = ()
) -> dict[str, Any]:
    """Inputs and outputs with their types and axes, profiles, plugin nodes and index inputs of a lowered graph.

    `kinds`: narrower ranges, each a profile of its own.
    """
    inputs, outputs = (ports(values) for values in (model.graph.input, model.graph.output))
    own = [n for n in model.graph.node if n.op_type in PLUGINS and target.plugins]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "profile": {v["name"]: _profile(v, ranges) for v in inputs},
        **({"profiles": [{v["name"]: _profile(v, ranges | k) for v in inputs} for k in kinds]} if kinds else {}),
        "plugins": {op: count for op in PLUGINS if (count := sum(n.op_type == op for n in own))},
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
    source: Source, file: Path, models: Iterable[onnx.ModelProto], parts: Parts
) -> dict[str, weight_files.Tensor]:
    planned: dict[str, Planned] = {}
    stored, copies = source.weights, source.predictor
    fits: dict[tuple[str, Scheme, bool], dict[str, Callable[[], np.ndarray]]] = {}
    for tensor in (t for model in models for t in _external(model)):
        if _key(tensor) in planned:
            continue
        part = parts.get(tensor.name)
        if part is None:
            held = copies if copies is not None and tensor.name in copies else stored
            planned[_key(tensor)] = _planned(held, tensor)
            continue
        if part.scheme is None:
            planned[_key(tensor)] = _made(stored, _key(tensor), part, partial(_turned, stored, part))
            continue
        fit = part.weight, part.scheme, part.turned
        if fit not in fits:
            fits[fit] = readers(stored, *fit)
        planned[_key(tensor)] = _made(stored, _key(tensor), part, fits[fit][part.kind])
    weight_files.write(file, list(planned.values()))
    return weight_files.index(file)


def _planned(stored: WeightFile, tensor: onnx.TensorProto) -> Planned:
    name, source = tensor.name, stored.tensors[tensor.name]
    # Two codes to a byte are written as bytes.
    packed = tensor.data_type == onnx.TensorProto.INT4
    dtype = np.dtype(np.uint8 if packed else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    row = max(1, source.length // max(1, source.shape[0] if source.shape else 1))

    def read() -> Iterator[np.ndarray]:
        rows = np.atleast_1d(stored[name])
        for at in range(0, len(rows), max(1, _PIECE // row)):
            yield rows if packed else as_half(rows[at : at + max(1, _PIECE // row)], dtype, name)
        stored.release()

    return Planned(_key(tensor), dtype, source.shape, read)


def _turned(stored: WeightFile, part: Part) -> np.ndarray:
    return np.ascontiguousarray(as_half(stored[part.weight], part.dtype, part.weight).T)


def _made(stored: WeightFile, key: str, part: Part, make: Callable[[], np.ndarray]) -> Planned:
    def read() -> Iterator[np.ndarray]:
        yield make()
        stored.release()

    return Planned(key, part.dtype, part.shape, read)


def _point_at(model: onnx.ModelProto, file: str, index: dict[str, weight_files.Tensor]) -> None:
    for tensor in _external(model):
        point_at(tensor, file, index[_key(tensor)])
