"""A stand-in for triton_python_backend_utils, strict where Triton is, and for the requests that a server would hand over.

sent = Sent()                      request(sent, text_input=b"hi", stream=True)      Model(args, utils).execute([request])
sent.wait() -> responses: (tensors by name, error or None, whether it was the last)
"""

import threading
from dataclasses import dataclass, field

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_MEMORY_CPU = 0
TYPES = {"text_input": np.object_, "max_tokens": np.int32, "seed": np.int64, "guard": np.int32, "top_k": np.int32}
TYPES |= {"min_tokens": np.int32, "stream": np.bool_, "dense": np.bool_, "kept": np.bool_}
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "token_share", "neuron_share", "deadline")


class Tensor:
    def __init__(self, name: str, value: np.ndarray):
        assert isinstance(value, np.ndarray) and value.dtype != np.float64, name
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, text: str, code: int = INTERNAL):
        super().__init__(text)
        self.text, self.code = text, code


class InferenceResponse:
    def __init__(self, output_tensors: list, error: TritonError | None = None):
        self.tensors, self.error = {t.name(): t.as_numpy() for t in output_tensors}, error


@dataclass
class _Metric:
    labels: dict
    buckets: list | None = None
    value: float = 0.0
    seen: list = field(default_factory=list)

    def increment(self, amount: float) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        assert self.buckets
        self.seen.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    all: dict = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, kind: str):
        self.name, self.kind, self.metrics = name, kind, []
        self.all[name] = self

    def Metric(self, labels: dict, **more) -> _Metric:
        self.metrics.append(_Metric(labels, **more))
        return self.metrics[-1]


def get_input_tensor_by_name(request, name: str) -> Tensor | None:
    return request.tensors.get(name)


class Sent:
    """What was sent for one request; `cancelled` is set by a test."""

    def __init__(self):
        self.responses, self.cancelled, self._last = [], False, threading.Event()
        self.threads = set()

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self._last.is_set(), "a response after the last one"
        self.threads.add(threading.current_thread().name)
        self.responses.append((response.tensors, response.error, bool(flags)))
        if flags:
            self._last.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self, seconds: float = 60) -> list:
        assert self._last.wait(seconds), "no last response"
        return self.responses

    @property
    def text(self) -> str:
        return "".join(t["text_output"][0].decode() for t, _, _ in self.responses if "text_output" in t)

    @property
    def error(self) -> TritonError | None:
        return self.responses[-1][1]


class Request:
    def __init__(self, sent: Sent, parameters: str = "", **inputs):
        self._sent, self._parameters = sent, parameters
        self.tensors = {name: Tensor(name, _array(name, value)) for name, value in inputs.items()}

    def get_response_sender(self) -> Sent:
        return self._sent

    def request_id(self) -> str:
        return ""

    def parameters(self) -> str:
        return self._parameters


def _array(name: str, value) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    kind = np.float32 if name in FLOATS else TYPES.get(name, np.object_)
    return np.array(value if isinstance(value, list) else [value], kind)
