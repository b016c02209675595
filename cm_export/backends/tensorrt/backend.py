"""TensorRT: the engines of a bundle, built on this machine for this GPU, in place of its ONNX graphs.

engines/<graph>.plan, manifest["engines"] -> Backend      vision, prefill and decode as of host/backend.py
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...base import environment
from ...base.errors import BundleError, CmExportError, InputError
from ...base.install import pip_install
from ...bundle.bundle import Bundle
from ...bundle.names import core_row_names
from ...families import Arrays
from ...host.backend import Cache, Feeds, Graphs
from ...host.core_rows import CoreRows
from ...host.core_set import CoreSet
from ...recipe.recipe import Recipe
from .cache import CacheMemory, StaticCache, own
from .cuda import Buffers, Cuda, Pinned, Pool, one_at_a_time, open_cuda
from .decode import Decoder
from .session import Held, Library, Session, read

NAME, MODULE = "tensorrt", "tensorrt"


def open(
    bundle: Bundle,
    threads: int = 0,
    recipe: Recipe | None = None,
    graph: Graphs | None = None,
    device: str | None = None,
) -> Backend:
    """The engines of an open bundle. Raises InputError without the library, BundleError for engines of elsewhere."""
    return open_as(NAME, MODULE, bundle, threads, recipe, graph, device)


def open_as(
    name: str,
    module: str,
    bundle: Bundle,
    threads: int,
    recipe: Recipe | None,
    graph: Graphs | None,
    device: str | None = None,
) -> Backend:
    """The same for a backend of that name, whose library is the Python module `module`. `device`: the GPU that CUDA gives."""
    recipe, elsewhere = recipe or bundle.recipe, bundle.elsewhere
    if device not in (None, "auto", "cuda", "cuda:0"):
        fix = f"leave it out and choose the GPU with CUDA_VISIBLE_DEVICES, or {elsewhere}"
        raise InputError(f"engines run on the first GPU, not on {device}", where="--device", fix=fix)
    if graph:
        raise CmExportError("an engine cannot be replaced by a graph", where=f"backend {name}", fix=elsewhere)
    if bundle.recipe.engine.strip_weights:
        what = "its engines hold no weights and must be refitted before they run"
        raise InputError(what, where=bundle.path, fix=f"build without engine.strip_weights, or {elsewhere}")
    engines = bundle.manifest.get("engines")
    if not engines or engines["backend"] != name:
        what = f"holds no engines of {name}" + (f", only of {engines['backend']}" if engines else "")
        raise BundleError(what, where=bundle.path, fix=f"cm-export build ... --backend {name}, or {elsewhere}")
    try:
        trt = importlib.import_module(module)
    except ImportError as e:
        of_jetpack = "install JetPack's own: sudo apt-get install python3-libnvinfer"
        fix = f"install it: {pip_install(name)}; or {elsewhere}" if bundle.portable else of_jetpack
        raise InputError(
            f"the Python package {module} cannot be imported ({e})", where=f"backend {name}", fix=fix
        ) from e
    return Backend(name, bundle, recipe, threads, trt, open_cuda(elsewhere))


class Backend:
    """Sessions over the engines of one bundle, made when first asked for; see host/backend.py.

    Their engines share a stream, scratch memory and buffers, so each call is one thread's alone, down to its last copy.
    """

    def __init__(self, name: str, bundle: Bundle, recipe: Recipe, threads: int, trt: Any, cuda: Cuda):
        self.name, self.weights, self.threads = name, bundle.weights, environment.usable(threads)
        self.notes = environment.threads_note(threads)
        self._bundle, self._recipe, self._cuda = bundle, recipe, cuda
        self._engines = bundle.manifest["engines"]
        self._check(trt)
        self._library = Library(trt, cuda, self._rebuild, bundle.elsewhere)
        if self._engines.get("plugins"):
            self._load_plugins(self._engines["plugins"])
        self._buffers = Buffers(cuda)
        self._pinned: dict[str, Pinned] = {}
        self._sessions: dict[str, dict[int, Session]] = {}  # by graph and profile
        self._scratch_size = 0
        self.memory, self.for_answers = CacheMemory(cuda, self._engines), Pool(cuda)
        self.hardware = {"gpu": cuda.gpu.name, "architecture": cuda.gpu.architecture, name: trt.__version__}

    @property
    def _rebuild(self) -> str:
        bundle = self._bundle
        again = f"build on this machine: cm-export build ... --backend {self.name}; or {bundle.elsewhere}"
        return again if bundle.portable else bundle.again

    def _check(self, trt: Any) -> None:
        """Raises BundleError that names what differs: an engine runs on the GPU and the version it was built for."""
        here = {"version": trt.__version__, "architecture": self._cuda.gpu.architecture}
        for what, value in here.items():
            built = self._engines[what]  # one version; one architecture or several, by commas
            if value not in built.split(","):
                text = f"its engines were built for {what} {built}, this machine has {value}"
                raise BundleError(text, where=self._bundle.path, fix=self._rebuild)

    def _load_plugins(self, plugins: Mapping[str, str]) -> None:
        name = f"engines/{plugins['name']}"  # compared with its own entry when the bundle was opened
        if self._bundle.manifest["files"].get(name, {}).get("sha256") != plugins["sha256"]:
            what = f"its {name} is not the library that its engines were built with (sha256)"
            raise BundleError(what, where=self._bundle.path, fix=self._rebuild)
        self._library.load_plugins(self._bundle.path / name)

    @property
    def most(self) -> int:
        """Requests that decode together, as the engines were built for."""
        return self._bundle.recipe.engine.max_batch

    @cached_property
    def rows(self) -> CoreRows:
        """Gathers rows where the decode engine takes them; with a plugin it reads its own."""
        names = core_row_names(self._bundle.family, self._bundle.shape.layers)
        return CoreRows(self.weights, names, self.threads)

    @cached_property
    def down(self) -> list[np.ndarray]:
        """Every layer's down rows [F,D], of which a fill makes its bias; a device's bundle has no others."""
        return [self.weights[name] for *_, name in core_row_names(self._bundle.family, self._bundle.shape.layers)]

    def has(self, graph: str) -> bool:
        """Whether there is an engine of it."""
        return graph in self._engines["graphs"]

    def ready(self, graph: str, few_rows: bool = False) -> None:
        """Load the engine of `graph` now. Raises BundleError."""
        self.session(graph)

    def profile_for(self, graph: str, batch: int, new: int) -> int | None:
        """The profile of a decode engine for so many requests and new tokens of each; None: it reads fewer at once."""
        described = self._described(graph)
        for i, shapes in enumerate(described.get("profiles", [described["profile"]])):
            least, _, most = shapes["inputs_embeds"]
            if least[0] <= batch <= most[0] and least[1] <= new <= most[1]:
                return i
        return None

    def largest(self, graph: str, name: str) -> tuple[int, ...]:
        """The greatest shape of an input in any profile."""
        return tuple(self._described(graph)["profile"][name][2])

    def _described(self, graph: str) -> Any:
        """Raises BundleError where the bundle has no engine of `graph`."""
        if graph not in self._engines["graphs"]:
            self.session(graph)
        return self._engines["graphs"][graph]

    @one_at_a_time
    def session(self, graph: str, profile: int = 0) -> Session:
        """The session of an engine. Raises BundleError where the bundle has none for `graph`."""
        made = self._sessions.get(graph, {})
        if profile not in made:
            file = self._bundle.path / "engines" / f"{graph}.plan"
            if f"engines/{file.name}" not in self._bundle.manifest["files"]:
                dense = "dense answers and controls need it: " if graph.endswith("_dense") else ""
                build = "build the bundle with it, or " if self._bundle.portable else ""
                fix = f"{dense}{build}{self._bundle.elsewhere}"
                raise BundleError(f"has no {self.name} engine of {graph}", where=self._bundle.path, fix=fix)
            self._bundle.wait_verified()  # a plan is code that runs
            streams = self._bundle.recipe.engine.weight_streaming
            engine = next((other.engine for other in made.values()), None)
            made[profile] = Session(self._library, file, self._buffers, streams, profile, engine)
            self._sessions[graph] = made
            self._share_scratch()
        return made[profile]

    def _share_scratch(self) -> None:
        """Engines run one after the other, so the memory of the one that needs most serves them all."""
        sessions = [s for of_graph in self._sessions.values() for s in of_graph.values()]
        need = max(s.scratch_size for s in sessions)
        if need > self._scratch_size:
            for session in sessions:
                session.use_scratch(None)  # so that it is freed before the larger one is asked for
            self._scratch_size = need
        scratch = self._buffers.get("scratch", need)
        for session in sessions:
            session.use_scratch(scratch)

    @one_at_a_time
    def drop(self, *graphs: str) -> None:
        """Free the engines of these graphs and their buffers; a decoder that is still held keeps its own."""
        for graph in graphs:
            if graph in self._sessions:
                for session in self._sessions.pop(graph).values():
                    session.forget()
                self._buffers.drop(f"{graph}/")
                for name in [n for n in self._pinned if n.startswith(f"{graph}/")]:
                    del self._pinned[name]

    @one_at_a_time
    def vision(self, feeds: Feeds) -> Arrays:
        """Every output of the vision engine."""
        return read(self._cuda, self.session("vision").run(feeds))

    @one_at_a_time
    def prefill(self, feeds: Feeds, graph: str = "prefill") -> tuple[Arrays, StaticCache]:
        """A prefill engine's outputs, and its cache on the device. Raises InputError for a prompt that does not fit."""
        session = self.session(graph)
        cut = session.has("kept_slots") and self._recipe.tokens.cache == "cut"
        stays = len(feeds["kept_slots"]) if cut else feeds["inputs_embeds"].shape[1]
        self.check_rows(None, stays + 1)
        return self._kept(session.run(feeds))

    @one_at_a_time
    def turn(self, feeds: Feeds, cache: Cache) -> tuple[Arrays, StaticCache]:
        """Read new tokens over a whole cache of one request; outputs as of `prefill`. Raises InputError without room."""
        session = self.session("turn")
        self.check_rows(None, own(cache).lengths[0] + feeds["inputs_embeds"].shape[1] + 1)
        return self._kept(session.run(feeds, own(cache).alone(self._buffers, "turn")))

    def _kept(self, found: dict[str, Held]) -> tuple[Arrays, StaticCache]:
        """Outputs for the host, and the keys and values among them in a cache that decode engines read."""
        cache = StaticCache.filled(self.memory, {n: v for n, v in found.items() if n.startswith("present.")})
        return read(self._cuda, {n: v for n, v in found.items() if not n.startswith("present.")}), cache

    @one_at_a_time
    def decoder(self, graph: str, cores: Sequence[CoreSet], few_rows: bool = False) -> Decoder:
        """A decoder for these requests. Raises BundleError where the bundle has no such engine."""
        return Decoder(self, graph, cores)

    @property
    def block(self) -> int:
        """Neighbours that an id of core_neurons stands for."""
        return int(self._engines.get("block", 1))

    def together(self, core: CoreSet) -> Hashable:
        """Lists of unequal length are filled up, but for those that the graph makes: it makes one number for all requests.

        Plugin libraries from before the manifest had `block` read no lists that are filled up.
        """
        alike = "block" in self._engines and not core.chosen_in_decode
        return () if alike or core.thresholds is not None else tuple(core.counts.tolist())

    @one_at_a_time
    def regroup(self, rows: Sequence[tuple[Cache, int]]) -> StaticCache:
        """One cache of the requests at these places of others, copied on the device."""
        return StaticCache.regrouped(self.memory, rows)

    def check_rows(self, session: Session | None, rows: int) -> None:
        """Raises InputError when prompt and answer need more rows than the cache has.

        Where core_tokens lists rows, the last one is never written: it pads the list.
        """
        decode = self._engines["graphs"]["decode"]["inputs"]
        listed = session.has("core_tokens") if session else any(i["name"] == "core_tokens" for i in decode)
        most = self._engines["capacity"] - listed
        if rows > most:
            what = f"prompt and answer need {rows} rows, the cache of these engines has {most}"
            fix = (
                f"use a shorter prompt or answer, smaller pictures, a lower --token-share, or {self._bundle.elsewhere}"
            )
            raise InputError(what, where=f"backend {self.name}", fix=fix)

    def pinned(self, name: str, size: int) -> Pinned:
        """Pinned host memory by name, kept between requests."""
        if name not in self._pinned or self._pinned[name].size < size:
            self._pinned[name] = Pinned(self._cuda, size)
        return self._pinned[name]

    def note(self, text: str) -> None:
        """Something that the user should know; told once."""
        if text not in self.notes:
            self.notes.append(text)
