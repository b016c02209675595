"""What an op is: a node whose meaning is an ONNX function, an independent oracle, and cases to compare them on.

CoreFFN node + FunctionProto CoreFFN            -> runs wherever ONNX runs; the function is the meaning
CoreFFN node + a plugin registered for CoreFFN  -> the kernel, tested against the function and the oracle

op.py: OP = Op("CoreFFN", version="1", attributes=("activation",), body=function, oracle=oracle, cases=(...))
test:  run(model(OP, case), case.feeds()) == OP.oracle(case.feeds(), case.attributes)    for case in OP.cases
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx

from cm_export.base.errors import SurgeryError
from cm_export.base.onnx_text import DOMAIN, model_of

Arrays = dict[str, np.ndarray]

# What every node of every op carries besides the op's own attributes. From 10.15 TensorRT takes a plugin instead of the
# function only if the node says so; lowerings that make inputs or layer names per layer read `layer`.
NODE_ATTRIBUTES = ("layer", "plugin_namespace", "plugin_version")


class Case(Protocol):
    """One point at which an op is compared with its oracle: a frozen value, its arrays made from its own seed."""

    dtype: str  # of the floating point tensors: "float32" or "float16"

    @property
    def form(self) -> dict[str, Any]:
        """The arguments of Op.body."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The op's own attributes."""

    @property
    def axes(self) -> dict[str, str]:
        """Axis letters of every input and output of this form, "B,S,D", in the function's order."""

    def feeds(self) -> Arrays:
        """The inputs, deterministic."""


@dataclass(frozen=True)
class Op:
    """An op as a value. `name` is the ONNX op_type and the plugin name, `version` the plugin version.

    `attributes` are the op's own; `body(**case.form)` is the function; `oracle(feeds, attributes)` gives the outputs by
    name in float64 and shares no code with the body.
    """

    name: str
    version: str
    attributes: tuple[str, ...]
    body: Callable[..., onnx.FunctionProto]
    oracle: Callable[[Arrays, Mapping[str, Any]], Arrays]
    cases: tuple[Case, ...]
    decides: tuple[str, ...] = ()  # inputs that are float32 whatever the others are


def node_attributes(op: Op, layer: int, **own: Any) -> dict[str, Any]:
    """All attributes of a node of `op` in decoder layer `layer`. Raises SurgeryError unless `own` are the op's own."""
    if set(own) != set(op.attributes):
        raise SurgeryError(f"attributes {sorted(own)}", where=f"node of {op.name}", fix=f"give {sorted(op.attributes)}")
    return own | {"layer": layer, "plugin_namespace": DOMAIN, "plugin_version": op.version}


def declared(*own: str) -> str:
    """The attribute list of an op's function in ONNX text: `<scale, layer, plugin_namespace, plugin_version>`."""
    return f"<{', '.join((*own, *NODE_ATTRIBUTES))}>"


def model(op: Op, case: Case) -> onnx.ModelProto:
    """A checked model of one node, every axis symbolic: the subject of the tests and of a backend's probes."""
    body = op.body(**case.form)
    kinds = {"float32": "float", "float16": "float16", "int32": "int32"}
    given = {name: kinds[str(array.dtype)] for name, array in case.feeds().items()}
    outputs_kind = kinds[case.dtype]
    typed = {name: f"{given.get(name, outputs_kind)}[{axes}] {name}" for name, axes in case.axes.items()}
    inputs, outputs = (", ".join(typed[name] for name in names) for names in (body.input, body.output))
    return model_of(body, inputs, outputs, **node_attributes(op, layer=0, **case.attributes))
