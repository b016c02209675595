"""Inputs with the answers of ONNX Runtime to the same graphs and weights: what an engine on the device must repeat.

    probe          graph     asks                                        compared
    vision         vision    one smooth picture                          embeddings
    prefill-all    prefill   every token kept: no choice, no ties        logits, scores, cache
    prefill-core   prefill   the recipe's budget                         ids of the tokens kept
    decode-core    decode    one step with the recipe's neurons          logits, cache with its new row
    decode-full    decode    the same with every neuron                  the same

Rows of the cache that nothing may read hold its largest number, so that a kernel that reads them shows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil

from ..backends._export_tensorrt import Source, lowered
from ..backends._targets import Target
from ..backends.onnxruntime import CoreRows
from ..core_set import choose
from ..errors import CmExportError
from ..gates_lowered import HALF_LIMIT
from ..probe import probe as synthetic
from ..request import Request, core_row_names, kept_slots, prefill_feeds, sparse_feeds
from .trtexec import shapes

Arrays = dict[str, np.ndarray]
SCORE_LIMIT = 0.1  # of core_scores, some of which are counts of tokens and jump
SAME_IDS = 0.9  # least share of the kept tokens: nearly equal scores may fall otherwise in another order of additions
_MOST = 1 << 16  # numbers kept of an output; of a larger one every n-th, n odd so that it meets every column


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

    Raises CmExportError where memory does not suffice for the answers.
    """
    shape, recipe, weights, family = source.shape, source.recipe, source.weights, bundle.family
    graphs = _Lowered(source, target, folder)
    given = synthetic(shape, bundle.config)
    embeds = []
    at = 0
    for i, grid in enumerate(given["grid"]):  # one picture at a time, as the engine's profile says
        patches = int(grid.prod())
        feeds = family.vision_inputs(given["pixel_values"][at : at + patches], grid[None], shape.merge)
        found, at = graphs.run("vision", feeds), at + patches
        embeds.append(found["image_embeds"].astype(np.float32))
        if i == 0:
            yield "vision", Probe("vision", graphs.only("vision", feeds), found, {"patches": patches})
    pictures = np.concatenate(embeds) if embeds else None
    request = Request.of(given["input_ids"], given["grid"], family, shape, weights, pictures)

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
    core = choose(everything, recipe.neurons, shape, bundle.calibration)
    word = int(given["input_ids"][0])
    for name, full in (("decode-core", False), ("decode-full", True)):
        if full and (core.counts == shape.ffn).all():
            return
        feeds = graphs.only("decode", _decode_feeds(request, recipe, shape, everything, word))
        feeds |= graphs.only("decode", _neurons(core, shape, full, weights, family))
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
    """Raw numbers in a file that is named after them."""
    content = np.ascontiguousarray(value).tobytes()
    file = folder / "probe" / f"{hashlib.sha256(content).hexdigest()[:16]}.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file.relative_to(folder).as_posix()


def _decode_feeds(request: Request, recipe: Any, shape: Any, prefill: Arrays, word: int) -> Arrays:
    """One step after a prefill that kept every token: the static cache with its mask, the row to write, rows to read."""
    capacity, at = recipe.engine.capacity, request.tokens
    feeds = request.step_feeds(word, 0)
    feeds["attention_mask"] = (np.arange(capacity) <= at).astype(np.int64)[None]
    feeds["write_index"] = np.array([at], np.int64)
    feeds["core_tokens"] = np.arange(at + 1, dtype=np.int32)[None]
    for i in range(shape.layers):
        for part in ("key", "value"):
            rows = prefill[f"present.{i}.{part}"]
            past = np.full((*rows.shape[:2], capacity, rows.shape[3]), np.abs(rows).max(), rows.dtype)
            past[:, :, : rows.shape[2]] = rows
            feeds[f"past.{i}.{part}"] = past
    return feeds


def _neurons(core: Any, shape: Any, full: bool, weights: Any, family: Any) -> Arrays:
    """core_neurons (for every layer, or each its own), and what stands in for the others."""
    every = np.broadcast_to(np.arange(shape.ffn, dtype=np.int32), (shape.layers, 1, shape.ffn))
    index = every if full else core.neurons
    counts = [shape.ffn] * shape.layers if full else core.counts.tolist()
    feeds = {"core_neurons": index} | {f"core_neurons.{i}": index[i, :, :k] for i, k in enumerate(counts)}
    bias = np.zeros((shape.layers, 1, shape.hidden), np.float32)
    if core.mean_z is not None and not full:
        bias = core.constants(CoreRows(weights, core_row_names(family, shape.layers)))["core_bias"]
    return feeds | {"core_bias": bias}


class _Lowered:
    """The graphs as the builder gets them, over the weights that were written; plugin nodes run as their functions."""

    def __init__(self, source: Source, target: Target, folder: Path):
        self.source, self.target, self.folder = source, target, folder
        self._name, self._session = "", None

    def session(self, name: str) -> ort.InferenceSession:
        if name != self._name:
            self._name, self._session = "", None  # one at a time: each holds a float32 copy of its weights
            self._check_memory()
            options = ort.SessionOptions()
            # One thread: with several, sums may fall in another order, and the archive would differ in its last bits.
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
            model = lowered(self.source, name, self.target, weights=self.folder)
            self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            self._name = name
        return self._session

    def only(self, name: str, feeds: Arrays) -> Arrays:
        """Of some feeds those that the graph takes."""
        return {i.name: feeds[i.name] for i in self.session(name).get_inputs() if i.name in feeds}

    def run(self, name: str, feeds: Arrays) -> Arrays:
        session = self.session(name)
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))

    def _check_memory(self) -> None:
        need = 3 * sum(f.stat().st_size for f in self.folder.glob("weights.*"))
        free = psutil.virtual_memory().available
        if need > free:
            what = f"the expected answers need about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
            raise CmExportError(what, where="pack", fix="pack on a machine with more memory")
