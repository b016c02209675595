"""Runs calls through a plugin and compares: with the op's function, with itself, and with the bounds of its buffers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .cases import Call
from .library import Library, Plugin, numpy_type
from .limits import LIMITS

_GUARD = 256  # bytes behind outputs and workspace that no kernel may touch
_FILL = 0xA5


class Device(Protocol):
    """Where a library's kernels find their data."""

    stream: int

    def put(self, data: np.ndarray, shifted: bool) -> tuple[object, int]:
        """A copy of the bytes and its address; at an address that is no multiple of 16 if shifted."""

    def empty(self, size: int) -> tuple[object, int]:
        """`size` bytes of value _FILL."""

    def get(self, held: object) -> np.ndarray:
        """All bytes of what put or empty gave, once the device has finished."""


class Cpu:
    stream = 0

    def put(self, data, shifted):
        # Plain numpy memory of exactly that size: AddressSanitizer sees where it ends.
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        held = np.empty(raw.size + data.itemsize * shifted, np.uint8)
        held[data.itemsize * shifted :] = raw
        return held, held.ctypes.data + data.itemsize * shifted

    def empty(self, size):
        held = np.full(size, _FILL, np.uint8)
        return held, held.ctypes.data

    def get(self, held):
        return held


class Cuda:
    def __init__(self):
        import torch

        self.torch = torch
        self.stream = torch.cuda.current_stream().cuda_stream

    def put(self, data, shifted):
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        held = self.torch.from_numpy(np.concatenate([np.zeros(data.itemsize * shifted, np.uint8), raw])).cuda()
        return held, held.data_ptr() + data.itemsize * shifted

    def empty(self, size):
        held = self.torch.full((size,), _FILL, dtype=self.torch.uint8, device="cuda")
        return held, held.data_ptr()

    def get(self, held):
        self.torch.cuda.synchronize()
        return held.cpu().numpy()


@dataclass(frozen=True)
class Outcome:
    """What came of a call. `problem` is empty if it was right; `worst` is the largest difference seen."""

    call: Call
    worst: float = 0.0
    problem: str = ""


def run(library: Library, call: Call, device: Device, **internal: int) -> Outcome:
    """One call as an engine would make it, twice. On an emulated library the second goes through all threads backwards.

    `internal`: fields besides the op's attributes, as a serialised plugin has them (grid_blocks).
    """
    made = library.creators[call.op.name].create(call.case.attributes | internal)
    if made is None:
        return Outcome(call, problem=f"not created: {library.log()}")
    size = made.workspace(call.inputs, call.outputs)
    plugin = made.as_in_an_engine()
    if size is None or not plugin.shapes(call.inputs, call.outputs):
        return Outcome(call, problem=f"shapes refused: {library.log()}")
    try:
        first = _enqueue(library, plugin, call, device, size)
        if library.emulated:
            library.reverse(True)
        second = _enqueue(library, plugin, call, device, size)
    except RuntimeError as error:
        return Outcome(call, problem=str(error))
    finally:
        if library.emulated:
            library.reverse(False)
    if any(a.tobytes() != b.tobytes() for a, b in zip(first, second, strict=True)):
        return Outcome(call, problem="two runs gave different bytes")
    worst, limit = 0.0, LIMITS[call.dtype][0]
    for got, (name, expected) in zip(first, call.expected.items(), strict=True):
        off = np.abs(got.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))
        worst = max(worst, float(np.max(off)) if not np.isnan(off).any() else np.inf)
        if not worst <= limit:
            return Outcome(call, worst, f"{name} differs by {worst:.3g}, allowed {limit}")
    return Outcome(call, worst)


def _enqueue(library: Library, plugin: Plugin, call: Call, device: Device, size: int) -> list[np.ndarray]:
    """The outputs. Raises RuntimeError if the plugin reports an error or a byte behind a buffer was touched."""
    sources = [device.put(a, call.shifted and a.dtype.kind != "i") for a in call.feeds.values()]
    targets = [device.empty(t.bytes + _GUARD) for t in call.outputs]
    workspace = device.empty(size + _GUARD)
    addresses = [[address for _, address in side] for side in (sources, targets)]
    error = plugin.enqueue(call.inputs, call.outputs, *addresses, workspace[1], device.stream)
    if error:
        raise RuntimeError(f"enqueue returned {error}: {library.log()}")
    buffers = [device.get(held) for held, _ in (*targets, workspace)]
    for name, buffer in zip([*call.expected, "the workspace"], buffers, strict=True):
        if np.any(buffer[-_GUARD:] != _FILL):
            raise RuntimeError(f"wrote behind {name}")
    kind = numpy_type(call.dtype)
    return [b[:-_GUARD].view(kind).reshape(t.shape) for b, t in zip(buffers, call.outputs, strict=False)]
