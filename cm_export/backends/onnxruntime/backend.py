"""ONNX Runtime: sessions that share one mapped weight file, or one copy of it on a device; keys and values stay where they are.

vision(feeds) -> embeddings      prefill(feeds) -> outputs, Rows      decoder(graph, cores).read(tokens, cache) -> logits, Rows

A cache of several requests is padded on the left, where its mask is 0; a step writes behind its last row (cache.py).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ...base import environment
from ...base.errors import BundleError
from ...bundle.names import core_row_names
from ...bundle.packed import TOWER, Packed
from ...bundle.weights import WeightFile
from ...families import Arrays, Family, Shape
from ...host.backend import Cache, Feeds, Graphs, Tokens
from ...host.core_rows import CoreRows
from ...host.core_set import CoreSet
from ...plugins import places as libraries
from ...plugins.core_linear.op import BY_INPUTS
from ...plugins.cpu import library as native
from ...quant.error import codes_of
from ...quant.packing import blocks
from ...recipe.recipe import Recipe
from .cache import HERE, Memory, Rows, own
from .cached_attention import attend_natively, read_narrow, reads_natively
from .device_rows import DeviceRows
from .grouped import group_attention
from .in_place import write_in_place
from .kernels import held_by_inputs, use_kernels
from .lower import lower
from .pack import Packing, gather_ffns
from .patches import multiply_patches
from .place import Held, Place, place_for
from .prompt_attention import attend_together
from .residual_norm import normalise_sums
from .whole_picture import attend_to_all, borders

_PRODUCTS = {"head", "layers.0.attention_in", "layers.0.ffn_in"}  # entries of a bundle that has packed them all
WHOLE = "vision, one segment"  # the session of the vision graph for a picture that is one segment
Key = tuple[str, bool, bool, bool]  # graph, rows as inputs, few rows, in place


def open(
    bundle: Any, threads: int = 0, recipe: Recipe | None = None, graph: Graphs | None = None, device: str | None = None
) -> Backend:
    """The sessions of an open bundle; `recipe` and `graph` replace its own, on the same weights.

    `device`: cpu (None is the same), cuda, cuda:1 or auto. Raises InputError for one that cannot be used here.
    """
    recipe = recipe or bundle.recipe
    # For checks, and for low bits, whose products are asked for in float32, a device computes in it, too.
    exact = bundle.packed is not None or recipe.engine.precision == "fp32"
    place, notes = place_for(device, np.float32 if exact else np.float16)
    chooses = recipe.neurons.in_decode
    names = core_row_names(bundle.family, bundle.shape.layers)
    low_bits = None
    if bundle.packed is not None:
        every_neuron = recipe.neurons.policy == "dense"
        low_bits = LowBits(bundle.packed, bundle.family, bundle.shape, every_neuron)
    predictor = bundle.predictor if chooses else None
    made = Backend(
        graph or bundle.graph,
        bundle.weights,
        threads,
        predictor,
        names,
        low_bits,
        bundle.shape.heads,
        place,
        recipe.weights.cache,
    )
    made.notes += notes
    decides = chooses or recipe.neurons.by_threshold
    if place.apart and place.kernels is None and bundle.packed is None and decides:
        why = libraries.why_unusable()
        made.notes.append(f"every weight is read there, since our kernels cannot be used: {why}")
    return made


def _disabled() -> list[str]:
    """Before 1.26 this fusion makes products in float64, in which policies add up, for which there is no kernel."""
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    return ["MatmulTransposeFusion"] if version < (1, 26) else []


def _sees(name: str) -> bool:
    """Whether a session is of the vision graph."""
    return name in ("vision", WHOLE)


def _named(name: str, dtype: np.dtype) -> str:
    """A weight may be read in two types; each has its own place among the views."""
    return f"{name}/float16" if dtype == np.float16 else name


def _in_type(stored: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Raises InputError for a value that does not fit into 16 bit."""
    if stored.dtype == dtype:
        return stored
    from ...surgery.halve import as_half

    return as_half(stored, dtype, name)


