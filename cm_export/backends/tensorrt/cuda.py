"""Device memory, one stream and graphs of the CUDA runtime, through NVIDIA's own Python bindings; every code is checked.

cuda.call("cudaMalloc", n)   (cudaSuccess, pointer) -> pointer      (cudaErrorMemoryAllocation,) -> CmExportError
"""

import ctypes
import functools
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ...base.errors import CmExportError, InputError
from ...base.install import pip_install

_BINDINGS = "cuda.bindings.runtime"
_LEAST = 256  # bytes of a buffer: an empty tensor needs an address, too
_ALIGNED = 256  # bytes
_ROOMY = 1.5  # times what was asked for that a loan may have


def open_cuda(elsewhere: str = "add --backend onnxruntime") -> "Cuda":
    """The CUDA runtime of this machine; `elsewhere`: what does without it, for error messages.

    Raises InputError without its Python package or a GPU.
    """
    try:
        runtime = importlib.import_module(_BINDINGS)
    except ImportError as e:
        fix = f"install it: {pip_install('tensorrt')}; or {elsewhere}"
        raise InputError(f"the package cuda-bindings cannot be imported ({e})", where="CUDA", fix=fix) from e
    try:
        return Cuda(runtime, elsewhere)
    except CmExportError as e:  # as any other thing that is missing here
        raise InputError(e.what, where=e.where, fix=e.fix) from e


def architecture() -> str:
    """The architecture of this machine's GPU, such as sm_87. Raises as `open_cuda`."""
    return open_cuda().gpu.architecture


@dataclass(frozen=True)
class Gpu:
    """The device that runs the engines; architecture is such as sm_87."""

    name: str
    architecture: str


