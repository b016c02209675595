"""The builder's half of fake_tensorrt: parse with the rules of a version, check the profile, write a plan that can run."""

import importlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import onnx
from fake_tensorrt_api import DTYPE, Api, HostMemory, ILogger, Severity
from onnx import inliner

from cm_export.base.onnx_text import DOMAIN

_LAYER_OF = {"Constant": "CONSTANT", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "MatMul": "MATRIX_MULTIPLY"}
_LAYER_OF |= {"Gather": "GATHER", "Shape": "SHAPE", "TopK": "TOPK", "Softmax": "SOFTMAX", "Cast": "CAST"}
_LAYER_OF |= {"Loop": "LOOP_OUTPUT", "Attention": "ATTENTION_OUTPUT", "TensorScatter": "KV_CACHE_UPDATE"}
_IMPORTED_SINCE = {"Attention": (10, 14), "RotaryEmbedding": (10, 15), "RMSNormalization": (10, 15)}
_IMPORTED_SINCE |= {"TensorScatter": (10, 15), "NonZero": (99, 0)}  # its shape depends on data: never in our graphs
# Operands whose values are sizes: an input that gets there is a shape tensor.
_SIZES = {"Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "ConstantOfShape": (0,), "Range": (0, 1, 2)}
_SIZES |= {"Tile": (1,), "TopK": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Pad": (1,), "Split": (1,)}


class ITensor(Api):
    def __init__(self, name: str, dtype: Any = None, shape: tuple[int, ...] = (), sizes: bool = False):
        self._values = name, dtype, shape, sizes

    name = property(lambda self: self._values[0])
    dtype = property(lambda self: self._values[1])
    shape = property(lambda self: self._values[2])
    is_shape_tensor = property(lambda self: self._values[3])


class ILayer(Api):
    def __init__(self, node: onnx.NodeProto, kind: Any):
        self._node, self._kind = node, kind
        self._in = read_by(node)
        self._out = [o for o in node.output if o]

    name = property(lambda self: self._node.name)
    type = property(lambda self: self._kind)
    num_inputs = property(lambda self: len(self._in))
    num_outputs = property(lambda self: len(self._out))

    def get_input(self, index: int) -> Any:
        return self._lib._make("ITensor", self._in[index]) if self._in[index] else None

    def get_output(self, index: int) -> Any:
        return self._lib._make("ITensor", self._out[index])


class INetworkDefinition(Api):
    def __init__(self, typed: bool):
        self._typed, self._model, self._plugins, self._sizes = typed, None, set(), set()

    num_inputs = property(lambda self: len(self._model.graph.input))
    num_outputs = property(lambda self: len(self._model.graph.output))
    num_layers = property(lambda self: len(self._model.graph.node))

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        kind = value.type.tensor_type
        shape = tuple(-1 if d.dim_param else d.dim_value for d in kind.shape.dim)
        dtype = getattr(self._lib._enums["DataType"], DTYPE[kind.elem_type])
        return self._lib._make("ITensor", value.name, dtype, shape, value.name in self._sizes)

    def get_input(self, index: int) -> Any:
        return self._tensor(self._model.graph.input[index])

    def get_output(self, index: int) -> Any:
        return self._tensor(self._model.graph.output[index])

    def get_layer(self, index: int) -> Any:
        node = self._model.graph.node[index]
        kind = "PLUGIN_V3" if node.name in self._plugins else _LAYER_OF.get(node.op_type, "ELEMENTWISE")
        return self._lib._make("ILayer", node, getattr(self._lib._enums["LayerType"], kind))


class ParserError(Api):
    def __init__(self, node: onnx.NodeProto, text: str):
        self._node, self._text = node, text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class OnnxParser(Api):
    def __init__(self, network: Any, logger: ILogger):
        self._lib._calls.add(("OnnxParser", "__init__", 2, ()))
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._lib._make("ParserError", *self._errors[index])

    def parse_from_file(self, model: str) -> bool:
        if not isinstance(model, str):
            raise TypeError("parse_from_file(): incompatible function arguments")
        return self._parse(onnx.load(model))

    def parse(self, model: bytes, path: str | None = None) -> bool:
        loaded = onnx.load_model(io.BytesIO(model), load_external_data=False)
        if path:
            onnx.load_external_data_for_model(loaded, str(Path(path).parent))
        return self._parse(loaded)

    def _parse(self, model: onnx.ModelProto) -> bool:
        lib, functions = self._lib, {f.name for f in model.functions}
        taken = {n.op_type for n in model.graph.node if lib._is_plugin(n, functions)}
        for node in model.graph.node:  # the library's own meaning of its plugins, where the functions were stripped
            if node.op_type in taken - functions:
                model.functions.append(_body(node))
                functions.add(node.op_type)
        weights = [*model.graph.initializer]  # the inliner need not copy them to and fro
        del model.graph.initializer[:]
        inlined = inliner.inline_selected_functions(model, [(DOMAIN, t) for t in taken], exclude=True)
        inlined.graph.initializer.extend(weights)
        for node in inlined.graph.node:
            since = _IMPORTED_SINCE.get(node.op_type, (0, 0))
            if node.op_type not in taken and (node.domain == DOMAIN or (lib._number < since and not lib._rtx)):
                self._errors.append((node, "No importer registered"))
            if node.op_type == "Attention" and (len(node.output) > 1 or any(node.input[4:6])):
                self._errors.append((node, "past and present of Attention are not supported"))
        self._network._model, self._network._sizes = inlined, shape_inputs(inlined)
        self._network._plugins = {n.name for n in inlined.graph.node if n.op_type in taken}
        return not self._errors


class IOptimizationProfile(Api):
    def __init__(self) -> None:
        self._shapes: dict[str, list] = {}

    def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError(f"profile of {input}: {min} {opt} {max}")
        self._shapes[input] = [list(map(int, s)) for s in (min, opt, max)]

    def set_shape_input(self, input: str, min: list, opt: list, max: list) -> None:
        self.set_shape(input, min, opt, max)


class ITimingCache(Api):
    def serialize(self) -> HostMemory:
        return HostMemory(b"timings")


class IBuilderConfig(Api):
    _settable = ("builder_optimization_level", "profiling_verbosity", "progress_monitor", "num_compute_capabilities")

    def __init__(self) -> None:
        self._profiles, self._flags, self._cache = [], set(), None
        object.__setattr__(self, "progress_monitor", None)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool.name == "WORKSPACE" and pool_size > 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._lib._make("ITimingCache")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        return True


class Builder(Api):
    def __init__(self, logger: ILogger):
        self._lib._calls.add(("Builder", "__init__", 1, ()))
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        typed = bool(flags >> int(self._lib._enums["NetworkDefinitionCreationFlag"].STRONGLY_TYPED) & 1)
        return self._lib._make("INetworkDefinition", typed or self._lib._number >= (11, 0) or self._lib._rtx)

    def create_builder_config(self) -> Any:
        return self._lib._make("IBuilderConfig")

    def create_optimization_profile(self) -> Any:
        return self._lib._make("IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> HostMemory | None:
        model, profiles = network._model, config._profiles or [{}]
        if not network._typed:
            self._logger.log(Severity.ERROR, "half types in a network that is not strongly typed")
            return None
        for value in model.graph.input:
            shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            if any(isinstance(n, str) for n in shape) and any(value.name not in profile for profile in profiles):
                self._logger.log(Severity.ERROR, f"Network has dynamic input {value.name} without a profile")
                return None
        monitor = config.__dict__["progress_monitor"]
        if monitor:
            monitor.phase_start("Build", None, 1)
            monitor.step_complete("Build", 0)
            monitor.phase_finish("Build")
        lib = self._lib
        graph = model.SerializeToString()
        header = {"version": lib._version, "rtx": lib._rtx, "profiles": profiles, "plugins": sorted(network._plugins)}
        head = json.dumps(header | {"sum": f"{len(graph)}-{zlib.crc32(graph)}"}).encode()
        return HostMemory(b"plan" + len(head).to_bytes(4, "little") + head + graph)


def _body(node: onnx.NodeProto) -> onnx.FunctionProto:
    """What the plugin of a node computes."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    folder = {"CoreFFN": "core_ffn", "CoreAttention": "core_attention", "CoreLinear": "core_linear"}[node.op_type]
    op = importlib.import_module(f"cm_export.plugins.{folder}.op")
    if node.op_type == "CoreFFN":
        bits = attributes.get("bits", 0) if len(node.input) > 5 else 0  # words and scales in place of weights
        form = "token" if node.input[-1].startswith("chosen.") else "request"
        return op.function(form, attributes["activation"].decode(), bits=bits)
    if node.op_type == "CoreLinear":
        return op.function(by_inputs=bool(attributes["by_inputs"]), bits=attributes["bits"])
    return op.function(index=len(node.input) == 5)


def read_by(node: onnx.NodeProto) -> list[str]:
    """Its inputs, and what its bodies read besides."""
    return [*node.input, *sorted(_outer(node))]


def _outer(node: onnx.NodeProto) -> set[str]:
    """What the bodies of a loop or branch read from outside."""
    read: set[str] = set()
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            graph = attribute.g
            made = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            made |= {o for n in graph.node for o in n.output}
            read |= {i for n in graph.node for i in (*n.input, *_outer(n)) if i} - made
    return read


def shape_inputs(model: onnx.ModelProto) -> set[str]:
    """Integer inputs of the graph whose values become sizes."""
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    makers = {o: n for n in model.graph.node for o in n.output}
    todo = [n.input[i] for n in model.graph.node for i in _SIZES.get(n.op_type, ()) if i < len(n.input) and n.input[i]]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        node = makers.get(name)
        if node is not None and node.op_type not in ("Shape", "Size", "TopK", "ArgMax", "ArgMin"):
            todo.extend(i for i in node.input if i)
    return {n for n in seen if kinds.get(n) in (6, 7)}