def _view(tensor: onnx.TensorProto) -> str:
    return _named(tensor.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers whose bytes lie in a file."""
    return [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


@dataclass(frozen=True)
class LowBits:
    """What a backend needs to multiply packed weights; see pack.Packing for `every_neuron`."""

    packed: Packed
    family: Family
    shape: Shape
    every_neuron: bool


class Backend:
    """Sessions over the graphs of one bundle (or of a build under way), made when first asked for."""

    name, most = "onnxruntime", sys.maxsize

    def __init__(
        self,
        graph: Graphs,
        weights: WeightFile,
        threads: int = 0,
        predictor: WeightFile | None = None,
        row_names: list[tuple[str, str, str]] | None = None,
        low_bits: LowBits | None = None,
        heads: int = 0,
        place: Place = HERE,
        cache: str = "fp32",
    ):
        """`predictor`: the file of low-bit copies, where the decode graph reads one; `row_names`: see CoreRows.

        `heads`: of queries, so that those which share keys are multiplied together; 0: attention stays as the graph has it.
        `cache`: the form that it is to have where that is possible: fp32, fp16 or int8.
        """
        self.notes = environment.threads_note(threads)
        self._heads, self.place = heads, place
        self._low_bits, self.native = low_bits, native.find() if low_bits and not place.apart else None
        if low_bits and self.native is None and not place.apart:
            self.notes.append(f"low-bit products run on ONNX Runtime's own: {native.why_missing()}")
        self.hardware = {"device": place.name} if place.apart else dict[str, str]()
        self._row_names, self.threads = row_names, environment.usable(threads)
        self._graph, self.weights, self.predictor = graph, weights, predictor
        self._cache_wanted = cache
        self._looked_at: dict[Key, tuple[onnx.ModelProto, Arrays]] = {}  # graphs that `cache_form` has looked at
        self._sessions: dict[Key, ort.InferenceSession] = {}
        self._views: dict[str, Held] = {}  # sessions read these buffers as long as they live
        self._inputs: dict[Key, dict[str, str]] = {}  # weights that a session takes as inputs -> in _views
        self._made: Arrays = {}  # of low-bit weights, in the order of ONNX Runtime's own products
        # A session runs for several threads at once. Making one does not: a view that another session reads would be
        # replaced, and its memory freed.
        self._making = threading.RLock()

    @cached_property
    def rows(self) -> CoreRows:
        """What gathers the rows of this bundle, its memory kept between requests."""
        return CoreRows(self.weights, self._rows_of_neurons(), self.threads)

    @cached_property
    def device_rows(self) -> DeviceRows:
        """The same on a device."""
        return DeviceRows(self.place, self._rows_of_neurons(), self._on_device)

    def _rows_of_neurons(self) -> list[tuple[str, str, str]]:
        if self._row_names is None:
            raise BundleError("nothing says which weights are rows of neurons", where=self.weights.path)
        return self._row_names

    def _on_device(self, name: str) -> Held:
        """A weight there, in the type of products; the same copy that sessions read."""
        with self._making:
            view = _named(name, self.place.products)
            if view not in self._views:
                self._views[view] = self.place.hold(_in_type(self.weights[name], self.place.products, name))
            return self._views[view]

    @cached_property
    def cache_form(self) -> str:
        """The cache is fp32 unless another form is wanted and in every decode graph the native library alone reads it."""
        if self._cache_wanted == "fp32" or self.native is None:
            return "fp32"
        with self._making:
            keys = [self._key(name, True, False, True) for name in ("decode", "decode_dense")]
            self._looked_at = {key: self._rewritten(self._graph(key[0]), key) for key in keys}
            natively = all(reads_natively(model) for model, _ in self._looked_at.values())
            return self._cache_wanted if natively else "fp32"

    def has(self, graph: str) -> bool:
        """Every graph of a bundle runs here."""
        return True

    def ready(self, graph: str, few_rows: bool = False) -> None:
        """Make the session of `graph` now. Raises BundleError."""
        self.session(graph, True, few_rows, in_place=graph.startswith("decode"))

    def session(
        self, name: str, rows_as_inputs: bool = True, few_rows: bool = False, in_place: bool = False
    ) -> ort.InferenceSession:
        """The session of graph `name`. `few_rows`: one that reads 2 to 16 tokens at the price of one.

        `in_place`: one that writes new rows into the memory of its cache. Raises BundleError if ONNX Runtime refuses it.
        """
        key = self._key(name, rows_as_inputs, few_rows, in_place)
        with self._making:
            if key not in self._sessions:
                self._sessions[key] = self._load(self._graph("vision" if name == WHOLE else name), key)
            return self._sessions[key]

    def bound(
        self, name: str, rows_as_inputs: bool = True, few_rows: bool = False, in_place: bool = False
    ) -> dict[str, ort.OrtValue]:
        """Weights that the session of graph `name` takes as inputs, the same at every run; mostly none."""
        taken = self._inputs.get(self._key(name, rows_as_inputs, few_rows, in_place), {})
        return {w: self._views[view].value for w, view in taken.items()}

    def _key(self, name: str, rows_as_inputs: bool, few_rows: bool, in_place: bool) -> Key:
        """Packed products read several rows as they read one: one session serves both. So do those of a device."""
        packed = self._low_bits.packed.entries.keys() if self._low_bits and self.native else ()
        same = self.place.apart or set(packed) >= _PRODUCTS
        return name, rows_as_inputs, few_rows and not same, in_place

    def drop(self, *names: str) -> None:
        """Free the sessions of these graphs, and the memory of weights that only they have read."""
        with self._making:
            for key in [k for k in self._sessions if k[0] in names or (k[0] == WHOLE and "vision" in names)]:
                del self._sessions[key]
        self.weights.release()

    def reads(self, name: str) -> set[str]:
        """Weights of the weight file that the session of graph `name` reads, and the rows that are gathered for it."""
        model, arrays = self._prepared(self._graph(name), self._key(name, True, False, False))
        read = {t.name.removesuffix(BY_INPUTS) for t in _external(model)} - arrays.keys()
        gathers = any(i.name.startswith("ffn.") or i.name == "core_bias" for i in model.graph.input)
        rows = (self._row_names or []) if gathers else []
        return {n for n in read if n in self.weights}.union(*rows)

    def _prepared(self, graph: Path | onnx.ModelProto, key: Key) -> tuple[onnx.ModelProto, Arrays]:
        """The graph as its session takes it, and the arrays that its packed products read."""
        form = self.cache_form if key[3] else "fp32"
        model, arrays = self._looked_at.pop(key) if key in self._looked_at else self._rewritten(graph, key)
        if form != "fp32":
            read_narrow(model, form)
        return model, arrays

    def _rewritten(self, graph: Path | onnx.ModelProto, key: Key) -> tuple[onnx.ModelProto, Arrays]:
        """The same over a cache in fp32."""
        model = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
        if key[0] == WHOLE:
            attend_to_all(model)
        if _sees(key[0]) and not self.place.apart:
            multiply_patches(model)
        model, arrays = self._packed(model, key[0])
        native = self.native is not None and bool(arrays)
        if key[3]:
            write_in_place(model)
            if native:
                normalise_sums(model)
            if native and self._heads:
                attend_natively(model, self._heads)
        if native:
            attend_together(model)
        if self.place.products != np.float32:
            from ...surgery.halve import in_16_bit  # with graphsurgeon, which float32 does not wait for

            model = in_16_bit(model, self.weights.tensors, self.place.products)
        if self.place.kernels is not None and not _sees(key[0]):
            model = use_kernels(model, self._held_by_inputs, is_step=key[3])
        model = lower(model, rows_as_inputs=key[1], few_rows=key[2], place=self.place)
        if self._heads and key[1]:
            group_attention(model, self._heads)
        return model, arrays

    def _load(self, graph: Path | onnx.ModelProto, key: Key) -> ort.InferenceSession:
        where = graph if isinstance(graph, Path) else "a graph made in memory"
        model, arrays = self._prepared(graph, key)
        options = ort.SessionOptions()
        library = self.place.kernels or (self.native if arrays else None)
        if library is not None:
            options.register_custom_ops_library(str(library))
        # Left to itself, ONNX Runtime takes every core of the machine, also in a container that allows two.
        options.intra_op_num_threads = self.threads or environment.default_threads()
        # Sessions take turns. Left to itself, each one's threads look for work for 50 ms after a run, on the processors that the
        # next one needs: steps of a guarded answer took twice as long.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        external = _external(model)
        known = (*arrays, *self.weights.tensors, *(self.predictor.tensors if self.predictor else ()))
        missing = [t.name for t in external if t.name.removesuffix(BY_INPUTS) not in known]
        if missing:
            raise BundleError(f"the weight file has no {missing[0]}", where=where, fix="build the bundle again")
        for tensor in external:
            if _view(tensor) not in self._views:
                self._views[_view(tensor)] = self.place.hold(self._array(tensor, arrays))
        # Low-bit copies are 100 times slower unless packed; what must not be packed becomes an input instead.
        copies = any(t.name not in self.weights and t.name not in arrays for t in external)
        prepacks = copies or (bool(arrays) and self.native is None)
        if self.place.apart or prepacks:
            self._bind(key, model, [t for t in external if self.place.apart or t.name in self.weights])
        else:
            # Prepacking would copy every weight into anonymous memory, once per session.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Every session reads the same mapping; the folder only satisfies the check of the graph's external paths.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.weights.path.parent)
        )
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                # What is given here is never looked for, but its path is checked all the same.
                tensor.external_data[0].value = self.weights.path.name
                options.add_initializer(tensor.name, self._views[_view(tensor)].value)
        try:
            return self.place.session(model, options, _disabled())
        except BundleError:
            raise
        except Exception as e:
            raise BundleError(f"ONNX Runtime refuses the graph ({e})", where=where) from e

    def _packed(self, model: onnx.ModelProto, name: str) -> tuple[onnx.ModelProto, Arrays]:
        """The graph with packed products, and the arrays that they read."""
        of = self._low_bits
        if of is None:
            return model, {}
        if name in ("prefill_dense", "decode_dense") and of.packed.has_ffns:
            model = gather_ffns(model, of.family, of.shape)
        if _sees(name):
            of.packed.file.expect(n for n in of.packed.file.tensors if n.startswith(TOWER))
        x_bytes = 2 if name.startswith("decode") else 0
        packing = Packing(model, of.packed, self.native is not None, of.every_neuron, x_bytes, self._made)
        return packing.run(), packing.arrays

    def _bind(self, key: Key, model: onnx.ModelProto, external: list[onnx.TensorProto]) -> None:
        """Make inputs of these initializers."""
        moved = {t.name: t for t in external}
        self._inputs[key] = {name: _view(t) for name, t in moved.items()}
        kept = [t for t in model.graph.initializer if t.name not in moved]
        model.graph.input.extend(onnx.helper.make_tensor_value_info(n, t.data_type, t.dims) for n, t in moved.items())
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)

    def _array(self, tensor: onnx.TensorProto, arrays: Arrays) -> np.ndarray:
        """What an initializer reads: the mapped file as it is, in 16 bit or turned, or int4 pairs made what is multiplied."""
        if tensor.name in arrays:
            return arrays[tensor.name]
        name = tensor.name.removesuffix(BY_INPUTS)
        if name in self.weights:
            found = _in_type(self.weights[name], onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), name)
            return found if name == tensor.name else np.ascontiguousarray(found.T)
        assert self.predictor is not None  # a tensor in neither file was refused before
        stored = self.predictor[tensor.name]
        if tensor.data_type == onnx.TensorProto.INT8:
            return codes_of(stored, 4)
        is_packed = tensor.data_type == onnx.TensorProto.UINT8
        return blocks(stored, 4, 2 * tensor.dims[-1]) if is_packed else stored

    def vision(self, feeds: Feeds) -> Arrays:
        """Every output of the vision graph."""
        ends = feeds[self._borders] if self._borders else ()
        graph = WHOLE if len(ends) == 2 else "vision"
        return {name: value.numpy() for name, value in self.outputs(graph, feeds, {}).items()}

    @property
    def has_whole(self) -> bool:
        """Whether a picture that is one segment has a session of its own."""
        return self._borders is not None

    @cached_property
    def _held_by_inputs(self) -> set[str]:
        """Weights [N,D] that a device has as [D,N], for the kernels of decode."""
        return held_by_inputs(self._read("decode"))

    def _read(self, name: str) -> onnx.ModelProto:
        graph = self._graph(name)
        return onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph

    @cached_property
    def _borders(self) -> str | None:
        """The input of the vision graph that says where pictures end."""
        return borders(self._read("vision"))

    def prefill(self, feeds: Feeds, graph: str = "prefill") -> tuple[Arrays, Rows]:
        """A prefill graph's outputs, and its cache."""
        return self.run(graph, feeds)

    def turn(self, feeds: Feeds, cache: Cache) -> tuple[Arrays, Rows]:
        """Read new tokens over a whole cache of one request; outputs as of `prefill`."""
        return self.run("turn", feeds, own(cache).alone())

    def run(self, graph: str, feeds: Feeds, values: Mapping[str, ort.OrtValue] | None = None) -> tuple[Arrays, Rows]:
        """Outputs of a graph as arrays, its keys and values as a cache; what is in `values` is bound as it is."""
        found = self.outputs(graph, feeds, values or {})
        host = {n: v.numpy() for n, v in found.items() if not n.startswith("present.")}
        return host, Rows.of({n: v for n, v in found.items() if n.startswith("present.")}, self.place, self.cache_form)

    def outputs(self, graph: str, feeds: Feeds, values: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """Every output of a graph, where ONNX Runtime put it."""
        session = self.session(graph)
        values = {**values, **self.bound(graph)}
        binding = session.io_binding()
        for i in session.get_inputs():
            if i.name in values:
                binding.bind_ortvalue_input(i.name, values[i.name])
            else:
                binding.bind_cpu_input(i.name, np.ascontiguousarray(feeds[i.name]))
        outputs = [o.name for o in session.get_outputs()]
        for name in outputs:
            self.place.bind_output(binding, name, stays=name.startswith("present."))
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))

    def decoder(self, graph: str, cores: Sequence[CoreSet], few_rows: bool = False) -> Decoder:
        """A decoder for these requests, their core rows gathered."""
        return Decoder(self, graph, cores, few_rows)

    def together(self, core: CoreSet) -> Hashable:
        """Rows of unequal number are filled up with zeros; a graph that chooses takes one number for all requests."""
        if core.thresholds is not None:
            return "thresholds"  # each request brings its own
        return tuple(core.counts.tolist()) if core.chosen_in_decode else core.is_whole

    def regroup(self, rows: Sequence[tuple[Cache, int]]) -> Rows:
        """One cache of the requests at these places of others."""
        return Rows.regrouped([(own(cache), place) for cache, place in rows])


