"""A stand-in for `tensorrt` and `tensorrt_rtx` that parses, builds and runs, with ONNX Runtime on the bound addresses.

    trt = library("10.13.3.9", cuda)     Builder, OnnxParser, Runtime ... as that version has them: what it lacks raises
    parse -> build -> plan (our graph and its profile) -> deserialize -> execution context -> execute_async_v3

Strict where TensorRT is: op types and plugins by version, profiles, addresses on the right side, aliasing of the cache.
`trt._calls` holds every name that was used, for test_tensorrt_api.py to look up in the real bindings.
"""

import enum
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fake_cuda import FakeCuda, Recorded, view
from onnx import inliner

from cm_export import by_name
from cm_export.onnx_text import DOMAIN

_FLAGS = "DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE DIRECT_IO VERSION_COMPATIBLE"
_FLAGS += " EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL"
_FLAGS += " WEIGHT_STREAMING REFIT_INDIVIDUAL"
_TYPES = "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4"
_LAYERS = (
    "ELEMENTWISE CONSTANT SHUFFLE MATRIX_MULTIPLY GATHER SCATTER SHAPE TOPK SOFTMAX REDUCE CAST PLUGIN_V3 TRIP_LIMIT"
)
_LAYERS += " LOOP_OUTPUT NORMALIZATION ATTENTION_OUTPUT KV_CACHE_UPDATE"
_NEWER_LAYERS = ("ATTENTION_OUTPUT", "KV_CACHE_UPDATE")
_LAYER_OF = {"Constant": "CONSTANT", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "MatMul": "MATRIX_MULTIPLY"}
_LAYER_OF |= {"Gather": "GATHER", "Shape": "SHAPE", "TopK": "TOPK", "Softmax": "SOFTMAX", "Cast": "CAST"}
_LAYER_OF |= {"Loop": "LOOP_OUTPUT", "Attention": "ATTENTION_OUTPUT", "TensorScatter": "KV_CACHE_UPDATE"}
_IMPORTED_SINCE = {"Attention": (10, 14), "RotaryEmbedding": (10, 15), "RMSNormalization": (10, 15)}
_IMPORTED_SINCE |= {"TensorScatter": (10, 15), "NonZero": (99, 0)}  # its shape depends on data: never in our graphs
_DTYPE = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 9: "BOOL"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
# Operands whose values are sizes: an input that gets there is a shape tensor.
_SIZES = {"Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "ConstantOfShape": (0,), "Range": (0, 1, 2)}
_SIZES |= {"Tile": (1,), "TopK": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Pad": (1,), "Split": (1,)}


class Api(Recorded):
    """A class of the library: unknown names raise, as do names of other versions and attributes that cannot be set."""

    _lib: "Library"
    _settable: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and (type(self).__name__, name) in object.__getattribute__(self, "_lib")._absent:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} in this version")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            if name not in self._settable or (type(self).__name__, name) in self._lib._absent:
                raise AttributeError(f"{type(self).__name__}.{name} cannot be set")
            self._calls.add((type(self).__name__, name, -2, ()))
        object.__setattr__(self, name, value)


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """To be subclassed with `log(severity, msg)`."""

    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING):
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        pass


class IProgressMonitor:
    """To be subclassed."""


class HostMemory(bytes):
    """What a builder returns; a buffer."""

    @property
    def nbytes(self) -> int:
        return len(self)


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
        self._in = [*node.input, *sorted(_outer(node))]
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
        self._typed, self._model, self._plugins = typed, None, set()

    num_inputs = property(lambda self: len(self._model.graph.input))
    num_outputs = property(lambda self: len(self._model.graph.output))
    num_layers = property(lambda self: len(self._model.graph.node))

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        kind = value.type.tensor_type
        shape = tuple(-1 if d.dim_param else d.dim_value for d in kind.shape.dim)
        dtype = getattr(self._lib._enums["DataType"], _DTYPE[kind.elem_type])
        return self._lib._make("ITensor", value.name, dtype, shape, value.name in _shape_inputs(self._model))

    def get_input(self, index: int) -> Any:
        return self._tensor(self._model.graph.input[index])

    def get_output(self, index: int) -> Any:
        return self._tensor(self._model.graph.output[index])

    def get_layer(self, index: int) -> Any:
        node = self._model.graph.node[index]
        kind = "PLUGIN_V3" if node.name in self._plugins else _LAYER_OF.get(node.op_type, "ELEMENTWISE")
        return self._lib._make("ILayer", node, self._lib._enums["LayerType"].__dict__.get(kind) or kind)


