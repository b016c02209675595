"""A stand-in for `tensorrt` and `tensorrt_rtx` that parses, builds and runs, with ONNX Runtime on the bound addresses.

    trt = library("10.13.3.9", cuda)     Builder, OnnxParser, Runtime ... as that version has them: what it lacks raises
    parse -> build -> plan (our graph and its profile) -> deserialize -> execution context -> execute_async_v3

Strict where TensorRT is: op types and plugins by version, profiles, addresses on the right side, aliasing of the cache.
`trt._calls` holds every name that was used, for test_tensorrt_api.py to look up in the real bindings. What runs engines is
fake_tensorrt_runtime.py; here is what it needs ONNX and ONNX Runtime for.
"""

import threading
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fake_cuda import FakeCuda
from fake_tensorrt_builder import (
    Builder,
    IBuilderConfig,
    ILayer,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    ITimingCache,
    OnnxParser,
    ParserError,
    shape_inputs,
)
from fake_tensorrt_runtime import Library, Port

_BUILD = (ITensor, ILayer, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile, ITimingCache)


class Program:
    """The graph of a plan on ONNX Runtime: its border, and what an engine tells about its layers."""

    def __init__(self, content: bytes):
        model = onnx.load_from_string(content)
        self.inputs, self.outputs = ([_port(v) for v in values] for values in (model.graph.input, model.graph.output))
        self.sizes = sorted(shape_inputs(model))
        self.layers = [(node.name, node.op_type) for node in model.graph.node]
        for node in model.graph.node:  # what only TensorRT reads
            kept = [a for a in node.attribute if not a.name.startswith("TRT_")]
            del node.attribute[:]
            node.attribute.extend(kept)
        makers = {o: n for n in model.graph.node for o in n.output}
        names = [v.name for v in (*self.inputs, *self.outputs)]
        updated = {n: makers[n].input[0] for n in names if n in makers and makers[n].op_type == "TensorScatter"}
        self.aliases = {n: past for n, past in updated.items() if past in {v.name for v in self.inputs}}
        self._model, self._session, self._making = model, None, threading.Lock()

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The session is made at the first run: most engines of a build are only looked at."""
        with self._making:
            if self._session is None:
                options = ort.SessionOptions()
                options.log_severity_level, options.intra_op_num_threads = 3, 1
                content, self._model = self._model.SerializeToString(), None
                self._session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])
        return self._session.run(names, feeds)


_opened: dict[str, Program] = {}


def program(content: bytes | memoryview, checksum: str) -> Program:
    """That of a plan. One that is opened again is the same: it keeps nothing from one run to the next."""
    found = _opened.pop(checksum, None) or Program(bytes(content))
    while len(_opened) >= 16:  # the one goes that was used the longest ago
        _opened.pop(next(iter(_opened)), None)
    _opened[checksum] = found
    return found


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    return Port(value.name, kind.elem_type, tuple(d.dim_param or d.dim_value for d in kind.shape.dim))


def library(version: str, cuda: FakeCuda, rtx: bool = False, program: Any = program) -> Any:
    """The fake module of that version. `program`: what runs a plan's graph."""
    return Library(version, cuda, rtx, program, (*_BUILD, IBuilderConfig, Builder))
