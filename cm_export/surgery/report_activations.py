"""The dense prefill also reports z of every layer, which is what a calibration watches.

prefill_dense: ..., FFN, ...        -> prefill with outputs z.{layer} [B,S,F]
"""

import numpy as np
import onnx

from ..base import dims
from ..families import Family, Shape
from .edit import Edit
from .replace_ffn import replace_ffn


def report_activations(model: onnx.ModelProto, family: Family, shape: Shape) -> onnx.ModelProto:
    """A copy of the dense prefill graph with one more output per layer. Raises SurgeryError."""
    edit = Edit(model)
    for ffn in replace_ffn(edit, family, shape.layers, shape.activation, indexed=False):
        edit.add_output(ffn.z, f"z.{ffn.layer}", np.float32, [dims.BATCH, dims.PROMPT, shape.ffn])
    return edit.export()
