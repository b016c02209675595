"""onnxruntime as on a machine with a GPU: its real classes on this CPU, with "cuda" for a memory that nobody can reach into.

ort = FakeOrt()      available providers say CUDA; values and outputs of "cuda" are apart; copies between both are counted
ort.calls            {(class, method)}, each checked against the real signature when it is called
ort.log              in order: ("up" or "down", bytes)
"""

import inspect
from typing import Any

import numpy as np
import onnxruntime as real

CUDA = "CUDAExecutionProvider"


class FakeOrt:
    """Stands where `import onnxruntime as ort` does. `falls_back`: makes sessions on the CPU."""

    __version__, __file__ = real.__version__, real.__file__
    SessionOptions = real.SessionOptions

    def __init__(self, gpus: int = 1, has_provider: bool = True, falls_back: bool = False):
        self.gpus, self.has_provider, self.falls_back = gpus, has_provider, falls_back
        self.calls: set[tuple[str, str]] = set()
        self.log: list[tuple[str, int]] = []
        self.on_device = 0  # bytes of values that were made there
        self.OrtValue = _Values(self)
        self.IOBinding = real.IOBinding

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"] if self.has_provider else ["CPUExecutionProvider"]

    def InferenceSession(self, *args: Any, **kwargs: Any) -> Any:
        self.check(real.InferenceSession, "__init__", None, *args, **kwargs)
        return _Session(self, *args, **kwargs)

    def check(self, owner: Any, name: str, *args: Any, **kwargs: Any) -> None:
        """Raises TypeError for a call that the real API does not take."""
        inspect.signature(getattr(owner, name)).bind(*args, **kwargs)
        self.calls.add((owner.__name__, name))


class Value:
    """An OrtValue of "cuda"."""

    def __init__(self, ort: FakeOrt, inner: Any):
        self._ort, self._inner = ort, inner

    def numpy(self) -> np.ndarray:
        self._ort.log.append(("down", self._inner.numpy().nbytes))
        return self._inner.numpy()

    def shape(self) -> list[int]:
        return self._inner.shape()

    def element_type(self) -> int:
        return self._inner.element_type()

    def device_name(self) -> str:
        return "cuda"


class _Values:
    def __init__(self, ort: FakeOrt):
        self._ort = ort

    def ortvalue_from_numpy(self, *args: Any, **kwargs: Any) -> Any:
        """A copy, so that whoever changes the array afterwards changes nothing there."""
        self._ort.check(real.OrtValue, "ortvalue_from_numpy", *args, **kwargs)
        bound = inspect.signature(real.OrtValue.ortvalue_from_numpy).bind(*args, **kwargs)
        bound.apply_defaults()
        array, device, number = bound.args[:3]
        if device == "cpu":
            return real.OrtValue.ortvalue_from_numpy(array)
        if device != "cuda" or number >= self._ort.gpus:
            raise RuntimeError(f"CUDA failure 101: invalid device ordinal ; {device}:{number}")
        self._ort.log.append(("up", array.nbytes))
        self._ort.on_device += array.nbytes
        return Value(self._ort, real.OrtValue.ortvalue_from_numpy(array.copy()))


class _Session:
    def __init__(self, ort: FakeOrt, model: bytes, options: Any, providers: list, **kwargs: Any):
        self._ort, self._providers = ort, [p if isinstance(p, str) else p[0] for p in providers]
        for provider in providers:
            if isinstance(provider, tuple):
                name, settings = provider
                assert name == CUDA and all(isinstance(v, str) for v in settings.values())
                if int(settings["device_id"]) >= ort.gpus:
                    raise RuntimeError("CUDA failure 101: invalid device ordinal")
        if ort.falls_back:
            self._providers = ["CPUExecutionProvider"]
        self._inner = real.InferenceSession(model, options, providers=["CPUExecutionProvider"], **kwargs)

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> Any:
        return self._inner.get_inputs()

    def get_outputs(self) -> Any:
        return self._inner.get_outputs()

    def io_binding(self) -> Any:
        self._ort.check(real.InferenceSession, "io_binding", None)
        return _Binding(self._ort, self._inner)

    def run_with_iobinding(self, binding: Any) -> None:
        self._ort.check(real.InferenceSession, "run_with_iobinding", None, binding)
        self._inner.run_with_iobinding(binding._inner)
        for value, device in zip(binding._inner.get_outputs(), binding._devices.values(), strict=True):
            if device == "cpu":
                self._ort.log.append(("down", value.numpy().nbytes))


class _Binding:
    def __init__(self, ort: FakeOrt, session: Any):
        self._ort, self._inner = ort, session.io_binding()
        self._devices: dict[str, str] = {}  # of outputs, in the order in which they were first bound

    def bind_cpu_input(self, *args: Any) -> None:
        self._ort.check(real.IOBinding, "bind_cpu_input", None, *args)
        self._ort.log.append(("up", args[1].nbytes))
        self._inner.bind_cpu_input(*args)

    def bind_ortvalue_input(self, *args: Any) -> None:
        self._ort.check(real.IOBinding, "bind_ortvalue_input", None, *args)
        name, value = args
        if not isinstance(value, Value):
            raise TypeError(f"{name} is not on the device: it would be copied at every run")
        self._inner.bind_ortvalue_input(name, value._inner)

    def bind_output(self, *args: Any) -> None:
        self._ort.check(real.IOBinding, "bind_output", None, *args)
        bound = inspect.signature(real.IOBinding.bind_output).bind(None, *args)
        bound.apply_defaults()
        _, name, device, number = bound.args[:4]
        assert device == "cpu" or (device == "cuda" and number < self._ort.gpus)
        self._devices[name] = device
        self._inner.bind_output(name)

    def bind_ortvalue_output(self, *args: Any) -> None:
        self._ort.check(real.IOBinding, "bind_ortvalue_output", None, *args)
        name, value = args
        self._devices[name] = "cuda" if isinstance(value, Value) else "cpu"
        self._inner.bind_ortvalue_output(name, value._inner if isinstance(value, Value) else value)

    def get_outputs(self) -> list[Any]:
        self._ort.check(real.IOBinding, "get_outputs", None)
        found = zip(self._inner.get_outputs(), self._devices.values(), strict=True)
        return [Value(self._ort, value) if device == "cuda" else value for value, device in found]
