"""What the harness runs: the ops' own cases in every type of the kernels, and sizes at which their work is cut.

Each Call knows its node's attributes, its arrays and what the op's function gives for them in float32.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort

from ..contract import Arrays, Op, model
from ..core_attention import op as attention
from ..core_ffn import op as ffn
from ..core_linear import op as linear
from .library import Tensor, numpy_type

OPS: tuple[Op, ...] = (ffn.OP, attention.OP, linear.OP)
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FarApart(attention.Case):
    """Every query sees one row only, so most splits and teams of lanes see none. `hidden`: what hides a row."""

    hidden: float = -np.inf

    def feeds(self) -> Arrays:
        feeds = super().feeds()
        seen = np.arange(self.P) == 0  # listed in every case
        feeds["mask"][:] = np.where(seen, 0, max(self.hidden, float(np.finfo(self.dtype).min)) if np.isfinite(self.hidden)
                                    else self.hidden)  # fmt: skip
        return feeds


# Sizes at which more than one block, split, tile of rows or tile of columns is at work, full and not.
_FFN = (
    ffn.Case("request", D=520, F=400, K=300),
    ffn.Case("request", B=2, S=3, D=264, F=200, K=130, ascending=False),
    ffn.Case("request", S=16, D=128, F=160, K=100, ascending=False),
    ffn.Case("none", B=2, S=5, D=256, F=150),
    ffn.Case("token", B=2, S=3, D=128, F=300, K=200, ascending=False),
    ffn.Case("token", S=40, D=64, F=200, K=150, ascending=False),  # so many rows that the sum over neurons is not cut
    ffn.Case("token", S=40, D=64, F=200, K=150, bits=4, group=32),
    ffn.Case("request", D=1056, F=120, K=100, bits=4, group=32, ascending=False),
    ffn.Case("request", S=6, D=544, F=130, K=90, bits=8, group=16, ascending=False),
    ffn.Case("token", S=2, D=160, F=256, K=30, block=8, bits=4, group=80, ascending=False),
    ffn.Case("request", D=200, F=256, K=6, block=32, bits=8, group=100),
    ffn.Case("request", B=2, S=2, D=133, F=300, K=280, ascending=False),
)
_LINEAR = (
    linear.Case(by_inputs=True, D=520, N=400),
    linear.Case(by_inputs=True, B=2, S=3, D=264, N=200, kept=0.2),
    linear.Case(by_inputs=True, S=16, D=160, N=128, kept=0.7),
    linear.Case(by_inputs=True, B=3, S=40, D=200, N=64),
    linear.Case(by_inputs=True, D=120, N=1056, bits=4, group=32, kept=0.3),
    linear.Case(by_inputs=True, S=6, D=130, N=544, bits=8, group=16),
    linear.Case(by_inputs=True, B=2, S=2, D=300, N=133, kept=0.1),
)
_ATTENTION = (
    attention.Case(True, H=7, Hk=1, P=300, M=200, d=128, ascending=False),
    attention.Case(True, B=2, H=12, Hk=2, S=3, P=150, M=100, d=64, ascending=False),
    attention.Case(True, B=2, H=6, Hk=3, P=90, M=70, d=256),
    attention.Case(True, H=4, Hk=1, P=90, M=80, d=80, mask_rows="1"),
    attention.Case(False, H=4, Hk=2, S=16, P=100, d=40),
    attention.Case(True, H=6, Hk=2, S=2, P=200, M=150, d=33, ascending=False),
    FarApart(True, B=2, H=6, Hk=2, S=2, P=200, M=150, d=64, ascending=False),
    FarApart(True, B=2, H=6, Hk=2, S=2, P=200, M=150, d=64, ascending=False, hidden=np.finfo(np.float32).min),
)


@dataclass(frozen=True)
class Call:
    """One enqueue: an op, a case, the type of its numbers, and whether its arrays lie at odd addresses."""

    op: Op
    case: Any
    dtype: str
    shifted: bool = False

    def __str__(self) -> str:
        return f"{self.op.name} {self.dtype}{' shifted' if self.shifted else ''} {self.case}"

    @functools.cached_property
    def feeds(self) -> Arrays:
        """The inputs in the node's order, numbers rounded to the call's type."""
        made, kind = self.case.feeds(), numpy_type(self.dtype)
        names = self.op.body(**self.case.form).input
        as_made = {n for n in names if made[n].dtype.kind == "i" or n in self.op.decides}
        with np.errstate(over="ignore"):  # the lowest float32 becomes -inf, which hides a row as well
            return {n: made[n] if n in as_made else made[n].astype(kind) for n in names}

    @property
    def inputs(self) -> list[Tensor]:
        return [Tensor(str(a.dtype), a.shape) for a in self.feeds.values()]

    @functools.cached_property
    def expected(self) -> Arrays:
        """The outputs of the op's function, in float32."""
        case = replace(self.case, dtype="float32")
        feeds = {n: a if a.dtype.kind == "i" else a.astype(np.float32) for n, a in self.feeds.items()}
        names = list(self.op.body(**case.form).output)
        run = _session(self.op.name, model(self.op, case).SerializeToString())
        return dict(zip(names, run.run(names, feeds), strict=True))

    @property
    def outputs(self) -> list[Tensor]:
        return [Tensor(self.dtype, a.shape) for a in self.expected.values()]


@functools.lru_cache(maxsize=64)
def _session(name: str, serialized: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def has_kernel(case: Any) -> bool:
    """Engines have thresholds in CoreLinear alone, on weights that are held by inputs; other forms are for ONNX runtimes."""
    return case.form.get("index") != "active" and case.form.get("by_inputs", True)


def calls() -> Iterator[Call]:
    """Every call that a library is checked with."""
    every = ((ffn.OP, _FFN), (attention.OP, _ATTENTION), (linear.OP, _LINEAR))
    for op, larger in every:
        for case in (*filter(has_kernel, op.cases), *larger):
            for dtype in FLOATS if case.dtype == "float32" else (case.dtype,):
                yield Call(op, case, dtype)
    for op, larger in every:
        yield from (Call(op, case, "float16", shifted=True) for case in larger[:2])
    yield Call(ffn.OP, next(c for c in _FFN if c.bits), "float16", shifted=True)
