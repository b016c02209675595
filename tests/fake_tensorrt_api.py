"""What the classes of fake_tensorrt have in common: only names of the version exist, and what may be set can be set."""

import enum
from typing import Any

import numpy as np
from fake_cuda import Recorded

DTYPE = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 9: "BOOL"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}


class Api(Recorded):
    """A class of the library: unknown names raise, as do names of other versions and attributes that cannot be set."""

    _lib: Any  # fake_tensorrt.Library
    _settable: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        if (type(self).__name__, name) in object.__getattribute__(self, "_lib")._absent:
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
