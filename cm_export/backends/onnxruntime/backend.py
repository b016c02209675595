"""ONNX Runtime on CPU: sessions that share one mapped weight file, keys and values that never pass through Python.

vision(feeds) -> embeddings      prefill(feeds) -> logits, scores, cache      Decoder.step(embedding) -> logits
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ...base.errors import BundleError, CmExportError
from ...bundle.names import core_row_names
from ...bundle.weights import WeightFile
from ...host.core_rows import CoreRows
from ...recipe.recipe import Recipe
from .lower import lower, unsigned


def open(
    bundle: Any,
    threads: int = 0,
    recipe: Recipe | None = None,
    graph: Callable[[str], Path | onnx.ModelProto] | None = None,
) -> "Backend":
    """The sessions of an open bundle; `recipe` and `graph` replace its own, on the same weights."""
    chooses = (recipe or bundle.recipe).neurons.in_decode
    names = core_row_names(bundle.family, bundle.shape.layers)
    return Backend(graph or bundle.graph, bundle.weights, threads, bundle.predictor if chooses else None, names)


class Backend:
    """Sessions over the graphs of one bundle (or of a build under way), made when first asked for."""

    name, reads_several = "onnxruntime", True

    def __init__(
        self,
        graph: Callable[[str], Path | onnx.ModelProto],
        weights: WeightFile,
        threads: int = 0,
        predictor: WeightFile | None = None,
        row_names: list[tuple[str, str, str]] | None = None,
    ):
        """`predictor`: the file of low-bit copies, where the decode graph reads one; `row_names`: see CoreRows."""
        self.notes: list[str] = []
        self.hardware: dict[str, str] = {}
        self._row_names = row_names
        self._graph, self.weights, self.threads, self.predictor = graph, weights, threads, predictor
        self._sessions: dict[tuple[str, bool, bool], ort.InferenceSession] = {}
        self._views: dict[str, ort.OrtValue] = {}  # sessions read these buffers as long as they live
        self._inputs: dict[tuple[str, bool, bool], list[str]] = {}  # weights that a session takes as inputs

    @cached_property
    def rows(self) -> CoreRows:
        """What gathers the rows of this bundle, its buffers kept between requests."""
        return CoreRows(self.weights, self._row_names, self.threads)

    def ready(self, graph: str) -> None:
        """Make the session of `graph` now. Raises BundleError."""
        self.session(graph)

    def session(self, name: str, rows_as_inputs: bool = True, few_rows: bool = False) -> ort.InferenceSession:
        """The session of graph `name`. `few_rows`: one that reads 2 to 16 tokens at the price of one.

        Raises BundleError if ONNX Runtime refuses the graph.
        """
        key = (name, rows_as_inputs, few_rows)
        if key not in self._sessions:
            self._sessions[key] = self._load(self._graph(name), key)
        return self._sessions[key]

    def bound(self, name: str, rows_as_inputs: bool = True, few_rows: bool = False) -> dict[str, ort.OrtValue]:
        """Weights that the session of graph `name` takes as inputs, the same at every run; mostly none."""
        return {w: self._views[w] for w in self._inputs.get((name, rows_as_inputs, few_rows), ())}

    def drop(self, *names: str) -> None:
        """Free the sessions of these graphs, and the memory of weights that only they have read."""
        for key in [k for k in self._sessions if k[0] in names]:
            del self._sessions[key]
        self.weights.release()

    def _load(self, graph: Path | onnx.ModelProto, key: tuple[str, bool, bool]) -> ort.InferenceSession:
        where = graph if isinstance(graph, Path) else "a graph made in memory"
        model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
        model = lower(model, rows_as_inputs=key[1], few_rows=key[2])
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        missing = [t.name for t in external if t.name not in self.weights and t.name not in (self.predictor or ())]
        if missing:
            raise BundleError(f"the weight file has no {missing[0]}", where=where, fix="build the bundle again")
        for tensor in external:
            if tensor.name not in self._views:
                self._views[tensor.name] = ort.OrtValue.ortvalue_from_numpy(self._view(tensor))
        if any(t.name not in self.weights for t in external):
            # Low-bit copies are 100 times slower unless packed; what must not be packed becomes an input instead.
            external = self._bind(key, model, external)
        else:
            # Prepacking would copy every weight into anonymous memory, once per session.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Every session reads the same mapping; the folder only satisfies the check of the graph's external paths.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.weights.path.parent)
        )
        for tensor in external:
            # What is given here is never looked for, but its path is checked all the same.
            tensor.external_data[0].value = self.weights.path.name
            options.add_initializer(tensor.name, self._views[tensor.name])
        try:
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise BundleError(f"ONNX Runtime refuses the graph ({e})", where=where) from e

    def _bind(self, key: tuple[str, bool], model: onnx.ModelProto, external: list) -> list[onnx.TensorProto]:
        """Make inputs of the initializers in the weight file; returns those that are left."""
        moved = {t.name: t for t in external if t.name in self.weights}
        self._inputs[key] = list(moved)
        kept = [t for t in model.graph.initializer if t.name not in moved]
        model.graph.input.extend(onnx.helper.make_tensor_value_info(n, t.data_type, t.dims) for n, t in moved.items())
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        return [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]

    def _view(self, tensor: onnx.TensorProto) -> np.ndarray:
        """What an initializer reads: the mapped file as it is, or int4 pairs turned into what ONNX Runtime multiplies."""
        if tensor.name in self.weights:
            return self.weights[tensor.name]
        stored = self.predictor[tensor.name]
        is_packed = tensor.data_type == onnx.TensorProto.UINT8
        return unsigned(stored, 2 * tensor.dims[-1]) if is_packed else stored

    def vision(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Image embeddings [I,D] of patches and the host's integers."""
        return self.session("vision").run(["image_embeds"], feeds)[0]

    def prefill(self, feeds: dict[str, np.ndarray], graph: str = "prefill") -> dict[str, ort.OrtValue]:
        """Run a prefill graph; every output stays where ONNX Runtime put it."""
        return self._run(graph, feeds, {})

    def turn(self, feeds: dict[str, np.ndarray], cache: dict[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """Read new tokens over the whole cache (present.i.key/value, which stays as it is); outputs as of `prefill`."""
        return self._run("turn", feeds, {n.replace("present", "past", 1): v for n, v in cache.items()})

    def decoder(
        self, graph: str, cache: dict[str, ort.OrtValue], constants: dict[str, np.ndarray], few_rows: bool = False
    ) -> "Decoder":
        """One request's decode over a cache (present.i.key/value); see Decoder."""
        return Decoder(self, graph, cache, constants, few_rows=few_rows)

    def host(self, values: Mapping[str, ort.OrtValue]) -> dict[str, np.ndarray]:
        """Outputs as arrays."""
        return {n: v.numpy() for n, v in values.items()}

    def device(self, arrays: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        """Arrays as what a session takes without a copy of its own."""
        return {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in arrays.items()}

    def _run(
        self, graph: str, feeds: dict[str, np.ndarray], values: dict[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        session = self.session(graph)
        binding = session.io_binding()
        for i in session.get_inputs():
            if i.name in values:
                binding.bind_ortvalue_input(i.name, values[i.name])
            else:
                binding.bind_cpu_input(i.name, np.ascontiguousarray(feeds[i.name]))
        outputs = [o.name for o in session.get_outputs()]
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))


class Decoder:
    """One request's decode: holds the cache between steps and binds it without copies."""

    def __init__(
        self,
        backend: Backend,
        graph: str,
        cache: dict[str, ort.OrtValue],
        constant: dict[str, np.ndarray],
        rows_as_inputs: bool = True,
        few_rows: bool = False,
    ):
        """`cache`: present.i.key/value from the prefill; `constant`: inputs that stay the same (gathered rows).

        `few_rows`: most reads are of 2 to 16 tokens.
        """
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

    def step(self, feeds: dict[str, Any]) -> np.ndarray:
        """Logits [B,V] after the new tokens; feeds: inputs_embeds, position_ids, attention_mask (and core_tokens)."""
        return self.read(feeds)[:, -1]

    def read(self, feeds: dict[str, Any]) -> np.ndarray:
        """Logits [B,N,V] after each of N new tokens; their keys and values are in the cache from now on."""
        if not getattr(self._constant, "current", True):
            raise CmExportError("another request has replaced this decoder's rows", fix="decode one request at a time")
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

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` rows of every key and value; what was read after them is forgotten."""
        self.cache = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :rows]))
            for name, value in self.cache.items()
        }
