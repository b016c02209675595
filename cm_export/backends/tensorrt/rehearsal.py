"""Lowered graphs on ONNX Runtime, over the weights that were written for the builder, fed as an engine is.

LoweredGraphs(source, target, folder).run("decode", feeds)      plugin nodes run as their functions
past [B,Hk,T,d] -> static_rows -> [B,Hk,C,d]                    step_feeds: mask, row to write, rows to read
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...base import environment
from ...host.request import Request
from .export import Source, lowered
from .targets import Target

Arrays = dict[str, np.ndarray]


class LoweredGraphs:
    """One session at a time: each holds a float32 copy of its weights. `check` is called before one is made."""

    def __init__(
        self, source: Source, target: Target, folder: Path, threads: int = 0, check: Callable[[], None] = lambda: None
    ):
        """`folder`: what `write_graphs` wrote."""
        self.source, self.target, self.folder, self.threads, self._check = source, target, folder, threads, check
        self._name, self._session = "", None

    def session(self, name: str) -> ort.InferenceSession:
        """The session of one graph."""
        if name != self._name:
            self._name, self._session = "", None
            self._check()
            options = ort.SessionOptions()
            threads = environment.usable(self.threads) or environment.default_threads()
            options.intra_op_num_threads, options.log_severity_level = threads, 3
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
            model = lowered(self.source, name, self.target, weights=self.folder)
            self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            self._name = name
        return self._session

    def only(self, name: str, feeds: Arrays) -> Arrays:
        """Of some feeds those that the graph takes."""
        return {i.name: feeds[i.name] for i in self.session(name).get_inputs() if i.name in feeds}

    def run(self, name: str, feeds: Arrays) -> Arrays:
        """Every output by name; `feeds` may hold more than the graph takes."""
        return run(self.session(name), feeds)


def run(session: ort.InferenceSession, feeds: Arrays) -> Arrays:
    """Every output of a session by name; `feeds` may hold more than it takes."""
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


def static_rows(rows: np.ndarray, capacity: int, fill: float) -> np.ndarray:
    """Keys or values [B,Hk,T,d] in a cache [B,Hk,C,d] whose other rows, which nothing may read, hold `fill`."""
    out = np.full((*rows.shape[:2], capacity, rows.shape[3]), fill, rows.dtype)
    out[:, :, : rows.shape[2]] = rows
    return out


def step_feeds(request: Request, token: int, step: int, capacity: int) -> Arrays:
    """Feeds of decode step `step` over a static cache in which every row so far counts."""
    used = request.tokens + step + 1
    return {
        "inputs_embeds": request.embedded([token])[None],
        "position_ids": request.positions_after(step, 1)[:, None],
        "attention_mask": (np.arange(capacity) < used).astype(np.int64)[None],
        "write_index": np.array([used - 1], np.int64),
        "core_tokens": np.arange(used, dtype=np.int32)[None],
    }


def listed(neurons: np.ndarray, counts: Sequence[int]) -> Arrays:
    """core_neurons [L,B,K] under both names that an engine may have for them: of all layers, or of each layer its own."""
    return {"core_neurons": neurons} | {f"core_neurons.{i}": neurons[i, :, :k] for i, k in enumerate(counts)}


def every_neuron_listed(layers: int, ffn: int) -> np.ndarray:
    """core_neurons [L,1,F] of the full budget."""
    return np.broadcast_to(np.arange(ffn, dtype=np.int32), (layers, 1, ffn))
