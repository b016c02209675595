"""The C interface of libcm_harness.so in Python: open a plugin library, make plugins, call them as an engine would."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cm_export.base.errors import InputError

# Numbers of nvinfer1::DataType and PluginFieldType.
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "uint8": 5, "bfloat16": 7, "int64": 8}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FIELD_TYPES = {float: 1, int: 5, str: 6}
BUILD, RUNTIME = 0, 1
_RANK = 8


@dataclass(frozen=True)
class Tensor:
    """What TensorRT says of a tensor: its type by name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * numpy_type(self.dtype).itemsize


def numpy_type(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


class Plugin:
    """An IPluginV3. It is freed with this object."""

    def __init__(self, native: ctypes.CDLL, handle: int, creator: int):
        self._native, self._handle, self._creator = native, handle, creator
        self.outputs = native.harness_outputs(handle)

    def __del__(self):
        self._native.harness_destroy(self._handle)

    def _other(self, handle: int | None) -> "Plugin":
        if not handle:
            raise InputError(f"no plugin came back: {log(self._native)}", where="plugin")
        return Plugin(self._native, handle, self._creator)

    def as_in_an_engine(self) -> "Plugin":
        """Serialised, created again at run time, cloned and attached to a context."""
        engine = self._other(self._native.harness_round_trip(self._creator, self._handle))
        copy = engine._other(self._native.harness_clone(engine._handle))
        return copy._other(self._native.harness_attach(copy._handle))

    def output_types(self, inputs: Sequence[str]) -> list[str] | None:
        out = (ctypes.c_int32 * self.outputs)()
        if self._native.harness_output_types(self._handle, len(inputs), _ints([TYPES[t] for t in inputs]), out):
            return None
        return [name for code in out for name, known in TYPES.items() if known == code]

    def output_shapes(self, inputs: Sequence[Tensor]) -> list[tuple[int, ...]] | None:
        ranks, dims = (ctypes.c_int32 * self.outputs)(), (ctypes.c_int64 * (_RANK * self.outputs))()
        _, given, sizes = _described(inputs)
        if self._native.harness_output_shapes(self._handle, len(inputs), given, sizes, ranks, dims):
            return None
        return [tuple(dims[_RANK * i : _RANK * i + ranks[i]]) for i in range(self.outputs)]

    def supports(self, place: int, types: Sequence[str], formats: Sequence[int]) -> bool:
        codes = _ints([TYPES[t] for t in types])
        inputs = len(types) - self.outputs
        return bool(self._native.harness_supports(self._handle, place, inputs, self.outputs, codes, _ints(formats)))

    def workspace(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int | None:
        """Bytes for shapes up to these; None if configurePlugin refuses them."""
        size = self._call("workspace", inputs, outputs)
        return None if size < 0 else size

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return self._call("configure", inputs, outputs) == 0

    def shapes(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """onShapeChange: whether a call with these shapes may follow."""
        return self._call("shapes", inputs, outputs) == 0

    def enqueue(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        sources: Sequence[int],
        targets: Sequence[int],
        workspace: int,
        stream: int = 0,
    ) -> int:
        """The plugin's own result: 0 if the work was accepted. Addresses are of the device on which it runs."""
        pointers = [(ctypes.c_void_p * len(side))(*side) for side in (sources, targets)]
        return self._call("enqueue", inputs, outputs, *pointers, ctypes.c_void_p(workspace), ctypes.c_void_p(stream))

    def _call(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *more: Any) -> int:
        described = _described([*inputs, *outputs])
        call = getattr(self._native, f"harness_{name}")
        return call(self._handle, len(inputs), len(outputs), *described, *more)


@dataclass(frozen=True)
class Creator:
    """A plugin creator as it describes itself. `fields`: attribute name -> number of its type."""

    name: str
    namespace: str
    version: str
    kind: str
    fields: dict[str, int]
    handle: int
    native: ctypes.CDLL

    def create(self, attributes: dict[str, Any], phase: int = BUILD) -> Plugin | None:
        """The plugin of a node with these attributes, or None if it is refused."""
        texts = {n: v.encode() for n, v in attributes.items() if isinstance(v, str)}
        numbers = {n: (ctypes.c_float if isinstance(v, float) else ctypes.c_int32)(v) for n, v in attributes.items()
                   if not isinstance(v, str)}  # fmt: skip
        held = {n: ctypes.create_string_buffer(t, len(t)) for n, t in texts.items()} | numbers
        count = len(attributes)
        names = (ctypes.c_char_p * count)(*(n.encode() for n in attributes))
        data = (ctypes.c_void_p * count)(*(ctypes.addressof(held[n]) for n in attributes))
        types = _ints([FIELD_TYPES[type(v)] for v in attributes.values()])
        lengths = _ints([len(texts[n]) if n in texts else 1 for n in attributes])
        handle = self.native.harness_create(self.handle, count, names, types, data, lengths, phase)
        return Plugin(self.native, handle, self.handle) if handle else None


def log(native: ctypes.CDLL) -> str:
    """What plugins have logged since the last call."""
    return native.harness_log().decode()


class Library:
    """A plugin library, opened by the harness library that lies beside it or at `harness`."""

    def __init__(self, path: Path, harness: Path | None = None):
        harness = harness or path.parent / "libcm_harness.so"
        for file in (path, harness):
            if not file.is_file():
                raise InputError("no such library", where=file, fix="build it: python -m cm_export.plugins.build")
        self.path = path
        self.native = _native(harness)
        handle = self.native.harness_open(os.fsencode(path.resolve()))
        if not handle:
            raise InputError(self.log().strip(), where=path)
        self.creators = {}
        i = 0
        while creator := self.native.harness_creator(handle, i):
            name, namespace, version, kind, fields = self.native.harness_describe(creator).decode().split("|")
            typed = {n: int(t) for n, t in (f.split(":") for f in fields.split(",") if f)}
            self.creators[name] = Creator(name, namespace, version, kind, typed, creator, self.native)
            i += 1

    def log(self) -> str:
        return log(self.native)

    def reverse(self, on: bool) -> None:
        """Turn the order of blocks and threads around; only an emulated library can."""
        ctypes.CDLL(str(self.path)).cm_emulator_reverse(int(on))

    @property
    def emulated(self) -> bool:
        return hasattr(ctypes.CDLL(str(self.path)), "cm_emulator_reverse")


def _native(path: Path) -> ctypes.CDLL:
    native = ctypes.CDLL(str(path))
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    described = [pointer, i32, i32, pointer, pointer, pointer]
    for name, result, arguments in (
        ("log", ctypes.c_char_p, []),
        ("tensorrt_version", i32, []),
        ("open", pointer, [ctypes.c_char_p]),
        ("creator", pointer, [pointer, i32]),
        ("describe", ctypes.c_char_p, [pointer]),
        ("create", pointer, [pointer, i32, pointer, pointer, pointer, pointer, i32]),
        ("round_trip", pointer, [pointer, pointer]),
        ("clone", pointer, [pointer]),
        ("attach", pointer, [pointer]),
        ("destroy", None, [pointer]),
        ("outputs", i32, [pointer]),
        ("output_types", i32, [pointer, i32, pointer, pointer]),
        ("output_shapes", i32, [pointer, i32, pointer, pointer, pointer, pointer]),
        ("supports", i32, [pointer, i32, i32, i32, pointer, pointer]),
        ("workspace", i64, described),
        ("configure", i32, described),
        ("shapes", i32, described),
        ("enqueue", i32, [*described, pointer, pointer, pointer, pointer]),
    ):
        function = getattr(native, f"harness_{name}")
        function.restype, function.argtypes = result, arguments
    return native


def _ints(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)


def _described(tensors: Sequence[Tensor]) -> tuple[ctypes.Array, ctypes.Array, ctypes.Array]:
    padded = [n for t in tensors for n in (*t.shape, *([0] * (_RANK - len(t.shape))))]
    dims = (ctypes.c_int64 * len(padded))(*padded)
    return _ints([TYPES[t.dtype] for t in tensors]), _ints([len(t.shape) for t in tensors]), dims
