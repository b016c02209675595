"""Every decode FFN gets its own chooser: the predictor names, for each token, the rows that CoreFFN reads.

before: x -> CoreFFN(x, Wg, Wu, Wd_t)      after: x -> PredictNeurons(x, copies, core_counts[l]) -> core_neurons [B,N,K]
                                                  x -> CoreFFN(x, Wg, Wu, Wd_t, core_neurons)
"""

from types import ModuleType

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..bundle import predictor
from ..bundle.weights import Tensor
from .bind_weights import initializer
from .edit import Edit
from .find_sites import FFN


def predict_neurons(
    edit: Edit, policy: ModuleType, site: FFN, layers: int, activation: str, group: int, block: int
) -> gs.Variable:
    """core_neurons [B,N,K] of one layer. The copies are graph inputs until `bind_predictor`."""
    counts = edit.add_input("core_counts", np.int64, [layers])
    ffn, hidden = site.w_gate.shape
    sizes = {"gate": [ffn, hidden], "gate_scale": [ffn, hidden // group], "norm": [ffn]}
    sizes |= {"up": sizes["gate"], "up_scale": sizes["gate_scale"]}
    wires = {
        part: edit.add_input(name, np.int8 if part in ("gate", "up") else np.float32, sizes[part])
        for part, name in predictor.names(site.layer).items()
    }
    count = edit.op("Gather", counts, edit.constant([site.layer], np.int64), axis=0)
    wires |= {"x": site.x, "count": count}
    given = [wires[w] for w in policy.DECODE_WIRES]
    return edit.call(policy.decode_function(activation), *given, group=group, block=block)[0]


def bind_predictor(model: onnx.ModelProto, tensors: dict[str, Tensor]) -> onnx.ModelProto:
    """Inputs named as in the predictor file become initializers that point into it; in place, and returned."""
    for value in [v for v in model.graph.input if v.name in tensors]:
        model.graph.input.remove(value)
        kind, shape = value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim]
        is_packed = kind == onnx.TensorProto.INT8  # two int4 values in a byte of the file
        dtype = onnx.TensorProto.INT4 if is_packed else kind
        model.graph.initializer.append(initializer(value.name, tensors[value.name], predictor.FILE, dtype, shape))
    return model
