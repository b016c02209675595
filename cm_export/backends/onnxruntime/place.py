"""Where the values of sessions live: in the memory of this process, or on a CUDA device. One object decides it for a backend.

    here    Place()            arrays are values, sessions read the mapped weights
    apart   Place("cuda", 0)   weights go up once and are inputs of every session that reads them; caches and gathered rows stay
                               there: a step takes its new numbers up and its logits down, nothing else

Nobody else makes sessions or values. Place("cpu", apart=True) makes the same calls without a GPU: so they are tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from ...base.errors import BundleError, InputError
from ...base.onnx_text import IR_VERSION, OPSET
from ...plugins import places as libraries

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PACKAGE = "'onnxruntime-gpu[cuda,cudnn]'"
_ASKED = re.compile(r"cpu|auto|cuda(:(?P<number>\d+))?")
# Products in float32 are not to be rounded to 10 bits; memory grows by what is asked for, not to twice as much.
_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


@dataclass(frozen=True)
class Held:
    """A value where its place has it; `array`: the same bytes, where they lie in this process's memory."""

    value: ort.OrtValue
    shape: tuple[int, ...]
    dtype: np.dtype
    array: np.ndarray | None = None


@dataclass(frozen=True)
class Place:
    """`device`: as ONNX Runtime names it; `apart`: whether its memory is another than this process's.

    `products`: the type of what is large (products with weights, attention, the cache): float32, or float16 where apart.
    `kernels`: the plugin library whose ops sessions take where apart; None: what ONNX Runtime makes of our nodes runs.
    """

    device: str = "cpu"
    number: int = 0
    apart: bool = False
    products: np.dtype = np.dtype(np.float32)  # noqa: RUF009 (a constant)
    kernels: Path | None = None

    @property
    def name(self) -> str:
        return self.device if self.device == "cpu" else f"{self.device}:{self.number}"

    # ------------------------------------------------------------------------------------------ sessions
    def session(
        self, model: onnx.ModelProto, options: ort.SessionOptions | None = None, disabled: Sequence[str] = ()
    ) -> ort.InferenceSession:
        """Raises BundleError where ONNX Runtime has left the device, with what ONNX Runtime raises for a graph it refuses."""
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
        providers: list[Any] = [CPU]
        if self.device == "cuda":
            providers = [(CUDA, {"device_id": str(self.number), **_OPTIONS}), CPU]
        made = ort.InferenceSession(
            model.SerializeToString(), options, providers=providers, disabled_optimizers=list(disabled)
        )
        if self.device == "cuda" and CUDA not in made.get_providers():
            what, fix = why_no_cuda() or ("ONNX Runtime fell back to its CPU provider", "add --device cpu")
            raise BundleError(what, where=f"--device {self.name}", fix=fix)
        return made

    def bind_output(self, binding: ort.IOBinding, name: str, stays: bool) -> None:
        """`stays`: what another session reads, and nobody else."""
        if stays and self.apart:
            binding.bind_output(name, self.device, self.number)
        else:
            binding.bind_output(name)

    # ------------------------------------------------------------------------------------------ values
    def hold(self, array: np.ndarray) -> Held:
        """An array as a value: its own memory, or a copy on the device."""
        whole = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        if not self.apart:
            return Held(ort.OrtValue.ortvalue_from_numpy(whole), whole.shape, whole.dtype, whole)
        return Held(ort.OrtValue.ortvalue_from_numpy(whole, self.device, self.number), whole.shape, whole.dtype)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Held:
        """Never NaN: what no mask lets through is multiplied by zero."""
        return self.hold(np.zeros(shape, dtype))

    def held(self, value: ort.OrtValue) -> Held:
        """An output that stays."""
        if self.apart:
            return Held(value, tuple(value.shape()), onnx.helper.tensor_dtype_to_np_dtype(value.element_type()))
        return self.hold(value.numpy())

    def copy_rows(self, to: Held, at: tuple[int, int], source: Held, of: tuple[int, int], count: int) -> None:
        """`count` rows of request of[0] of [A,H,any,d], from row of[1] on, to request at[0] of [B,H,any,d], row at[1]."""
        if to.array is not None and source.array is not None:
            to.array[at[0], :, at[1] : at[1] + count] = source.array[of[0], :, of[1] : of[1] + count]
            return
        if not count:
            return
        heads = to.shape[1]
        slots = np.moveaxis(np.indices((1, heads, count)), 0, -1) + np.array([at[0], 0, at[1]])
        session = self._copying[to.dtype]
        binding = session.io_binding()
        binding.bind_ortvalue_input("to", to.value)
        binding.bind_ortvalue_input("source", source.value)
        binding.bind_cpu_input("begin", np.array(of, np.int64))
        binding.bind_cpu_input("end", np.array([of[0] + 1, of[1] + count], np.int64))
        binding.bind_cpu_input("slots", np.ascontiguousarray(slots, np.int64))
        binding.bind_ortvalue_output("after", to.value)  # the same memory, so that nothing else is written
        session.run_with_iobinding(binding)

    @cached_property
    def _copying(self) -> Mapping[np.dtype, ort.InferenceSession]:
        return {np.dtype(t): self.session(_copy_graph(np.dtype(t))) for t in (np.float32, np.float16)}


