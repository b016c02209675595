"""The half of fake_tensorrt that opens plans and runs them: shapes, addresses and streams, as strict as TensorRT.

It needs numpy alone, so it also stands in for `tensorrt` on a device without ONNX Runtime; `program` makes of a plan's graph
what computes (fake_tensorrt.Program, or its like in another process).
"""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import FakeCuda, Recorded, view
from fake_tensorrt_api import DTYPE, NUMPY, Api, ILogger, IProgressMonitor, Logger, Severity


@dataclass(frozen=True)
class Port:
    """An input or output: its type as ONNX numbers it, and axes, of which those with a name may change."""

    name: str
    type: int
    axes: tuple

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self.axes)


_FLAGS = "DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE DIRECT_IO VERSION_COMPATIBLE"
_FLAGS += " EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL"
_FLAGS += " WEIGHT_STREAMING REFIT_INDIVIDUAL"
_TYPES = "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4"
_LAYERS = (
    "ELEMENTWISE CONSTANT SHUFFLE MATRIX_MULTIPLY GATHER SCATTER SHAPE TOPK SOFTMAX REDUCE CAST PLUGIN_V3 TRIP_LIMIT"
)
_LAYERS += " LOOP_OUTPUT NORMALIZATION ATTENTION_OUTPUT KV_CACHE_UPDATE"
_LAYERS_SINCE = {"ATTENTION_OUTPUT": (10, 14), "KV_CACHE_UPDATE": (10, 15)}


class IPluginRegistry(Api):
    def load_library(self, plugin_path: str) -> Any:
        if not isinstance(plugin_path, str):
            raise TypeError("load_library(): incompatible function arguments")
        if not Path(plugin_path).is_file():
            return None
        self._lib._plugins |= {"CoreFFN", "CoreAttention", "CoreLinear"}
        return object()


class Runtime(Api):
    def __init__(self, logger: ILogger):
        self._lib._calls.add(("Runtime", "__init__", 1, ()))
        self._logger = logger

    def get_plugin_registry(self) -> Any:
        return self._lib._registry

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        plan, lib = memoryview(serialized_engine).cast("B"), self._lib
        if bytes(plan[:4]) != b"plan":
            self._logger.log(
                Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization assertion failed"
            )
            return None
        size = int.from_bytes(plan[4:8], "little")
        header = json.loads(bytes(plan[8 : 8 + size]))
        if (header["version"], header["rtx"]) != (lib._version, lib._rtx):
            self._logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        if header["plugins"] and not lib._plugins:
            self._logger.log(Severity.ERROR, "getPluginCreator could not find plugin CoreFFN version: 1")
            return None
        return lib._make("ICudaEngine", header, lib._program(plan[8 + size :], header["sum"]), self._logger)


class EngineInspector(Api):
    def __init__(self, engine: Any):
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        layers = []
        for name, kind in self._engine._program.layers:
            plugin = name in self._engine._header["plugins"]
            layers.append({"Name": name, "LayerType": "PluginV3" if plugin else kind})
        return json.dumps({"Layers": layers})


