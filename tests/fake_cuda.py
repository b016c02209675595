"""A stand-in for `cuda.bindings.runtime` on a machine without a GPU: device memory is host memory, but as strict.

Work that a stream is given runs when somebody waits for it, so a missing wait, a buffer freed too early or pinned memory
written too soon shows. New memory is full of 0xFF (nan), every copy must lie within one allocation.
"""

import ctypes
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Handle:
    """A stream or graph as the bindings give it: no number, but it can be made one."""

    def __init__(self, value: int):
        self._value = value

    def __int__(self) -> int:
        return self._value


OK = cudaError_t.cudaSuccess
INVALID = cudaError_t.cudaErrorInvalidValue


class Recorded:
    """Notes every public name that is asked for, and how it is called: (type, name, arguments, keyword names)."""

    _calls: set[tuple[str, str, int, tuple[str, ...]]]

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_"):
            return value
        calls, owner = object.__getattribute__(self, "_calls"), type(self).__name__
        if not callable(value) or isinstance(value, type):
            calls.add((owner, name, -1, ()))
            return value

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.add((owner, name, len(args), tuple(sorted(kwargs))))
            return value(*args, **kwargs)

        return called


class FakeCuda(Recorded):
    """The module. `gpu`: (name, major, minor); `memory`: bytes of the device; `fail`: function name -> code it returns."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode

    def __init__(self, gpu: tuple[str, int, int] = ("Fake GPU", 8, 7), memory: int = 1 << 32):
        self._calls = set()
        self._gpu, self._left, self._fail = gpu, memory, {}
        self._allocated = 0  # bytes of all allocations ever, freed or not
        self._device: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._queues: dict[int, list] = {}
        self._recording: dict[int, list] = {}
        self._graphs: dict[int, list] = {}
        self._log: list[str] = []  # in order, what the streams did

    def _code(self, name: str) -> Any:
        self._log.append(name)
        return self._fail.get(name, OK)

    # ------------------------------------------------------------------------------------------ memory
    def cudaMalloc(self, size: int) -> tuple:
        code = self._code("cudaMalloc")
        if code or size > self._left:
            return (code or cudaError_t.cudaErrorMemoryAllocation, None)
        memory = (ctypes.c_ubyte * size)()
        ctypes.memset(memory, 0xFF, size)
        self._left -= size
        self._allocated += size
        self._device[ctypes.addressof(memory)] = memory
        return (OK, ctypes.addressof(memory))

    def cudaFree(self, devPtr: int) -> tuple:
        if devPtr not in self._device:
            return (INVALID,)
        for stream in self._queues:
            self._drain(stream)
        self._left += len(self._device.pop(devPtr))
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple:
        memory = (ctypes.c_ubyte * size)()
        self._pinned[ctypes.addressof(memory)] = memory
        return (OK, ctypes.addressof(memory))

    def cudaFreeHost(self, ptr: int) -> tuple:
        return (OK,) if self._pinned.pop(ptr, None) is not None else (INVALID,)

    def _holds(self, memories: dict[int, Any], address: int, size: int) -> bool:
        return any(a <= address and address + size <= a + len(m) for a, m in memories.items())

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> tuple:
        up, down = kind == cudaMemcpyKind.cudaMemcpyHostToDevice, kind == cudaMemcpyKind.cudaMemcpyDeviceToHost
        if not up and not self._holds(self._device, src, count):
            return (INVALID,)
        if not down and not self._holds(self._device, dst, count):
            return (INVALID,)
        if up and not self._holds(self._pinned, src, count):  # pageable memory is staged before the call returns
            staged = ctypes.string_at(src, count)
            return self._push(stream, "copy up", lambda: ctypes.memmove(dst, staged, count))
        what = "copy up" if up else "copy down" if down else "copy across"
        return self._push(stream, what, lambda: ctypes.memmove(dst, src, count))

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: int
    ) -> tuple:
        spans = ((dst, dpitch), (src, spitch))
        fits = all(self._holds(self._device, a, pitch * (height - 1) + width) for a, pitch in spans)
        if width > min(dpitch, spitch) or kind != cudaMemcpyKind.cudaMemcpyDeviceToDevice or not fits:
            return (INVALID,)

        def work() -> None:
            to, of = (_rows(address, height, pitch, width) for address, pitch in spans)
            to[...] = of

        return self._push(stream, "copy rows", work)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple:
        if not self._holds(self._device, devPtr, count):
            return (INVALID,)
        return self._push(stream, "clear", lambda: ctypes.memset(devPtr, value, count))

    # ------------------------------------------------------------------------------------------ streams and graphs
    def cudaStreamCreate(self) -> tuple:
        self._queues[stream := 0x5000 + len(self._queues)] = []
        return (self._code("cudaStreamCreate"), Handle(stream))

    def _push(self, stream: int, what: str, work: Any) -> tuple:
        if stream not in self._queues:
            return (INVALID,)
        if stream in self._recording:
            self._recording[stream].append((what, work))
        else:
            self._queues[stream].append((what, work))
        return (OK,)

    def _drain(self, stream: int) -> None:
        queue, self._queues[stream] = self._queues[stream], []
        for what, work in queue:
            self._log.append(what)
            work()

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        if stream in self._recording:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self._drain(stream)
        return (self._code("wait"),)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple:
        if code := self._code("cudaStreamBeginCapture"):
            return (code,)
        self._recording[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        if stream not in self._recording:
            return (cudaError_t.cudaErrorStreamCaptureInvalidated, None)
        work = self._recording.pop(stream)
        if code := self._code("cudaStreamEndCapture"):
            return (code, None)
        return (OK, work)

    def cudaGraphInstantiate(self, graph: list, flags: int) -> tuple:
        self._graphs[executable := 0x9000 + len(self._log)] = list(graph)
        return (self._code("cudaGraphInstantiate"), Handle(executable))

    def cudaGraphDestroy(self, graph: list) -> tuple:
        return (OK,)

    def cudaGraphLaunch(self, graphExec: Handle, stream: int) -> tuple:
        if int(graphExec) not in self._graphs:
            return (INVALID,)
        self._log.append("cudaGraphLaunch")
        for what, work in self._graphs[int(graphExec)]:
            self._push(stream, what, work)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Handle) -> tuple:
        return (OK,) if self._graphs.pop(int(graphExec), None) is not None else (INVALID,)

    # ------------------------------------------------------------------------------------------ the device
    def cudaGetDevice(self) -> tuple:
        return (self._code("cudaGetDevice"), 0)

    def cudaSetDevice(self, device: int) -> tuple:
        return (OK if device == 0 else INVALID,)  # nothing that a stream does

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        name, major, minor = self._gpu
        return (OK, SimpleNamespace(name=name.encode(), major=major, minor=minor))

    def cudaGetErrorString(self, error: Any) -> tuple:
        return (OK, f"the fake says {cudaError_t(int(error)).name}".encode())


def _rows(address: int, height: int, pitch: int, width: int) -> np.ndarray:
    """[height, width] bytes, each row `pitch` after the one before."""
    held = np.frombuffer((ctypes.c_ubyte * (pitch * (height - 1) + width)).from_address(address), np.uint8)
    return np.lib.stride_tricks.as_strided(held, (height, width), (pitch, 1))


def view(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at an address."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer(
        (ctypes.c_ubyte * max(1, size)).from_address(address), dtype, size // np.dtype(dtype).itemsize
    ).reshape(shape)
