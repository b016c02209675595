"""Graphs that are called as models of a Triton server, from within its Python model `vlm` (docs/triton.md, execution: bls).

    Backend.prefill(feeds) -> InferenceRequest("prefill") -> arrays, Held(keys and values as arrays of the host)

Every call copies the cache there and back, so it is slower than sessions in the same process. What it is for: graphs whose
runtime is Triton's own, and a proof that the graph models of a repository answer as the bundle does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..backends.tensorrt.decode import core_inputs, listed_rows, pieces
from ..base import environment
from ..base.errors import BundleError, CmExportError, InputError
from ..bundle.bundle import Bundle
from ..bundle.names import core_row_names
from ..families import Arrays
from ..host.backend import Cache, Feeds, Tokens
from ..host.core_rows import CoreRows
from ..host.core_set import CoreSet

_DTYPES = {
    "bool": np.bool_, "int32": np.int32, "int64": np.int64, "float16": np.float16, "float": np.float32,
}  # fmt: skip
ELSEWHERE = "let vlm hold the sessions itself (execution: in_process)"


def left_out(bundle: Bundle, engines: Mapping[str, Any] | None, described: Mapping[str, Any]) -> dict[str, str]:
    """Graph -> why it would not answer as the bundle does, called as a model of a server.

    `engines`: of the manifest, None for portable graphs; `described`: inputs and outputs of its graphs.
    """
    out = {}
    for name, graph in described.items():
        wide = [p for p in (*graph["inputs"], *graph["outputs"]) if p["dtype"] not in _DTYPES]
        if engines is None and bundle.packed is not None:
            out[name] = "alone it computes in float32, the bundle in few bits"
        elif bundle.recipe.neurons.in_decode and name == "decode":
            out[name] = f"the policy {bundle.recipe.neurons.policy!r} reads copies of weights that lie in another file"
        elif engines is not None and engines["kv"] == "in_place" and "decode" in name:
            out[name] = f"TensorRT {engines['version']} writes its cache where it reads it, which Triton cannot bind"
        elif wide:
            out[name] = f"its {wide[0]['name']} is {wide[0]['dtype']}, which numpy does not hold"
    return out


def check(bundle: Bundle, backend: str) -> None:
    """Raises InputError for a bundle whose graphs, called as models, would not answer as it does."""
    engines = engines_of(bundle, backend)
    described = engines["graphs"] if engines else bundle.manifest["graphs"]
    for name, why in left_out(bundle, engines, described).items():
        raise InputError(f"there can be no model {name}: {why}", where=bundle.path, fix=ELSEWHERE)


def engines_of(bundle: Bundle, backend: str) -> dict[str, Any] | None:
    """The manifest's engines where `backend` runs them; None where the portable graphs run."""
    engines: dict[str, Any] | None = bundle.manifest.get("engines")
    return engines if engines and backend == "tensorrt" else None


@dataclass(frozen=True)
class Held:
    """Keys and values of one request: past.i.key/value [1,Hk,P,d], of engines [1,Hk,C,d] of which `length` rows count."""

    values: Arrays
    length: int
    static: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def truncated(self, lengths: Sequence[int]) -> Held:
        """The same without the rows after the first `lengths[0]`."""
        (length,) = lengths
        if self.static:  # what no mask lets through is written over
            return replace(self, length=length)
        return Held({n: np.ascontiguousarray(v[:, :, :length]) for n, v in self.values.items()}, length, False)


