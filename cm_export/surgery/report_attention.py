"""The dense prefill also reports what every decoder attention reads, for whoever wants to see where the model looks.

prefill_dense: ..., Attention(q, k, v, mask), ...  -> prefill with outputs q.{layer} [B,H,S,d], k.{layer} [B,Hk,S,d]
"""

import numpy as np
import onnx

from ..base import dims
from ..families import Family, Shape
from .edit import Edit
from .find_sites import attention_sites


def report_attention(model: onnx.ModelProto, family: Family, shape: Shape) -> onnx.ModelProto:
    """A copy of the dense prefill graph with two more outputs per layer. Raises SurgeryError."""
    edit = Edit(model)
    for layer, node in enumerate(attention_sites(edit, family, shape.layers)):
        for name, tensor, heads in zip("qk", node.inputs, (shape.heads, shape.kv_heads), strict=False):
            # Through an Identity: a key may already be the output present.{layer}.key under that name.
            copy = edit.op("Identity", tensor)
            edit.add_output(copy, f"{name}.{layer}", np.float32, [dims.BATCH, heads, dims.PROMPT, shape.head_dim])
    return edit.export()