class Cuda:
    """One stream of one device. `runtime`: the module cuda.bindings.runtime."""

    def __init__(self, runtime: Any, elsewhere: str = "add --backend onnxruntime"):
        self.runtime, self._lock, self._elsewhere = runtime, threading.RLock(), elsewhere
        self._device = self.call("cudaGetDevice")
        properties = self.call("cudaGetDeviceProperties", self._device)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        self.gpu = Gpu(name.rstrip("\0"), f"sm_{properties.major}{properties.minor}")
        self.stream = int(self.call("cudaStreamCreate"))  # TensorRT takes a number
        kinds = runtime.cudaMemcpyKind
        self._up, self._down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._across = kinds.cudaMemcpyDeviceToDevice

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread at a time; it gets this device, for CUDA gives every new thread the first one."""
        with self._lock:
            self.call("cudaSetDevice", self._device)
            yield

    def call(self, name: str, *args: Any) -> Any:
        """What the function returns besides its code: nothing or one value. Raises CmExportError unless it succeeded."""
        code, *values = getattr(self.runtime, name)(*args)
        if int(code):
            text = self.runtime.cudaGetErrorString(code)[1]
            text = text.decode() if isinstance(text, bytes) else text
            fix = f"see whether nvidia-smi shows the GPU and free memory, or {self._elsewhere}"
            raise CmExportError(f"{text} (code {int(code)})", where=f"CUDA: {name}", fix=fix)
        return values[0] if values else None

    def upload(self, address: int, array: np.ndarray) -> None:
        """A contiguous array into device memory; returns when the array may be changed again."""
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, self._up, self.stream)
        self.wait()

    def upload_pinned(self, address: int, pinned: "Pinned", size: int) -> None:
        """The first `size` bytes of pinned memory, which must not change before the next `wait`."""
        self.call("cudaMemcpyAsync", address, pinned.address, size, self._up, self.stream)

    def download(self, address: int, out: np.ndarray) -> None:
        """Device memory into a contiguous array, which is filled after the next `wait`."""
        self.call("cudaMemcpyAsync", out.ctypes.data, address, out.nbytes, self._down, self.stream)

    def copy_rows(self, to: int, pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """`height` runs of `width` bytes within the device, `pitch` bytes from the beginning of one to the next."""
        args = to, pitch, source, source_pitch, width, height
        self.call("cudaMemcpy2DAsync", *args, self._across, self.stream)

    def clear(self, address: int, size: int) -> None:
        """`size` bytes zero."""
        self.call("cudaMemsetAsync", address, 0, size, self.stream)

    def wait(self) -> None:
        """Return when everything that was enqueued is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def record(self, work: Any) -> "Recording":
        """A graph of what `work()` enqueues, for `replay`; nothing runs now. Raises CmExportError, also if work returns False."""
        self.call(
            "cudaStreamBeginCapture", self.stream, self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            done = work()
        finally:  # otherwise the stream takes nothing more
            graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            if not done:
                raise CmExportError("the work cannot be recorded", where="CUDA: stream capture")
            return Recording(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def replay(self, recording: "Recording") -> None:
        """Run a recorded graph."""
        self.call("cudaGraphLaunch", recording.graph, self.stream)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_at_a_time(method: _Method) -> _Method:
    """A method of something with a `_cuda`, during which no other thread uses its stream, bindings and buffers."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._cuda.alone():
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]  # the same signature


class Recording:
    """A recorded graph, freed with this object."""

    def __init__(self, cuda: Cuda, graph: Any):
        self.graph = graph
        weakref.finalize(self, cuda.runtime.cudaGraphExecDestroy, graph)


class Buffer:
    """Device memory of `size` bytes at `address`, freed with this object."""

    def __init__(self, cuda: Cuda, size: int):
        self.size = max(_LEAST, size)
        self.address = int(cuda.call("cudaMalloc", self.size))
        weakref.finalize(self, cuda.runtime.cudaFree, self.address)


class Pinned:
    """Host memory that copies run from without a detour, and arrays in it."""

    def __init__(self, cuda: Cuda, size: int):
        self.size = max(_LEAST, size)
        self.address = int(cuda.call("cudaMallocHost", self.size))
        weakref.finalize(self, cuda.runtime.cudaFreeHost, self.address)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view, valid as long as this object."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * size).from_address(self.address + offset)
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)


class Buffers:
    """Device memory by name, kept between requests; one that is too small is replaced by a larger one."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._by_name: dict[str, Buffer] = {}

    def get(self, name: str, size: int) -> Buffer:
        """At least `size` bytes."""
        found = self._by_name.get(name)
        if found is None or found.size < size:
            self._by_name.pop(name, None)  # freed before the larger one is asked for
            del found
            found = self._by_name[name] = Buffer(self._cuda, size)
        return found

    def drop(self, prefix: str) -> None:
        """Free what is named so."""
        for name in [n for n in self._by_name if n.startswith(prefix)]:
            del self._by_name[name]


class Pool:
    """Device memory on loan: it comes back with the object that stands for it, and is lent again."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._spare: list[Buffer] = []

    def take(self, size: int, cleared: bool = False) -> "Loan":
        """At least `size` bytes; `cleared`: zero when they are new.

        What is much larger is not lent, and before the device is asked for more, everything that is spare is freed: so
        nothing is held beyond what was once in use at the same time.
        """
        size = max(_LEAST, size)
        fitting = [b for b in self._spare if size <= b.size <= _ROOMY * size]
        if fitting:
            found = min(fitting, key=lambda b: b.size)
            self._spare.remove(found)
        else:
            self._spare.clear()
            found = Buffer(self._cuda, size)
            if cleared:
                self._cuda.clear(found.address, found.size)
        return Loan(found, self._spare)


class Loan:
    """Device memory of `size` bytes at `address`, given back with this object."""

    def __init__(self, buffer: Buffer, spare: list[Buffer]):
        self.address, self.size, self._buffer, self._spare = buffer.address, buffer.size, buffer, spare

    def __del__(self) -> None:
        self._spare.append(self._buffer)


def laid_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Parts in one piece of memory, by name: where each begins, and how large the whole is."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = end
        end += -(-size // _ALIGNED) * _ALIGNED
    return places, end
