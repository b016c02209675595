"""The dense prefill also reports z of every layer, which is what a calibration watches.

prefill_dense: ..., FFN, ...        -> prefill with outputs z.{layer} [B,S,F]
"""

from types import ModuleType
from typing import Any

import numpy as np
import onnx

from ..base import dims
from .edit import Edit
from .replace_ffn import replace_ffn


def report_activations(model: onnx.ModelProto, family: ModuleType, shape: Any) -> onnx.ModelProto:
    """A copy of the dense prefill graph with one more output per layer. Raises SurgeryError."""
    edit = Edit(model)
    for ffn in replace_ffn(edit, family, shape.layers, shape.activation, indexed=False):
        edit.add_output(ffn.z, f"z.{ffn.layer}", np.float32, [dims.BATCH, dims.PROMPT, shape.ffn])
    return edit.export()
