"""The dense decode also reports what every product reads, which is what thresholds are measured on.

decode_dense: ..., FFN, q k v, o, head        -> outputs site.{4l} x of gate and up, site.{4l+1} z, site.{4l+2}, site.{4l+3}
                                                 x of q k v and of o, site.{4L} x of the head; each [B,N,channels]
"""

import numpy as np
import onnx

from ..base import dims
from ..bundle.thresholds import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT, SIDES
from ..families import Family, Shape
from .edit import Edit
from .find_sites import ffn_sites
from .products import head_product, layer_products


def report_channels(model: onnx.ModelProto, family: Family, shape: Shape) -> onnx.ModelProto:
    """A copy of the dense decode graph with one more output per site. Raises SurgeryError."""
    edit = Edit(model)
    read = {SIDES * shape.layers: head_product(edit).x}
    for ffn in ffn_sites(edit, family, shape.layers):
        read |= {SIDES * ffn.layer + FFN_IN: ffn.x, SIDES * ffn.layer + FFN_OUT: ffn.z}
    for own in layer_products(edit, family, shape.layers):
        read |= {SIDES * own.layer + ATTENTION_IN: own.into[0].x, SIDES * own.layer + ATTENTION_OUT: own.out.x}
    for site, tensor in sorted(read.items()):
        # A copy: the tensor itself keeps its name, by which other outputs may know it.
        edit.add_output(edit.op("Identity", tensor), f"site.{site}", np.float32, [dims.BATCH, dims.NEW, None])
    return edit.export()
