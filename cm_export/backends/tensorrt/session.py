"""One engine of TensorRT (or TensorRT for RTX) at run time: shapes in, addresses bound, outputs left on the device.

    engine.plan -> Session.run({name: array}) -> {name: Held(address, shape, dtype)}

The same calls serve 10.3 to 11.x and the RTX library: `trt` is whichever module the caller imported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...base.errors import BundleError, CmExportError, InputError
from .cuda import Buffer, Buffers, Cuda, Recording

_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_GRAPHS = 64  # recorded ones that are kept: two parities times the sizes that core_tokens takes, several times over


@dataclass(frozen=True)
class Held:
    """An output on the device, until its session runs again."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    current: Callable[[], bool]

    def checked(self) -> "Held":
        """Itself. Raises CmExportError when another request has been given this memory."""
        if not self.current():
            raise CmExportError("another prompt has replaced this one's outputs", fix="run one request at a time")
        return self


class Library:
    """`tensorrt` or `tensorrt_rtx`, with a log whose last error goes into ours, and the plugins it was given."""

    def __init__(self, trt: Any, cuda: Cuda, rebuild: str, elsewhere: str):
        """`rebuild`: what makes the engines again; `elsewhere`: what does without them. Both are for error messages."""
        self.trt, self.cuda, self.rebuild, self.elsewhere = trt, cuda, rebuild, elsewhere
        self.errors: list[str] = []
        errors, severe = self.errors, (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        class Log(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in severe:
                    errors.append(msg)

        self._log = Log()  # lives as long as the runtime that writes to it
        self.runtime = trt.Runtime(self._log)

    def load_plugins(self, file: Path) -> None:
        """Raises BundleError if the library cannot be loaded here."""
        try:
            self._plugins = self.runtime.get_plugin_registry().load_library(str(file))
        except Exception as e:
            raise self.failed(f"the plugin library cannot be loaded ({e})", file, self.rebuild) from e
        if self._plugins is None:
            raise self.failed("the plugin library cannot be loaded", file, self.rebuild)

    def engine(self, file: Path) -> Any:
        """The engine of a plan. Raises BundleError."""
        # Mapped: where processor and GPU share one memory, a plan that was read would be held twice while it loads.
        plan = np.memmap(file, np.uint8, "r") if file.stat().st_size else b""
        found = self.runtime.deserialize_cuda_engine(plan)
        if found is None:
            raise self.failed("TensorRT cannot read this engine", file, self.rebuild)
        return found

    def failed(self, what: str, where: object, fix: str | None = None) -> BundleError:
        """The error to raise, with the last thing that TensorRT said."""
        said = f" ({self.errors[-1]})" if self.errors else ""
        return BundleError(what + said, where=where, fix=fix)


class Session:
    """An engine with an execution context for one of its profiles.

    All sessions of a bundle share one stream and one scratch memory.
    """

    def __init__(
        self,
        library: Library,
        file: Path,
        buffers: Buffers,
        streams_weights: bool = False,
        profile: int = 0,
        engine: Any = None,
    ):
        """`streams_weights`: the engine was built to leave weights in host memory, as many as do not fit.

        `engine`: of another session of the same file, whose weights are there already.
        """
        trt, self.graph, self._profile = library.trt, file.stem, profile
        self.library, self.cuda, self._file, self.buffers = library, library.cuda, file, buffers
        if engine is None:
            engine = library.engine(file)
            if streams_weights:
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        self.engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.dtypes = {n: self._dtype(engine.get_tensor_dtype(n)) for n in names}
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self._on_host = {n for n in self.inputs if engine.is_shape_inference_io(n)}
        self.scratch_size = int(engine.device_memory_size_v2)
        # Engines run one after the other, so the largest one's scratch serves them all.
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise library.failed("no execution context can be made", file, f"free GPU memory, or {library.elsewhere}")
        if profile and not self._context.set_optimization_profile_async(profile, self.cuda.stream):
            raise library.failed(f"has no profile {profile}", file, library.rebuild)
        self._scratch: Buffer | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}
        # key -> recorded graph, or None after one plain run; None as a whole: nothing can be recorded here
        self._graphs: dict[Any, Recording | None] | None = {}
        self._inferred = False  # whether the outputs' shapes are known under the inputs' shapes
        self.stamp = 0

    def _dtype(self, value: Any) -> np.dtype:
        if value.name not in _DTYPES:
            raise BundleError(f"tensors of type {value.name} are not known", where=self._file, fix=self.library.rebuild)
        return np.dtype(_DTYPES[value.name])

    def has(self, name: str) -> bool:
        """Whether the engine takes an input of that name."""
        return name in self.inputs

    def limits(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least and the greatest shape of an input."""
        fixed = self.static_shape(name)
        if all(n >= 0 for n in fixed):
            return fixed, fixed
        least, _, most = self.engine.get_tensor_profile_shape(name, self._profile)
        return tuple(least), tuple(most)

    def static_shape(self, name: str) -> tuple[int, ...]:
        """The shape that the engine was built with, -1 where a size may change."""
        return tuple(self.engine.get_tensor_shape(name))

    def use_scratch(self, buffer: Buffer | None) -> None:
        """The memory for what happens inside the engine, held as long as it is used; None: let it go."""
        if buffer is not None and self._scratch is not buffer:
            self._context.set_device_memory(buffer.address, buffer.size)
        self._scratch = buffer

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Set the shape of an input. Raises InputError when it is outside what the engine was built for."""
        if self._shapes.get(name) == shape:
            return
        least, most = self.limits(name)
        fits = len(shape) == len(most) and all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))
        if fits and -1 in self.static_shape(name):
            fits = self._context.set_input_shape(name, shape)
            self._inferred = False
        if not fits:
            sizes = f"{list(shape)} is outside {list(least)} to {list(most)}, for which this engine was built"
            fix = f"use a shorter prompt, smaller pictures or another share, or {self.library.elsewhere}"
            raise InputError(sizes, where=f"{self.graph} engine: {name}", fix=fix)
        self._shapes[name] = shape

    def bind(self, name: str, address: int) -> None:
        """Where the engine finds an input or puts an output."""
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise self.library.failed("this tensor cannot be bound", f"{self.graph} engine: {name}")
        self._addresses[name] = address

    def give(self, name: str, array: np.ndarray) -> None:
        """An input by value: converted to the engine's type and copied to the device (sizes of shapes stay on the host)."""
        array = np.ascontiguousarray(array, self.dtypes[name])
        self.shape(name, array.shape)
        if name in self._on_host:
            self._host[name], self._inferred = array, False
            self.bind(name, array.ctypes.data)
            return
        buffer = self.buffers.get(f"{self.graph}/{name}", array.nbytes)
        self.cuda.upload(buffer.address, array)
        self.bind(name, buffer.address)

    def output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output under the inputs' shapes."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(n < 0 for n in shape):
            what = f"its shape {list(shape)} depends on what is computed"
            raise BundleError(what, where=f"{self.graph} engine: {name}", fix=self.library.rebuild)
        return shape

    def infer(self) -> None:
        """Work out the outputs' shapes. Raises BundleError that names an input without a shape."""
        if self._inferred:
            return
        missing = self._context.infer_shapes()
        if missing:
            raise self.library.failed(f"no shape for {', '.join(missing)}", f"{self.graph} engine")
        self._inferred = True

    def run(self, feeds: Mapping[str, np.ndarray], there: Mapping[str, Held] | None = None) -> dict[str, Held]:
        """Every output for these inputs (and what else is in `feeds`). Raises InputError, BundleError.

        `there`: inputs that are on the device already.
        """
        there = there or {}
        absent = [n for n in self.inputs if n not in feeds and n not in there]
        if absent:
            raise BundleError(f"nothing is known for its input {absent[0]}", where=self._file, fix=self.library.rebuild)
        for name in self.inputs:
            if name in there:
                self.shape(name, there[name].shape)
                self.bind(name, there[name].address)
            else:
                self.give(name, feeds[name])
        self.infer()
        self.stamp += 1
        out, stamp = {}, self.stamp
        for name in self.outputs:
            shape, dtype = self.output_shape(name), self.dtypes[name]
            address = self.buffers.get(f"{self.graph}/{name}", math.prod(shape) * dtype.itemsize).address
            self.bind(name, address)
            out[name] = Held(address, shape, dtype, lambda: self.stamp == stamp)
        self.enqueue()
        return out

    def enqueue(self) -> None:
        """Run with what is bound. Raises BundleError."""
        if not self._context.execute_async_v3(self.cuda.stream):
            raise self.library.failed("TensorRT does not run this engine", self._file)

    def replay(self, note: Callable[[str], None]) -> None:
        """The same as `enqueue`, by a recorded graph from the second run with the same shapes and addresses on.

        `note` is told once if nothing can be recorded; every run is a plain one then.
        """
        if self._graphs is None or self._on_host:  # what is read on the host would be frozen into the graph
            return self.enqueue()
        key = (self._scratch and self._scratch.address, *sorted(self._shapes.items()), *sorted(self._addresses.items()))
        graph = self._graphs.get(key)
        if graph is None and key in self._graphs:  # the first run with new shapes may allocate, so only now
            try:
                graph = self.cuda.record(lambda: self._context.execute_async_v3(self.cuda.stream))
            except CmExportError as e:
                note(f"{self.graph} runs without a CUDA graph, so slower than it could: {e}")
                self.forget()
                self._graphs = None
                return self.enqueue()
            self._graphs[key] = graph
        if graph is None:
            if len(self._graphs) >= _GRAPHS:
                self.forget()
            self._graphs[key] = None
            return self.enqueue()
        self.cuda.replay(graph)

    def forget(self) -> None:
        """Free the recorded graphs."""
        if self._graphs is not None:
            self._graphs = {}


def read(cuda: Cuda, values: Mapping[str, Held]) -> dict[str, np.ndarray]:
    """Outputs as arrays of the same types, floats of 16 bits as float32."""
    out = {}
    for name, value in values.items():
        out[name] = np.empty(value.shape, value.dtype)
        cuda.download(value.checked().address, out[name])
    cuda.wait()
    half = (np.float16, ml_dtypes.bfloat16)
    return {n: a.astype(np.float32) if a.dtype in half else a for n, a in out.items()}
