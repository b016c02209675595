"""Graphs of a bundle run one by one with feeds that a test writes itself: below the decode loop, batch as the test wants it.

out = outputs(backend, "prefill", feeds)                 every output, keys and values as ONNX Runtime holds them
Decoder(backend, "decode", out, constants).step(feeds)   one token at a time over that cache
step_feeds(request, token, step)                         what such a step reads
"""

import numpy as np
import onnxruntime as ort

from cm_export.bundle.names import core_row_names
from cm_export.host.core_rows import CoreRows
from cm_export.host.core_set import CoreSet


def outputs(backend, graph, feeds, cache=None):
    """Every output of a graph, where ONNX Runtime put it; `cache`: present.i.key/value of an earlier one."""
    return backend.outputs(graph, feeds, {n.replace("present", "past", 1): v for n, v in (cache or {}).items()})


def step_feeds(request, tokens, step, kept_mask=None, core_tokens=None):
    """Feeds of a decode step that reads one or several answer tokens, the first of them being answer token `step`.

    kept_mask [1,T]: the prefill cut the cache to T rows. core_tokens [1,M]: only these prompt rows are read.
    """
    ids = np.atleast_1d(np.asarray(tokens, np.int64))
    base = kept_mask if kept_mask is not None else np.ones((1, request.tokens), np.int64)
    feeds = {
        "inputs_embeds": request.embedded(ids)[None],
        "position_ids": request.positions_after(step, len(ids))[:, None],
        "attention_mask": np.concatenate([base, np.ones((1, step + len(ids)), np.int64)], 1),
    }
    if core_tokens is not None:
        answer = np.arange(request.tokens, request.tokens + step + len(ids), dtype=np.int32)[None]
        feeds["core_tokens"] = np.concatenate([core_tokens, answer], 1)
    return feeds


class Decoder:
    """One cache, read on with feeds as they are; `constant`: inputs that stay the same."""

    def __init__(self, backend, graph, cache, constant, rows_as_inputs=True, few_rows=False):
        self._session = backend.session(graph, rows_as_inputs, few_rows)
        self._binding = self._session.io_binding()
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._inputs = {i.name for i in self._session.get_inputs()}
        for name, value in backend.bound(graph, rows_as_inputs, few_rows).items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in constant.items():
            if name in self._inputs:
                self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        self._constant = constant
        self.cache = {n.replace("present", "past", 1): v for n, v in cache.items() if n.startswith("present.")}

    def step(self, feeds):
        """Logits [B,V] after the new tokens."""
        return self.read(feeds)[:, -1]

    def read(self, feeds):
        """Logits [B,N,V] after each of N new tokens."""
        for name, value in feeds.items():
            if name in self._inputs:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in self.cache.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        values = dict(zip(self._outputs, self._binding.get_outputs(), strict=True))
        logits = values.pop("logits").numpy()
        self.cache = {n.replace("present", "past", 1): v for n, v in values.items()}
        return logits


def gatherer(weights, family, layers):
    """What gathers rows of neurons from a weight file."""
    return CoreRows(weights, core_row_names(family, layers))


def core_sets(index, ffn, counts=None):
    """core_neurons [L,B,K] as the core sets of B requests."""
    counts = np.full(len(index), index.shape[-1]) if counts is None else np.asarray(counts)
    return [CoreSet(np.ascontiguousarray(index[:, b : b + 1]), counts, ffn) for b in range(index.shape[1])]


def gathered(rows, index, counts=None):
    """{ffn.i.gate|up|down: [B,K_i,D]} of core_neurons [L,B,K], by `rows`, a CoreRows."""
    return dict(rows.gather(core_sets(index, len(rows.down[0]), counts)).rows)


def every_row(rows):
    """The same of every neuron, as views of the mapped file."""
    layers, ffn = len(rows.down), len(rows.down[0])
    ids = np.broadcast_to(np.arange(ffn, dtype=np.int32), (layers, 1, ffn))
    return gathered(rows, ids)


def constants(core, rows):
    """Everything that a core set gives to a decode graph, gathered or not."""
    out = dict(rows.gather([core]).rows)
    out |= {"core_counts": core.counts, "core_bias": core.bias(rows.down)[:, None]}
    return out if core.neurons is None else out | {"core_neurons": np.ascontiguousarray(core.neurons)}


def prefill(backend, feeds, graph="prefill"):
    """Every output of a prefill graph."""
    return outputs(backend, graph, feeds)


def every_neuron(rows):
    """What decode takes besides its cache when nothing is left out."""
    layers, ffn, hidden = len(rows.down), *rows.down[0].shape
    zero = np.zeros((layers, 1, hidden), np.float32)
    return every_row(rows) | {"core_bias": zero, "core_counts": np.full(layers, ffn, np.int64)}
