"""Attention of many tokens to each other, in prompts and pictures, as one op of the native library.

    Attention(q, k, v[, mask]), CoreAttention without a list   ->   PromptAttention(q, k, v[, mask])

Of the keys it reads those from the first to the last that a query's neighbours see, half of them in a prompt. ONNX Runtime's
own computes all scores, hidden or not. Where a cache is read, other rules hold (grouped.py, cached_attention.py).
"""

import onnx

from .grouped import is_plain
from .lower import attribute
from .pack import NATIVE

OP = "PromptAttention"


def attend_together(model: onnx.ModelProto) -> None:
    """Rewrite in place every attention of a graph that reads no cache; what looks otherwise stays."""
    if any(v.name.startswith("past.") for v in model.graph.input):
        return
    found = [n for n in model.graph.node if is_plain(n) or _is_whole(n) or _is_core(n)]
    for node in found:
        scale = float(attribute(node, "scale"))
        node.op_type, node.domain = OP, NATIVE
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("scale", scale))
    if found and not any(o.domain == NATIVE for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(NATIVE, 1))


def _is_whole(node: onnx.NodeProto) -> bool:
    """What whole_picture.py makes of an attention whose mask hides nothing."""
    return node.op_type == "WholePicture" and len(node.input) == 3


def _is_core(node: onnx.NodeProto) -> bool:
    return node.op_type == "CoreAttention" and len(node.input) == 4 and len(node.output) == 1
