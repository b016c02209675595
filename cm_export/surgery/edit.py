"""A graphsurgeon graph being rewritten: adds nodes and calls to local functions, finds weights by name."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..base.errors import SurgeryError
from ..base.onnx_text import DOMAIN, IR_VERSION, OPSET
from ..plugins.contract import Op, node_attributes


class Edit:
    """One graph under the knife. Weights stay external: only names, shapes and byte ranges are in memory."""

    def __init__(self, model: onnx.ModelProto, prefix: str = "cm"):
        """`prefix`: of the names that are given here; one per program that edits the same graph."""
        self.prefix = prefix
        self.graph = gs.import_onnx(model)
        self.functions: dict[str, onnx.FunctionProto] = {f.name: f for f in model.functions}
        self._tensors = self.graph.tensors()
        self._count = 0

    # ------------------------------------------------------------ reading
    def tensor(self, name: str) -> gs.Tensor:
        """A tensor by name. Raises SurgeryError."""
        if name not in self._tensors:
            raise SurgeryError(f"no tensor {name!r} in the graph", where=self.graph.name)
        return self._tensors[name]

    def input(self, name: str) -> gs.Variable:
        return next(t for t in self.graph.inputs if t.name == name)

    def has_input(self, name: str) -> bool:
        return any(t.name == name for t in self.graph.inputs)

    # ------------------------------------------------------------ writing
    def add_input(self, name: str, dtype: Any, shape: list[Any]) -> gs.Variable:
        """The graph input `name`, added if it is not there yet."""
        if self.has_input(name):
            return self.input(name)
        variable = gs.Variable(name, dtype=np.dtype(dtype), shape=shape)
        self.graph.inputs.append(variable)
        return variable

    def add_output(self, tensor: gs.Variable, name: str, dtype: Any, shape: list[Any]) -> None:
        """Make `tensor` the graph output `name`, replacing an output of that name where it stood."""
        old = next((i for i, t in enumerate(self.graph.outputs) if t.name == name), None)
        if old is not None:
            self.graph.outputs[old].name += "/all_tokens"
        tensor.name, tensor.dtype, tensor.shape = name, np.dtype(dtype), shape
        if old is None:
            self.graph.outputs.append(tensor)
        else:
            self.graph.outputs[old] = tensor

    def constant(self, value: Any, dtype: Any) -> gs.Constant:
        self._count += 1
        return gs.Constant(f"{self.prefix}/const_{self._count}", np.asarray(value, dtype))

    def op(self, kind: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Variable:
        """One standard node with one output."""
        return self._node(kind, list(inputs), 1, attrs, None)[0]

    def call(self, function: onnx.FunctionProto, *inputs: gs.Tensor, **attrs: Any) -> list[gs.Variable]:
        """A node that calls a local function; the function joins the model. Returns the node's outputs."""
        known = self.functions.setdefault(function.name, function)
        if known != function:
            raise SurgeryError(f"two different bodies for {function.name}", where=self.graph.name)
        return self._node(function.name, list(inputs), len(function.output), attrs, DOMAIN)

    def _node(self, kind, inputs, outputs, attrs, domain) -> list[gs.Variable]:
        self._count += 1
        name = f"{self.prefix}/{kind}_{self._count}"
        out = [gs.Variable(f"{name}/{i}") for i in range(outputs)]
        self.graph.nodes.append(gs.Node(kind, name, attrs=attrs, inputs=inputs, outputs=out, domain=domain))
        return out

    def core_node(self, op: Op, form: dict, name: str, layer: int, inputs: list, outputs: list, **own: Any) -> gs.Node:
        """A node of one of our ops, with the attributes that make TensorRT take the plugin and not the function."""
        self.functions.setdefault(op.name, op.body(**form))
        attrs = node_attributes(op, layer, **own)
        node = gs.Node(op.name, name, attrs=attrs, inputs=inputs, outputs=outputs, domain=DOMAIN)
        self.graph.nodes.append(node)
        return node

    # ------------------------------------------------------------ result
    def export(self) -> onnx.ModelProto:
        """The rewritten model, sorted, without dead nodes, with the functions that it still calls."""
        self.graph.cleanup(remove_unused_graph_inputs=False).toposort()
        model = gs.export_onnx(self.graph, do_type_check=False)
        called = {n.op_type for n in model.graph.node if n.domain == DOMAIN}
        del model.functions[:], model.opset_import[:], model.graph.value_info[:]
        model.functions.extend(f for n, f in sorted(self.functions.items()) if n in called)
        model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
        if called:
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        model.producer_name, model.ir_version = "cm_export", IR_VERSION
        return model
