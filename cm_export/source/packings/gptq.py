"""`quant_method = gptq`: AutoGPTQ and GPTQModel, 4 and 8 bits, words of 32 bits along the inputs.

    qweight int32 [K bits/32, N]    code k of a column lies in word k bits/32, the lowest first
    qzeros  int32 [G, N bits/32]    checkpoint_format "gptq" stores zero - 1, subtracted from whole words; "gptq_v2" zero
    scales  [G,N]     g_idx [K]     the group of each input: k // group_size, or in any order with desc_act
                                    where it is missing: k // group_size

Source: the dequantisation in GPTQModel (nn_modules/qlinear), the conversion of zeros in its utils/model.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import InputError
from . import ORIGINAL, Matrix, Parts, nibbles, unread

MARKS = ("qweight",)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")
_ONES = {4: 0x11111111, 8: 0x01010101}


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for other layouts of the same method."""
    form = _format(settings)
    if form not in _FORMATS or settings.get("is_marlin_format"):
        raise unread(settings, f"checkpoint_format {'marlin' if settings.get('is_marlin_format') else form!r}", where)
    if settings.get("bits") not in (*_ONES,):
        raise unread(settings, f"{settings.get('bits')!r} bits", where)
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32", None):
        raise unread(settings, f"pack_dtype {settings['pack_dtype']!r}", where)
    for name in ("rotation", "planar", "adapter"):
        if settings.get(name):
            raise unread(settings, f"{name} = {settings[name]!r}", where)


def matrix(parts: Parts, settings: Mapping[str, Any]) -> Matrix:
    """The matrix of a module. Its bits are those of its tensors: GPTQModel's `dynamic` may give modules other ones."""
    parts.check_words("qweight", "qzeros")
    scale, zeros = parts.scale("scales"), np.ascontiguousarray(parts["qzeros"]).view(np.uint32)
    rows, outputs = parts.shape("qweight")
    bits = 32 * zeros.shape[1] // max(outputs, 1)
    if bits not in _ONES or scale.shape != (len(zeros), outputs):
        shapes = f"qzeros {list(zeros.shape)}, scales {list(scale.shape)}, qweight {[rows, outputs]}"
        raise InputError(f"tensors that are no GPTQ matrix of 4 or 8 bits: {shapes}", where=parts.module)
    if _format(settings) == "gptq":
        zeros = zeros + np.uint32(_ONES[bits])
    inputs = rows * 32 // bits
    groups = parts.indices("g_idx") if "g_idx" in parts else _in_order(parts, inputs, len(scale), settings)
    if groups.shape != (inputs,) or not inputs or groups.min() < 0 or groups.max() >= len(scale):
        raise InputError(f"g_idx does not name a group of {len(scale)} for each of {inputs} inputs", where=parts.module)
    zero = nibbles(zeros, bits, axis=1)
    return Matrix(inputs, outputs, bits, lambda: nibbles(parts["qweight"], bits, axis=0), scale, zero, groups)


def _in_order(parts: Parts, inputs: int, count: int, settings: Mapping[str, Any]) -> np.ndarray:
    """[K] of a matrix without g_idx: `count` groups of neighbours. Raises InputError where they cannot be told."""
    length = inputs if count == 1 else settings.get("group_size")
    if (settings.get("desc_act") and count > 1) or type(length) is not int or -(-inputs // max(length, 1)) != count:
        what = f"{count} groups of {inputs} inputs without g_idx, and quantization_config says group_size {length!r}"
        raise InputError(f"{what}, desc_act {settings.get('desc_act', False)!r}", where=parts.module, fix=ORIGINAL)
    return np.arange(inputs) // length


def _format(settings: Mapping[str, Any]) -> Any:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"