class ICudaEngine(Api):
    _settable = ("weight_streaming_budget_v2",)

    def __init__(self, header: dict, program: Any, logger: ILogger):
        self._header, self._program, self._logger = header, program, logger
        self._io = {v.name: v for v in (*program.inputs, *program.outputs)}
        self._inputs = [v.name for v in program.inputs]
        self._sizes, self._aliases = set(program.sizes), program.aliases

    num_io_tensors = property(lambda self: len(self._io))
    num_layers = property(lambda self: len(self._program.layers))
    device_memory_size_v2 = property(lambda self: 4096 * (1 + ("pixel_values" in self._io)))  # a tower needs the most

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        kinds = self._lib._enums["TensorIOMode"]
        return kinds.INPUT if name in self._inputs else kinds.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._lib._enums["DataType"], DTYPE[self._io[name].type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._io[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list:
        return [tuple(s) for s in self._header["profiles"][profile_index][name]]  # KeyError: not a dynamic input

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
        self._scratch = self._profile = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not isinstance(stream_handle, int):
            raise TypeError("set_optimization_profile_async(): incompatible function arguments")
        if profile_index >= len(self._engine._header["profiles"]):
            return self._say(f"setOptimizationProfileAsync: profile {profile_index} is not there")
        self._profile = profile_index
        return True

    def _say(self, text: str) -> bool:
        self._engine._logger.log(Severity.ERROR, f"IExecutionContext: Error Code 3: {text}")
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        need = 4096 * (1 + ("pixel_values" in self._engine._io))
        if size < need or not self._lib._cuda._holds(self._lib._cuda._device, memory, size):
            raise ValueError("the memory is too small or not on the device")
        self._needs_memory, self._scratch = False, memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = ICudaEngine.get_tensor_shape(self._engine, name)
        least, _, most = self._engine._header["profiles"][self._profile].get(name, [fixed] * 3)
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
        return np.dtype(NUMPY[DTYPE[self._engine._io[name].type]])

    def _outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs: from the axes' names, or from a run over zeros."""
        sizes = {n: view(self._addresses[n], self._shapes[n], self._dtype(n)).tolist() for n in self._engine._sizes}
        key = (tuple(self._shapes.items()), json.dumps(sizes))
        if key not in self._out:
            axes = {}
            program, found = self._engine._program, {}
            for value in program.inputs:
                axes |= dict(zip(value.axes, self._shapes[value.name], strict=True))
            for value in program.outputs:
                found[value.name] = tuple(axes.get(a, -1) if isinstance(a, str) else a for a in value.axes)
            if any(-1 in s for s in found.values()):
                feeds = {n: np.zeros(s, self._dtype(n)) for n, s in self._shapes.items()}
                feeds |= {n: np.array(v, self._dtype(n)) for n, v in sizes.items()}
                values = self._engine._program.run(list(found), feeds)
                found = {n: v.shape for n, v in zip(found, values, strict=True)}
            self._out[key] = found
        return self._out[key]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._shapes.get(name, ICudaEngine.get_tensor_shape(self._engine, name))
        return self._outputs()[name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not isinstance(stream_handle, int):
            raise TypeError("execute_async_v3(): incompatible function arguments")
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
            feeds = {n: view(addresses[n], shapes[n], self._dtype(n)) for n in engine._inputs}
            names = [n for n in engine._io if n not in engine._inputs]
            for name, value in zip(names, engine._program.run(names, feeds), strict=True):
                assert value.shape == shapes[name], f"{name}: {value.shape} was promised as {shapes[name]}"
                view(addresses[name], shapes[name], self._dtype(name))[...] = value

        return cuda._push(stream_handle, "engine", work)[0] == 0


class Library(Recorded):
    """The module `tensorrt` (or `tensorrt_rtx`) of one version."""

    def __init__(
        self,
        version: str,
        cuda: FakeCuda,
        rtx: bool,
        program: Callable[[memoryview, str], Any],
        build: tuple[type, ...] = (),
    ):
        """`program`: of a plan's graph and its checksum; `build`: the classes of a builder, where there is one."""
        self._program = program
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
        layers = [n for n in _LAYERS.split() if rtx or self._number >= _LAYERS_SINCE.get(n, (0, 0))]
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
        run = IPluginRegistry, Runtime, EngineInspector, ICudaEngine, IExecutionContext
        for base in (*build, *run):
            self._classes[base.__name__] = type(base.__name__, (base,), {"_lib": self, "_calls": self._calls})
        self._registry = self._make("IPluginRegistry")
        named = [n for n in ("Builder", "OnnxParser", "Runtime") if n in self._classes]
        public = {n: self._classes[n] for n in named} | self._enums
        self.__dict__ |= public | {"ILogger": ILogger, "Logger": Logger, "IProgressMonitor": IProgressMonitor}
        self.__version__ = version

    def _enum(self, name: str, members: list[str]) -> Any:
        kind = enum.IntEnum(name, members, start=0)
        holder = type(name, (Recorded,), {"_calls": self._calls})()
        holder.__dict__ |= {m: kind[m] for m in members} | {"__members__": {m: kind[m] for m in members}}
        return holder

    def _make(self, name: str, *args: Any) -> Any:
        return self._classes[name](*args)

    def get_plugin_registry(self) -> Any:
        return self._registry

    def _is_plugin(self, node: Any, functions: set[str]) -> bool:
        """Whether the node becomes a plugin layer, by the rule of this version (10.6, 10.14, later)."""
        if self._rtx or node.op_type not in self._plugins:
            return False
        if node.op_type not in functions:
            return True
        named = {a.name for a in node.attribute} >= {"plugin_namespace", "plugin_version"}
        return (self._number >= (10, 15) and named) or (10, 7) <= self._number < (10, 15)