class ParserError(Api):
    def __init__(self, text: str):
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser(Api):
    def __init__(self, network: Any, logger: ILogger):
        self._lib._calls.add(("OnnxParser", "__init__", 2, ()))
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._lib._make("ParserError", self._errors[index])

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
        inlined = inliner.inline_selected_functions(model, [(DOMAIN, t) for t in taken], exclude=True)
        for node in inlined.graph.node:
            since = _IMPORTED_SINCE.get(node.op_type, (0, 0))
            if node.op_type not in taken and (node.domain == DOMAIN or (lib._number < since and not lib._rtx)):
                self._errors.append(
                    f"In node with name: {node.name} and operator: {node.op_type}: No importer registered"
                )
            if node.op_type == "Attention" and (len(node.output) > 1 or any(node.input[4:6])):
                self._errors.append(f"In node with name: {node.name}: past and present of Attention are not supported")
        self._network._model = inlined
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
        model, profile = network._model, (config._profiles or [{}])[0]
        if not network._typed:
            self._logger.log(Severity.ERROR, "half types in a network that is not strongly typed")
            return None
        for value in model.graph.input:
            shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            if any(isinstance(n, str) for n in shape) and value.name not in profile:
                self._logger.log(Severity.ERROR, f"Network has dynamic input {value.name} without a profile")
                return None
        monitor = config.__dict__["progress_monitor"]
        if monitor:
            monitor.phase_start("Build", None, 1)
            monitor.step_complete("Build", 0)
            monitor.phase_finish("Build")
        lib = self._lib
        header = {"version": lib._version, "rtx": lib._rtx, "profile": profile, "plugins": sorted(network._plugins)}
        head = json.dumps(header).encode()
        return HostMemory(b"plan" + len(head).to_bytes(4, "little") + head + model.SerializeToString())


class IPluginRegistry(Api):
    def load_library(self, plugin_path: str) -> Any:
        if not isinstance(plugin_path, str):
            raise TypeError("load_library(): incompatible function arguments")
        if not Path(plugin_path).is_file():
            return None
        self._lib._plugins |= {"CoreFFN", "CoreAttention"}
        return object()


class Runtime(Api):
    def __init__(self, logger: ILogger):
        self._lib._calls.add(("Runtime", "__init__", 1, ()))
        self._logger = logger

    def get_plugin_registry(self) -> Any:
        return self._lib._registry

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        plan, lib = bytes(serialized_engine), self._lib
        if plan[:4] != b"plan":
            self._logger.log(
                Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization assertion failed"
            )
            return None
        size = int.from_bytes(plan[4:8], "little")
        header = json.loads(plan[8 : 8 + size])
        if (header["version"], header["rtx"]) != (lib._version, lib._rtx):
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        if header["plugins"] and not lib._plugins:
            self._logger.log(Severity.ERROR, "getPluginCreator could not find plugin CoreFFN version: 1")
            return None
        return lib._make("ICudaEngine", header, onnx.load_from_string(plan[8 + size :]), self._logger)


class EngineInspector(Api):
    def __init__(self, engine: Any):
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        layers = []
        for node in self._engine._model.graph.node:
            plugin = node.name in self._engine._header["plugins"]
            layers.append({"Name": node.name, "LayerType": "PluginV3" if plugin else node.op_type})
        return json.dumps({"Layers": layers})


class ICudaEngine(Api):
    _settable = ("weight_streaming_budget_v2",)

    def __init__(self, header: dict, model: onnx.ModelProto, logger: ILogger):
        self._header, self._model, self._logger = header, model, logger
        self._io = {v.name: v for v in (*model.graph.input, *model.graph.output)}
        self._inputs = [v.name for v in model.graph.input]
        self._sizes = _shape_inputs(model)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        makers = {o: n for n in model.graph.node for o in n.output}
        updated = {n: makers[n].input[0] for n in self._io if n in makers and makers[n].op_type == "TensorScatter"}
        self._aliases = {n: past for n, past in updated.items() if past in self._inputs}

    num_io_tensors = property(lambda self: len(self._io))
    num_layers = property(lambda self: len(self._model.graph.node))
    device_memory_size_v2 = property(lambda self: 4096)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        kinds = self._lib._enums["TensorIOMode"]
        return kinds.INPUT if name in self._inputs else kinds.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._lib._enums["DataType"], _DTYPE[self._io[name].type.tensor_type.elem_type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if d.dim_param else d.dim_value for d in self._io[name].type.tensor_type.shape.dim)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list:
        return [tuple(s) for s in self._header["profile"][name]]  # KeyError: not a dynamic input

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self._sizes

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1 << 20

    def get_aliased_input_tensor(self, name: str) -> str:
        return self._aliases.get(name, "")

    def create_engine_inspector(self) -> Any:
        return self._lib._make("EngineInspector", self)

    def create_execution_context(self, strategy: Any = None) -> Any:
        return self._lib._make("IExecutionContext", self, strategy is not None and strategy.name == "USER_MANAGED")