class Decoder:
    """Reads tokens for some requests; what stays the same for all their steps is bound once."""

    def __init__(self, backend: Backend, graph: str, cores: Sequence[CoreSet], few_rows: bool):
        self._backend = backend  # whose views the session reads, as long as it runs
        self._session = backend.session(graph, True, few_rows, in_place=True)
        self._binding = self._session.io_binding()
        self._bound: Memory | None = None  # the cache that the binding reads and writes
        self._vocab = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        self._inputs = {i.name for i in self._session.get_inputs()}
        for name, value in backend.bound(graph, True, few_rows, in_place=True).items():
            self._binding.bind_ortvalue_input(name, value)
        # Bound memory is not copied, so it lives as long as this decoder.
        self._held = self._core_inputs(backend, cores)
        for name, value in self._held[0].items():
            self._binding.bind_ortvalue_input(name, value)

    def _core_inputs(self, backend: Backend, cores: Sequence[CoreSet]) -> tuple[dict[str, ort.OrtValue], Any]:
        """Inputs that core sets decide, and what owns their memory."""
        out: Arrays = {}
        rows: dict[str, ort.OrtValue] = {}
        gathered: Any = None
        if any(name.startswith("ffn.") for name in self._inputs):
            if backend.place.apart:
                rows = backend.device_rows.gather(cores)
            else:
                gathered = backend.rows.gather(cores)
                out |= gathered.rows
        if "core_thresholds" in self._inputs:
            out["core_thresholds"] = np.stack([core.least for core in cores])
        if "core_counts" in self._inputs:
            out["core_counts"] = cores[0].counts
        if "core_bias" in self._inputs:
            out["core_bias"] = np.stack([core.bias(backend.rows.down) for core in cores], 1)
        rows |= {name: backend.place.hold(array).value for name, array in out.items()}
        return {name: value for name, value in rows.items() if name in self._inputs}, gathered

    def read(self, tokens: Tokens, cache: Cache) -> tuple[np.ndarray, Rows]:
        """Logits [B,N,V] after each of N new tokens, and the cache with their rows."""
        rows, after = own(cache).going_on(tokens.embeds.shape[1])
        feeds = {"inputs_embeds": tokens.embeds, "position_ids": tokens.positions} | rows.feeds(tokens)
        for name, value in feeds.items():
            if name in self._inputs:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        if rows.memory is not self._bound:
            for name, held in rows.memory.held.items():
                self._binding.bind_ortvalue_input(name, held.value)
                self._binding.bind_ortvalue_output(name.replace("past", "present", 1), held.value)
            self._bound = rows.memory
        # Bound as the caches are: to ask for outputs would wrap every one of them, at each step.
        logits = np.empty((*tokens.embeds.shape[:2], self._vocab), np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(self._binding)
        return logits, after
