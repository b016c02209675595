"""Every decoder attention becomes one CoreAttention node.

before: Attention(q, k, v, mask)        after: CoreAttention(q, k, v, mask[, core_tokens])
"""

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..families import Family
from ..plugins.core_attention.op import OP
from .edit import Edit
from .find_sites import attention_sites


def replace_attention(edit: Edit, family: Family, layers: int, indexed: bool) -> list[gs.Node]:
    """Rewrite all layers and return the new nodes. `indexed`: only the cache rows in core_tokens [B,M] are read."""
    index = edit.add_input("core_tokens", np.int32, [dims.BATCH, dims.CORE_TOKENS]) if indexed else None
    out = []
    for layer, node in enumerate(attention_sites(edit, family, layers)):
        y, inputs = node.outputs[0], list(node.inputs)
        node.outputs.clear()
        out.append(
            edit.core_node(
                OP,
                {"index": indexed},
                f"attention.{layer}",
                layer,
                [*inputs, index] if indexed else inputs,
                [y],
                scale=float(node.attrs["scale"]),
            )
        )
    return out
