"""Probes: inputs, and what ONNX Runtime answers with the archive's graphs and weights. Engines on the device must agree.

    probe          graph     asks                                        compared
    vision         vision    one smooth picture                          embeddings
    prefill-all    prefill   every token kept: no choice, no ties        logits, scores, cache
    prefill-core   prefill   the recipe's budget                         ids of the tokens kept
    decode-core    decode    one step with the recipe's neurons          logits, cache with its new row
    decode-full    decode    the same with every neuron                  the same

Rows of the cache that must not be read hold its largest number, so that a kernel that reads one gives a wrong answer.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ...backends.tensorrt.export import Source, listed_block
from ...backends.tensorrt.rehearsal import LoweredGraphs, listed, static_rows, step_feeds
from ...backends.tensorrt.targets import Target
from ...base.errors import CmExportError
from ...base.units import size
from ...build.gates_lowered import HALF_LIMIT
from ...bundle.names import core_row_names
from ...families import Pictures, Shape
from ...host.core_rows import CoreRows
from ...host.core_set import CoreSet, choose, padded
from ...host.request import Request, kept_slots, prefill_feeds, sparse_feeds
from ...source.probe import probe as synthetic
from .trtexec import shapes

Arrays = dict[str, np.ndarray]
SCORE_LIMIT = 0.1  # of core_scores; some policies count tokens, and a count changes by whole numbers
SAME_IDS = 0.9  # least share of the kept tokens: nearly equal scores may swap when sums are added in another order
_MOST = 1 << 16  # numbers kept of an output; of a larger one every n-th, with an odd n, so that every column is sampled


@dataclass(frozen=True)
class Probe:
    """One run of one graph. `expected`: the outputs that are compared."""

    graph: str
    feeds: Arrays
    expected: Arrays
    about: dict[str, int]  # sizes, for the report
    bench: bool = False


def make(bundle: Any, source: Source, target: Target, folder: Path) -> Iterator[tuple[str, Probe]]:
    """Name and Probe of each, in the order of running. `folder`: what `write_graphs` wrote.

    Raises CmExportError if there is too little memory for the answers.
    """
    shape, recipe, weights, family, tower = source.shape, source.recipe, source.weights, bundle.family, source.tower
    # One thread: with several, sums may fall in another order, and the archive would differ in its last bits.
    graphs = LoweredGraphs(source, target, folder, threads=1, check=lambda: _check_memory(folder))
    given = synthetic(shape, tower, bundle.config)
    seen = []
    for i, picture in enumerate(given.pictures):  # one picture at a time, as the engine's profile says
        assert tower is not None  # without one there are no pictures
        feeds = tower.feeds([picture])
        found = graphs.run("vision", feeds)
        seen.append(Pictures({n: v.astype(np.float32) for n, v in found.items()}, (picture.layout,)))
        if i == 0:
            yield "vision", Probe("vision", graphs.only("vision", feeds), found, {"patches": len(picture.pixels)})
    request = Request.of(given.ids, Pictures.joined(seen), family, shape, weights[family.embedding])

    def prefill(share: float | None) -> tuple[Arrays, Arrays]:
        budget = sparse_feeds(request, recipe, share)
        feeds = graphs.only("prefill", prefill_feeds(request) | budget | kept_slots(request, budget))
        return feeds, graphs.run("prefill", feeds)

    about = {"tokens": request.tokens, "image_tokens": request.image_tokens}
    feeds, everything = prefill(1.0)
    yield "prefill-all", Probe("prefill", feeds, everything, about)
    if "kept_tokens" in everything:
        feeds, chosen = prefill(None)
        yield "prefill-core", Probe("prefill", feeds, {"kept_tokens": chosen["kept_tokens"]}, about)
    thresholds = bundle.thresholds if recipe.neurons.by_threshold else None
    core, block = (
        choose(everything, recipe.neurons, shape, bundle.calibration, None, thresholds),
        listed_block(recipe, target),
    )
    word = int(given.ids[0])
    for name, full in (("decode-core", False), ("decode-full", True)):
        if full and core.is_whole:
            return
        feeds = graphs.only("decode", _decode_feeds(request, recipe, shape, everything, word))
        down = CoreRows(weights, core_row_names(family, shape.layers)).down
        feeds |= graphs.only("decode", _neurons(CoreSet.whole(shape) if full else core, down, block))
        read = feeds["core_tokens"].shape[1] if "core_tokens" in feeds else recipe.engine.capacity
        about = {"neurons": shape.ffn if full else int(core.counts.max()), "of": shape.ffn, "cache_rows": read}
        yield name, Probe("decode", feeds, graphs.run("decode", feeds), about, bench=True)


def write(probe: Probe, dynamic: set[str], folder: Path) -> dict[str, Any]:
    """Write the numbers of a probe into `folder`/probe and return its entry of the manifest.

    `dynamic`: inputs of the graph whose shape trtexec has to be told. What two probes share is written once.
    """
    inputs = {tensor: _file(value, folder) for tensor, value in probe.feeds.items()}
    outputs = {}
    for tensor, value in probe.expected.items():
        ids = value.dtype.kind in "iu"
        stored = value.astype(np.int64 if ids else np.float32)
        every = max(1, -(-value.size // _MOST)) | 1
        outputs[tensor] = {
            "file": _file(stored.ravel()[::every], folder),
            "stored": stored.dtype.name,
            "shape": list(value.shape),
            "every": every,
            "compare": "ids" if ids else "values",
            "limit": SAME_IDS if ids else SCORE_LIMIT if tensor == "core_scores" else HALF_LIMIT,
        }
    given = {n: list(v.shape) for n, v in probe.feeds.items() if n in dynamic}
    return {
        "graph": probe.graph,
        "shapes": shapes(given),
        "inputs": inputs,
        "outputs": outputs,
        "about": probe.about,
        "bench": probe.bench,
    }


def _file(value: np.ndarray, folder: Path) -> str:
    """Writes raw numbers into a file that is named by their hash."""
    content = np.ascontiguousarray(value).tobytes()
    file = folder / "probe" / f"{hashlib.sha256(content).hexdigest()[:16]}.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file.relative_to(folder).as_posix()


def _decode_feeds(request: Request, recipe: Any, shape: Shape, prefill: Arrays, word: int) -> Arrays:
    """One step after a prefill that kept every token: the static cache with its mask, the row to write, rows to read."""
    capacity = recipe.engine.capacity
    feeds = step_feeds(request, word, 0, capacity)
    for i in range(shape.layers):
        for part in ("key", "value"):
            rows = prefill[f"present.{i}.{part}"]
            feeds[f"past.{i}.{part}"] = static_rows(rows, capacity, fill=np.abs(rows).max())
    return feeds


def _neurons(core: CoreSet, down: list[np.ndarray], block: int) -> Arrays:
    """core_neurons (for every layer, or each its own) or thresholds, and what stands in for the others."""
    layers = range(len(core.counts))
    ids = padded([[core.of_layer(layer)] for layer in layers], block)
    slots = {f"core_slots.{i}": np.zeros(n // block, np.int32) for i, n in enumerate(core.counts.tolist())}
    out = slots | listed(ids, (core.counts // block).tolist()) | {"core_thresholds": core.least[None]}
    return out | {"core_bias": core.bias(down)[:, None]}


def _check_memory(folder: Path) -> None:
    need = 3 * sum(f.stat().st_size for f in folder.glob("weights.*"))
    free = psutil.virtual_memory().available
    if need > free:
        what = f"the expected answers need about {size(need)} of memory, {size(free)} are free"
        raise CmExportError(what, where="pack", fix="pack on a machine with more memory")
