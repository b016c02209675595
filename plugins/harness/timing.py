"""Timing on a GPU: work as a CUDA graph, and a plugin that is called as torch functions are."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .library import Library, Tensor

HALF = "float16"


class Machine(Protocol):
    """Where the work runs, and how it is timed."""

    device: str
    cache_bytes: int
    memory_bytes: int
    stream: Callable[[], int]

    def seconds(self, work: Callable[[], Any]) -> list[float]:
        """Several timings of `work`, after it has run often enough to be warm."""


class CudaMachine:
    device = "cuda"

    def __init__(self, repeats: int = 50):
        self.repeats = repeats
        properties = torch.cuda.get_device_properties(0)
        self.cache_bytes, self.memory_bytes = properties.L2_cache_size, properties.total_memory

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def seconds(self, work):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate and choose their kernels before the capture
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        for _ in range(5):
            graph.replay()
        out = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            out.append(start.elapsed_time(end) / 1000)
        return out


class CpuMachine:
    """For tests of this file with the emulated kernels; its times mean nothing."""

    device, cache_bytes, memory_bytes = "cpu", 0, 2**30

    def stream(self) -> int:
        return 0

    def seconds(self, work):
        out = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            out.append(time.perf_counter() - start)
        return out


class Kernel:
    """A plugin with its outputs and workspace on the device, called as torch functions are."""

    def __init__(
        self, library: Library, machine: Machine, op: str, attributes: dict, inputs: list[Tensor], out: list[Tensor]
    ):
        made = library.creators[op].create(attributes)
        size = made.workspace(inputs, out) if made else None
        self.plugin = made.as_in_an_engine() if made else None
        if size is None or not self.plugin.shapes(inputs, out):
            raise RuntimeError(f"{op} refuses {attributes} {inputs}: {library.log()}")
        self.library, self.machine, self.inputs, self.outputs = library, machine, inputs, out
        kind = {HALF: torch.float16}
        self.results = [torch.empty(t.shape, dtype=kind[t.dtype], device=machine.device) for t in out]
        self.workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=machine.device)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        sources, targets = ([t.data_ptr() for t in side] for side in (tensors, self.results))
        stream = self.machine.stream()
        error = self.plugin.enqueue(self.inputs, self.outputs, sources, targets, self.workspace.data_ptr(), stream)
        if error:
            raise RuntimeError(f"enqueue returned {error}: {self.library.log()}")
        return self.results[0]


def quartiles(values: list[float], scale: float) -> dict[str, float]:
    low, middle, high = statistics.quantiles([v * scale for v in values], n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}