class IExecutionContext(Api):
    def __init__(self, engine: Any, needs_memory: bool):
        self._engine, self._needs_memory = engine, needs_memory
        self._addresses: dict[str, int] = {}
        self._shapes = {n: s for n in engine._inputs if -1 not in (s := ICudaEngine.get_tensor_shape(engine, n))}
        self._out: dict[tuple, dict[str, tuple[int, ...]]] = {}
        self._scratch = 0

    def _say(self, text: str) -> bool:
        self._engine._logger.log(Severity.ERROR, f"IExecutionContext: Error Code 3: {text}")
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < 4096 or not self._lib._cuda._holds(self._lib._cuda._device, memory, size):
            raise ValueError("the memory is too small or not on the device")
        self._needs_memory, self._scratch = False, memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = ICudaEngine.get_tensor_shape(self._engine, name)
        least, _, most = self._engine._header["profile"].get(name, [fixed] * 3)
        if len(shape) != len(fixed) or not all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
            return self._say(f"setInputShape: {name} {shape} is outside {least} to {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._io or not isinstance(memory, int) or not memory:
            return self._say(f"setTensorAddress: {name}")
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [
            n
            for n in self._engine._inputs
            if n not in self._shapes or (n in self._engine._sizes and n not in self._addresses)
        ]

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(_NUMPY[_DTYPE[self._engine._io[name].type.tensor_type.elem_type]])

    def _outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs: from the axes' names, or from a run over zeros."""
        sizes = {n: view(self._addresses[n], self._shapes[n], self._dtype(n)).tolist() for n in self._engine._sizes}
        key = (tuple(self._shapes.items()), json.dumps(sizes))
        if key not in self._out:
            axes = {}
            for value in self._engine._model.graph.input:
                for axis, length in zip(value.type.tensor_type.shape.dim, self._shapes[value.name], strict=True):
                    axes[axis.dim_param] = length
            found = {}
            for value in self._engine._model.graph.output:
                shape = value.type.tensor_type.shape.dim
                found[value.name] = tuple(axes.get(d.dim_param, -1) if d.dim_param else d.dim_value for d in shape)
            if any(-1 in s for s in found.values()):
                feeds = {n: np.zeros(s, self._dtype(n)) for n, s in self._shapes.items()}
                feeds |= {n: np.array(v, self._dtype(n)) for n, v in sizes.items()}
                values = self._engine._session.run(list(found), feeds)
                found = {n: v.shape for n, v in zip(found, values, strict=True)}
            self._out[key] = found
        return self._out[key]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._shapes.get(name, ICudaEngine.get_tensor_shape(self._engine, name))
        return self._outputs()[name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda = self._engine, self._lib._cuda
        if self._needs_memory:
            return self._say("enqueueV3: the context has no device memory")
        if self._scratch and not cuda._holds(cuda._device, self._scratch, 4096):
            return self._say("enqueueV3: the context's device memory was freed")
        missing = [n for n in engine._io if n not in self._addresses] + IExecutionContext.infer_shapes(self)
        if missing:
            return self._say(f"enqueueV3: {missing[0]} has no address or shape")
        shapes, addresses = self._shapes | self._outputs(), dict(self._addresses)
        for name, shape in shapes.items():
            size = int(np.prod(shape, dtype=np.int64)) * self._dtype(name).itemsize
            if cuda._holds(cuda._device, addresses[name], size) == (name in engine._sizes):
                return self._say(f"enqueueV3: {name} is not within memory of the right kind")
        for name in engine._io:
            past = name.replace("present", "past", 1)
            if name.startswith("present.") and past in addresses:
                same = addresses[name] == addresses[past]
                if same != (engine._aliases.get(name) == past):
                    return self._say(
                        f"enqueueV3: {name} {'must not' if same else 'must'} be bound to the address of {past}"
                    )

        def work() -> None:
            feeds = {n: view(addresses[n], shapes[n], self._dtype(n)).copy() for n in engine._inputs}
            names = [n for n in engine._io if n not in engine._inputs]
            for name, value in zip(names, engine._session.run(names, feeds), strict=True):
                assert value.shape == shapes[name], f"{name}: {value.shape} was promised as {shapes[name]}"
                view(addresses[name], shapes[name], self._dtype(name))[...] = value

        return cuda._push(stream_handle, "engine", work)[0] == 0


class Library(Recorded):
    """The module `tensorrt` (or `tensorrt_rtx`) of one version."""

    def __init__(self, version: str, cuda: FakeCuda, rtx: bool = False):
        self._calls, self._version, self._rtx, self._cuda = set(), version, rtx, cuda
        self._number = tuple(int(n) for n in version.split(".")[:2])
        self._plugins: set[str] = set()
        newest = rtx or self._number >= (11, 0)
        has_alias = rtx or self._number >= (10, 16)
        self._absent = set() if has_alias else {("ICudaEngine", "get_aliased_input_tensor")}
        if not rtx:
            self._absent |= {("IBuilderConfig", n) for n in ("num_compute_capabilities", "set_compute_capability")}
        creation = "STRONGLY_TYPED" if rtx else "EXPLICIT_BATCH STRONGLY_TYPED"
        old = "" if newest else "FP16 BF16 INT8 FP8 INT4 OBEY_PRECISION_CONSTRAINTS "
        layers = [n for n in _LAYERS.split() if rtx or self._number >= (10, 15) or n not in _NEWER_LAYERS]
        names = {
            "BuilderFlag": old + _FLAGS,
            "NetworkDefinitionCreationFlag": "STRONGLY_TYPED" if newest else creation,
            "DataType": _TYPES,
            "LayerType": " ".join(layers),
            "MemoryPoolType": "WORKSPACE TACTIC_DRAM TACTIC_SHARED_MEMORY",
            "ProfilingVerbosity": "LAYER_NAMES_ONLY DETAILED NONE",
            "LayerInformationFormat": "ONELINE JSON",
            "TensorIOMode": "NONE INPUT OUTPUT",
            "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED",
        }
        if rtx:
            names["ComputeCapability"] = "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121"
        self._enums = {n: self._enum(n, members.split()) for n, members in names.items()}
        self._classes = {}
        for base in (ITensor, ILayer, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile, ITimingCache,
                     IBuilderConfig, Builder, IPluginRegistry, Runtime, EngineInspector, ICudaEngine, IExecutionContext):  # fmt: skip
            self._classes[base.__name__] = type(base.__name__, (base,), {"_lib": self, "_calls": self._calls})
        self._registry = self._make("IPluginRegistry")
        public = {n: self._classes[n] for n in ("Builder", "OnnxParser", "Runtime")} | self._enums
        self.__dict__ |= public | {"ILogger": ILogger, "Logger": Logger, "IProgressMonitor": IProgressMonitor}
        self.__version__ = version

    def _enum(self, name: str, members: list[str]) -> Any:
        kind = enum.IntEnum(name, members, start=0)
        # Values of flags are shifted by; STRONGLY_TYPED is 1 wherever it stands.
        holder = type(name, (Recorded,), {"_calls": self._calls})()
        holder.__dict__ |= {m: kind[m] for m in members} | {"__members__": {m: kind[m] for m in members}}
        return holder

    def _make(self, name: str, *args: Any) -> Any:
        return self._classes[name](*args)

    def get_plugin_registry(self) -> Any:
        return self._registry

    def _is_plugin(self, node: onnx.NodeProto, functions: set[str]) -> bool:
        """Whether the node becomes a plugin layer, by the rule of this version (10.6, 10.14, later)."""
        if self._rtx or node.op_type not in self._plugins:
            return False
        if node.op_type not in functions:
            return True
        named = {a.name for a in node.attribute} >= {"plugin_namespace", "plugin_version"}
        return (self._number >= (10, 15) and named) or (10, 7) <= self._number < (10, 15)


def library(version: str, cuda: FakeCuda, rtx: bool = False) -> Any:
    """The fake module of that version."""
    return Library(version, cuda, rtx)


def _body(node: onnx.NodeProto) -> onnx.FunctionProto:
    """What the plugin of a node computes."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    folder = {"CoreFFN": "core_ffn", "CoreAttention": "core_attention"}[node.op_type]
    op = by_name.importlib.import_module(f"cm_export.plugins.{folder}.op")
    if node.op_type == "CoreFFN":
        return op.function("request", attributes["activation"].decode())
    return op.function(index=len(node.input) == 5)


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


def _shape_inputs(model: onnx.ModelProto) -> set[str]:
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
