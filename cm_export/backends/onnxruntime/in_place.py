"""A decode step writes its keys and values into the memory of the cache, where a Concat would copy all of it.

    Concat(past [B,Hk,P,d], new [B,Hk,N,d])  ->  ScatterND(past [B,Hk,C,d], cache_slots [B,Hk,N,3], new)    C: rows of room
    attention_mask [B,P+N] and what is made of it  ->  cache_bias [B,1,N,C]: 0 where a new token sees a row, else the least number

`past` and `present` are bound to the same memory, and ScatterND copies nothing then (cache.py). Rows behind the last one are
masked: they add exact zeros, so that the numbers do not depend on C.
"""

import onnx

from ...base import dims
from ...base.errors import SurgeryError

SLOTS, BIAS = "cache_slots", "cache_bias"
_ATTENTIONS = ("Attention", "CoreAttention")
_MASK = 3  # input of an attention


def write_in_place(model: onnx.ModelProto) -> None:
    """Rewrite a decode graph in place. Raises SurgeryError that names a cache which nothing is joined to."""
    graph = model.graph
    pasts = {v.name: v for v in graph.input if v.name.startswith(f"{dims.PAST}.")}
    joined = {n.input[0]: n for n in graph.node if n.op_type == "Concat" and n.input[0] in pasts and len(n.input) == 2}
    if missing := sorted(pasts.keys() - joined.keys()):
        raise SurgeryError("no Concat joins new rows to it", where=missing[0], fix="build the bundle again")
    readers = [n for n in graph.node if n.op_type in _ATTENTIONS]
    masks = {n.input[_MASK] for n in readers}
    if len(masks) != 1:
        raise SurgeryError(f"{len(masks)} masks where all layers must share one", where="decode graph")
    for past, node in joined.items():
        node.op_type = "ScatterND"
        del node.attribute[:]
        node.input[:] = [past, SLOTS, node.input[1]]
    for node in readers:
        node.input[_MASK] = BIAS
    shapes = [v.type.tensor_type.shape for v in (*pasts.values(), *graph.output)]
    for shape in shapes:
        if len(shape.dim) == 4:
            shape.dim[2].dim_param = "capacity"
    kept = [v for v in graph.input if v.name != "attention_mask"]
    del graph.input[:]
    graph.input.extend(kept)
    kv_heads = next(iter(pasts.values())).type.tensor_type.shape.dim[1].dim_value
    new = {
        SLOTS: (onnx.TensorProto.INT64, [dims.BATCH, kv_heads, dims.NEW, 3]),
        BIAS: (onnx.TensorProto.FLOAT, [dims.BATCH, 1, dims.NEW, "capacity"]),
    }
    graph.input.extend(onnx.helper.make_tensor_value_info(name, *how) for name, how in new.items())
