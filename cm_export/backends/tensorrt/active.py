"""Decode of the policy `active` for engines: the file for the builder gets the weights of its products turned.

What the graph becomes is surgery/active_products.py. Where there is no plugin the functions are written out, over weights as they
are stored: every channel is multiplied, the others by zero.
"""

import onnx

from ...plugins.core_linear import op as core_linear
from ...surgery import active_products
from .quantize import Part, Parts, put_function

THRESHOLDS = "core_thresholds"


def turn(model: onnx.ModelProto) -> Parts:
    """Rewrite a lowered graph so that its CoreLinear read weights by inputs; returns how the new initializers are made."""
    new = active_products.turn(model)
    if any(n.op_type == "CoreLinear" for n in model.graph.node):
        put_function(model, core_linear.function(by_inputs=True))
    return {
        name: Part(w.name, None, "turned", onnx.helper.tensor_dtype_to_np_dtype(w.data_type), tuple(reversed(w.dims)))
        for name, w in new.items()
    }