@dataclass(frozen=True)
class _Model:
    """One model of the server, with what its graph takes."""

    graph: str
    described: Mapping[str, Any]
    utils: Any

    @cached_property
    def inputs(self) -> dict[str, np.dtype]:
        return {v["name"]: np.dtype(_DTYPES[v["dtype"]]) for v in self.described["inputs"]}

    def has(self, name: str) -> bool:
        return name in self.inputs

    def run(self, feeds: Feeds) -> Arrays:
        """Every output. Raises BundleError for an input that nobody knows, CmExportError with what the server says."""
        absent = [n for n in self.inputs if n not in feeds]
        if absent:
            raise BundleError(f"nothing is known for its input {absent[0]}", where=f"model {self.graph}")
        tensor, cpu = self.utils.Tensor, self.utils.PreferredMemory(self.utils.TRITONSERVER_MEMORY_CPU, 0)
        given = [tensor(n, np.ascontiguousarray(feeds[n], dtype)) for n, dtype in self.inputs.items()]
        asked = [v["name"] for v in self.described["outputs"]]
        request = self.utils.InferenceRequest(
            model_name=self.graph, requested_output_names=asked, inputs=given, preferred_memory=cpu
        )
        response = request.exec()
        if response.has_error():
            raise CmExportError(response.error().message(), where=f"model {self.graph}")
        # Copies: a tensor's memory is the server's, which takes it back with the response.
        return {t.name(): np.array(t.as_numpy()) for t in response.output_tensors()}


class Backend:
    """The graph models of the server in which this runs; see host/backend.py. One request a call."""

    name, most = "triton", 1

    def __init__(self, bundle: Bundle, backend: str, threads: int, utils: Any):
        """`backend`: of the server, onnxruntime or tensorrt; `utils`: triton_python_backend_utils. Raises InputError."""
        check(bundle, backend)
        self.weights, self.threads, self.notes = bundle.weights, environment.usable(threads), list[str]()
        self.hardware: dict[str, str] = {}
        self._bundle, self._recipe, engines = bundle, bundle.recipe, engines_of(bundle, backend)
        self.capacity: int | None = engines["capacity"] if engines else None
        self.block = int(engines.get("block", 1)) if engines else 1  # neighbours that an id of core_neurons stands for
        graphs = engines["graphs"] if engines else bundle.manifest["graphs"]
        self._models = {name: _Model(name, described, utils) for name, described in graphs.items()}

    def model(self, graph: str) -> _Model:
        """Raises BundleError where the bundle has none for `graph`."""
        if graph not in self._models:
            raise BundleError(
                f"has no model {graph}", where=self._bundle.path, fix=f"build it with one, or {ELSEWHERE}"
            )
        return self._models[graph]

    @cached_property
    def rows(self) -> CoreRows:
        """Gathers rows where the graph takes them."""
        names = core_row_names(self._bundle.family, self._bundle.shape.layers)
        return CoreRows(self.weights, names, self.threads)

    def has(self, graph: str) -> bool:
        """Whether the server has a model of it."""
        return graph in self._models

    def ready(self, graph: str, few_rows: bool = False) -> None:
        """The server has loaded it, or says so at the first call."""
        self.model(graph)

    def drop(self, *graphs: str) -> None:
        """They are the server's."""

    def vision(self, feeds: Feeds) -> Arrays:
        """Every output of the vision model."""
        return self.model("vision").run(feeds)

    def prefill(self, feeds: Feeds, graph: str = "prefill") -> tuple[Arrays, Held]:
        """A prefill model's outputs, and its cache. Raises InputError for a prompt that does not fit."""
        model = self.model(graph)
        cut = model.has("kept_slots") and self._recipe.tokens.cache == "cut"
        self._check_rows(model, (len(feeds["kept_slots"]) if cut else feeds["inputs_embeds"].shape[1]) + 1)
        return self._kept(model.run(feeds))

    def turn(self, feeds: Feeds, cache: Cache) -> tuple[Arrays, Held]:
        """Read new tokens over a whole cache; outputs as of `prefill`. Raises InputError without room."""
        model, held = self.model("turn"), own(cache)
        self._check_rows(model, held.length + feeds["inputs_embeds"].shape[1] + 1)
        return self._kept(model.run({**feeds, **{n: v[:, :, : held.length] for n, v in held.values.items()}}))

    def _kept(self, found: Arrays) -> tuple[Arrays, Held]:
        """Outputs for the host, with floats of 16 bits as float32, and the keys and values among them."""
        present = {n.replace("present", "past", 1): v for n, v in found.items() if n.startswith("present.")}
        host = {n: v for n, v in found.items() if not n.startswith("present.")}
        host = {n: v.astype(np.float32) if v.dtype == np.float16 else v for n, v in host.items()}
        length = next(iter(present.values())).shape[2]
        if self.capacity is None:
            return host, Held(present, length, static=False)
        padding = ((0, 0), (0, 0), (0, self.capacity - length), (0, 0))
        return host, Held({n: np.pad(v, padding) for n, v in present.items()}, length, static=True)

    def decoder(self, graph: str, cores: Sequence[CoreSet], few_rows: bool = False) -> Decoder:
        """A decoder for one request."""
        return Decoder(self, self.model(graph), cores)

    def together(self, core: CoreSet) -> Hashable:
        """A call is for one request, so nothing decides who shares it."""
        return None

    def regroup(self, rows: Sequence[tuple[Cache, int]]) -> Held:
        """The cache of the one request."""
        ((cache, _),) = rows
        return own(cache)

    def _check_rows(self, model: _Model, rows: int) -> None:
        """Raises InputError when prompt and answer need more rows than engines have; a listed one is padding."""
        decode = self._models["decode"]
        most = None if self.capacity is None else self.capacity - decode.has("core_tokens")
        if most is not None and rows > most:
            what = f"prompt and answer need {rows} rows, the cache of these engines has {most}"
            fix = "use a shorter prompt or answer, smaller pictures, or a lower token share"
            raise InputError(what, where=f"model {model.graph}", fix=fix)

    def check_next(self, model: _Model, length: int) -> None:
        """Raises InputError when a cache of so many rows has no room for another."""
        self._check_rows(model, length + 1)


