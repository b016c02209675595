"""Engines whose plugin layers are our plugin library: its kernels, emulated, on what the layers before them made.

fake_tensorrt runs a plan's plugin nodes as the functions that they stand for. Here the plan is cut at them: ONNX Runtime runs
what lies between, and each node is created, shown its shapes and enqueued through the plugin's own interface, as TensorRT does.
"""

import functools
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import fake_tensorrt
import numpy as np
import onnx
import onnxruntime as ort
import plugin_builds
from fake_engines import Machine, machine
from fake_tensorrt_builder import read_by

from cm_export.plugins.harness.cases import OPS
from cm_export.plugins.harness.library import Library, Tensor, numpy_type
from cm_export.plugins.harness.run import Cpu

_OPS = {op.name: op for op in OPS}
Arrays = dict[str, np.ndarray]


@functools.cache
def plugins() -> Library:
    return Library(plugin_builds.emulated())


class Layer:
    """A plugin layer of an engine: serialised with it and created again, as where it runs."""

    def __init__(self, node: onnx.NodeProto):
        own = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.attributes = {
            n: own[n].decode() if isinstance(own[n], bytes) else own[n] for n in _OPS[node.op_type].attributes
        }
        made = plugins().creators[node.op_type].create(self.attributes)
        assert made is not None, f"{node.name}: {plugins().log()}"
        self.node, self._plugin = node, made.as_in_an_engine()

    def run(self, given: list[np.ndarray]) -> list[np.ndarray]:
        inputs = [Tensor(str(a.dtype), a.shape) for a in given]
        types, shapes = self._plugin.output_types([t.dtype for t in inputs]), self._plugin.output_shapes(inputs)
        assert types is not None and shapes is not None, f"{self.node.name}: {plugins().log()}"
        outputs = [Tensor(*of) for of in zip(types, shapes, strict=True)]
        every = [t.dtype for t in (*inputs, *outputs)]
        assert all(self._plugin.supports(i, every, [0] * len(every)) for i in range(len(every))), self.node.name
        assert self._plugin.shapes(inputs, outputs), f"{self.node.name}: {plugins().log()}"
        size = self._plugin.workspace(inputs, outputs)
        assert size is not None, f"{self.node.name}: {plugins().log()}"
        cpu = Cpu()
        sources = [cpu.put(a, False) for a in given]
        targets, workspace = [cpu.empty(t.bytes) for t in outputs], cpu.empty(size)
        addresses = ([address for _, address in side] for side in (sources, targets))
        error = self._plugin.enqueue(inputs, outputs, *addresses, workspace[1])
        assert error == 0, f"{self.node.name}: {plugins().log()}"
        return [held.view(numpy_type(t.dtype)).reshape(t.shape) for (held, _), t in zip(targets, outputs, strict=True)]


class Part:
    """Nodes between plugin layers. Its session is made at the first run, when the types of what comes in are known."""

    def __init__(self, nodes: list[onnx.NodeProto], model: onnx.ModelProto, later: set[str]):
        made = {o for n in nodes for o in n.output}
        stored = {t.name: t for t in model.graph.initializer}
        read = {i for n in nodes for i in read_by(n)} - made - {""}
        self.given, self.names = sorted(read - set(stored)), sorted(made & later)
        self._nodes, self._weights = nodes, [stored[n] for n in sorted(read & set(stored))]
        self._model, self._session = model, None

    def run(self, values: Arrays) -> Arrays:
        feeds = {n: values[n] for n in self.given}
        if self._session is None:
            kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in feeds.items()}
            inputs = [onnx.helper.make_tensor_value_info(n, k, [None] * feeds[n].ndim) for n, k in kinds.items()]
            outputs = [onnx.ValueInfoProto(name=n) for n in self.names]
            graph = onnx.helper.make_graph(self._nodes, "part", inputs, outputs, self._weights)
            model = onnx.helper.make_model(
                graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
            )
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return dict(zip(self.names, self._session.run(self.names, feeds), strict=True))


class Program(fake_tensorrt.Program):
    """A plan whose plugin layers run in the library. `ran`: how often each op was enqueued, by its attributes."""

    ran: ClassVar[Counter] = Counter()

    def __init__(self, content: bytes):
        super().__init__(content)
        self._steps: list[Part | list[Layer]] | None = None

    def run(self, names: list[str], feeds: Arrays) -> list[np.ndarray]:
        with self._making:
            if self._steps is None:
                self._steps = list(self._cut())
        values = self._constant | feeds
        for step in self._steps:
            if isinstance(step, Part):
                values |= step.run(values)
                continue
            for layer in step:
                out = layer.run([values[n] for n in layer.node.input])
                values |= {n: v for n, v in zip(layer.node.output, out, strict=True) if n}
                Program.ran[layer.node.op_type, tuple(layer.attributes.items())] += 1
        return [values[n] for n in names]

    def _cut(self):
        """What can run before the next plugin layers, these, what can run then, and so on."""
        model, self._model = self._model, None
        left, own = list(model.graph.node), _OPS.keys()
        missing = {o for n in left for o in n.output if o}
        read_as_weight = {i for n in left if n.op_type in own for i in n.input}
        self._constant = {
            t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read_as_weight
        }
        while left:
            for plugin in (False, True):
                taken, rest = [], []
                for node in left:
                    ready = (node.op_type in own) == plugin and not missing.intersection(read_by(node))
                    (taken if ready else rest).append(node)
                    if ready and not plugin:
                        missing -= set(node.output)
                missing -= {o for n in taken for o in n.output}
                left = rest
                if plugin:
                    assert taken or not left, "a plan that goes round"
                    yield [Layer(n) for n in taken]
                elif taken:
                    later = {i for n in left for i in read_by(n)} | {v.name for v in self.outputs}
                    yield Part(taken, model, later)


def with_plugins(at: Machine) -> Machine:
    """The same bundle, on a machine whose plugin library is ours."""
    ours = machine(at.trt._version, program=lambda content, _: Program(bytes(content)))
    return replace(ours, bundle=at.bundle, made_of=at.made_of)