def _copy_graph(dtype: np.dtype) -> onnx.ModelProto:
    kind = {"float32": "float", "float16": "float16"}[dtype.name]
    return onnx.parser.parse_model(f"""
        <ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>
        copy ({kind}[B,H,C,d] to, {kind}[A,H,W,d] source, int64[2] begin, int64[2] end, int64[1,H,N,3] slots)
            => ({kind}[B,H,C,d] after) {{
            axes = Constant <value_ints = [0, 2]> ()
            rows = Slice (source, begin, end, axes)
            after = ScatterND (to, slots, rows)
        }}""")


# ------------------------------------------------------------------------------------------------- which one
def place_for(asked: str | None, products: Any = np.float16) -> tuple[Place, list[str]]:
    """The place that --device asks for (None: this process's memory), and what the user should know about it.

    `products`: their type where it is a device. Raises InputError that says what is missing here.
    """
    if asked is None or asked == "cpu":
        return Place(), []
    found = _ASKED.fullmatch(asked)
    if found is None:
        raise InputError(f"unknown device {asked!r}", where="--device", fix="give cpu, cuda, cuda:1 or auto")
    missing = why_no_cuda()
    if missing and asked == "auto":
        return Place(), [f"runs on the CPU: {missing[0]}"]
    if missing:
        raise InputError(missing[0], where=f"--device {asked}", fix=f"{missing[1]}; or --device cpu")
    kernels = None if libraries.why_unusable() else libraries.trusted()
    place = Place("cuda", int(found["number"] or 0), True, np.dtype(products), kernels)
    try:
        place.session(_copy_graph(np.dtype(np.float32)))
    except Exception as e:  # no such GPU, or a driver that is too old: CUDA's own words
        words = " ".join(str(e).split())[:300]
        if asked == "auto":
            return Place(), [f"runs on the CPU: the CUDA provider cannot be used ({words})"]
        fix = "see whether nvidia-smi shows that GPU; or --device cpu"
        raise InputError(f"the CUDA provider cannot be used ({words})", where=f"--device {asked}", fix=fix) from e
    said = [f"runs on {place.name}: {place.products.name} on ONNX Runtime's CUDA provider"] if asked == "auto" else []
    return place, said


def why_no_cuda() -> tuple[str, str] | None:
    """Why ONNX Runtime has no CUDA provider here, and what mends it; None where its libraries load."""
    if CUDA not in ort.get_available_providers():
        what = f"the installed ONNX Runtime {ort.__version__} has no CUDA provider"
        return what, f"pip uninstall -y onnxruntime && pip install {_PACKAGE}"
    if hasattr(ort, "preload_dlls"):  # those of pip's packages of CUDA and cuDNN, where they are there
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        if library.is_file():  # other systems name it otherwise; a session says there what is missing
            ctypes.CDLL(str(library))
    except OSError as e:
        what = f"ONNX Runtime's CUDA provider does not load ({e})"
        return what, f"bring CUDA and cuDNN: pip install {_PACKAGE}"
    return None