class Decoder:
    """Reads tokens for one request."""

    def __init__(self, backend: Backend, model: _Model, cores: Sequence[CoreSet]):
        self._backend, self._model = backend, model
        self._given = core_inputs(backend, model, cores)

    def read(self, tokens: Tokens, cache: Cache) -> tuple[np.ndarray, Held]:
        """Logits [1,N,V], and the cache with their rows. An engine's default profile reads one token at a time."""
        held, logits = own(cache), []
        for some in pieces(tokens, 1 if held.static else tokens.embeds.shape[1]):
            found, held = self._read(some, held)
            logits.append(found)
        return np.concatenate(logits, 1), held

    def _read(self, tokens: Tokens, held: Held) -> tuple[np.ndarray, Held]:
        model, new = self._model, tokens.embeds.shape[1]
        feeds = {"inputs_embeds": tokens.embeds, "position_ids": tokens.positions, **self._given, **held.values}
        feeds |= self._rows(tokens, held, new)
        found = model.run(feeds)
        past = {n.replace("present", "past", 1): v for n, v in found.items() if n.startswith("present.")}
        return found["logits"].astype(np.float32), Held(past, held.length + new, held.static)

    def _rows(self, tokens: Tokens, held: Held, new: int) -> Arrays:
        """Which rows of the cache count, are written and are read."""
        capacity, (mask,) = self._backend.capacity, tokens.masks
        if capacity is None:
            out = {"attention_mask": mask[None]}
            return out if tokens.listed is None else out | {"core_tokens": tokens.listed[0][None]}
        self._backend.check_next(self._model, held.length)
        whole = np.zeros((1, capacity), np.int64)
        whole[0, : len(mask)] = mask
        out = {"attention_mask": whole, "write_index": np.array([held.length], np.int64)}
        return out | {"core_tokens": listed_rows(tokens.listed, whole)} if self._model.has("core_tokens") else out


def own(cache: Cache) -> Held:
    """A cache that this backend made."""
    if not isinstance(cache, Held):
        raise TypeError(f"a cache of {type(cache).__name__}")
    return cache
