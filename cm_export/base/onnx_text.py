"""Model-local ONNX functions written as text: how a policy states its meaning inside the graph.

    DOUBLE = function("Double (x) => (y) { y = Add (x, x) }")       # FunctionProto, domain cm_export, opset 23
    call(DOUBLE, ["h"], ["h2"])                                      # the node that calls it
    model_of(DOUBLE, "float[N] x", "float[N] y")                     # a model of that one node, to run or to look at

Attributes are written `Name <rho> (x) => (y) { r = Constant <value_float: float = @rho> () ... }`, comments with `#`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import SurgeryError

if TYPE_CHECKING:  # imported where it is used: a device that only runs engines has no onnx
    import onnx

DOMAIN = "cm_export"
OPSET = 23
IR_VERSION = 11  # the first that may hold opset 23; a newer one is refused by older runtimes for no gain


def function(text: str) -> onnx.FunctionProto:
    """The function written as `Name <attributes> (inputs) => (outputs) { nodes }`.

    Raises SurgeryError with the parser's own position when the text is not valid.
    """
    from onnx import parser

    name = text.split("(", 1)[0].split("<", 1)[0].strip() or "unnamed"
    try:
        return parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {text.strip()}')
    except parser.ParseError as error:
        raise SurgeryError(
            f"the ONNX text does not parse: {error}", where=f"function {name}", fix="correct the text"
        ) from error


def call(
    function: onnx.FunctionProto, inputs: Sequence[str], outputs: Sequence[str], **attributes: float | int
) -> onnx.NodeProto:
    """One node that calls `function`; inputs and outputs in the function's order, every attribute given.

    An attribute takes the type its reference in the body has, so `rho=1` is the float 1.0 where a float is read.
    Raises SurgeryError when the number of inputs or outputs, or the names of the attributes, differ from the function.
    """
    from onnx import AttributeProto, helper

    for what, given, wanted in (
        ("inputs", list(inputs), list(function.input)),
        ("outputs", list(outputs), list(function.output)),
    ):
        if len(given) != len(wanted):
            raise SurgeryError(
                f"{len(given)} {what} for {len(wanted)}", where=f"call of {function.name}", fix=f"give {wanted}"
            )
    if set(attributes) != set(function.attribute):
        raise SurgeryError(
            f"attributes {sorted(attributes)}", where=f"call of {function.name}", fix=f"give {list(function.attribute)}"
        )
    types = {a.ref_attr_name: a.type for node in function.node for a in node.attribute if a.ref_attr_name}
    node = helper.make_node(function.name, list(inputs), list(outputs), domain=function.domain)
    for name in function.attribute:
        is_float = types.get(name) == AttributeProto.FLOAT
        node.attribute.append(helper.make_attribute(name, float(attributes[name]) if is_float else attributes[name]))
    return node


def model_of(function: onnx.FunctionProto, inputs: str, outputs: str, **attributes: float | int) -> onnx.ModelProto:
    """A checked model of one node that calls `function`.

    `inputs` and `outputs` are typed as in ONNX text, in the function's order: "float[B,S,F] z, int64[1] seed".
    """
    from onnx import checker, helper, parser

    graph = parser.parse_graph(f"{function.name} ({inputs}) => ({outputs}) {{ }}")
    read, written = [value.name for value in graph.input], [value.name for value in graph.output]
    graph.node.append(call(function, read, written, **attributes))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=IR_VERSION)
    checker.check_model(model, full_check=True)
    return model
