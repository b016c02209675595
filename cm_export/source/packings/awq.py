"""`quant_method = awq`: AutoAWQ's "gemm" layout, 4 bits, words of 32 bits along the outputs in an order of their own.

    qweight int32 [K, N/8]    place i of a word holds output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 [G, N/8]    the same, nothing subtracted          scales [G,N]

Source: AutoAWQ (utils/packing_utils.py, modules/linear/gemm.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import InputError
from . import Matrix, Parts, nibbles, unread

MARKS = ("qweight",)
PARTS = ("qweight", "qzeros", "scales")
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where each of eight outputs lies in its word


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for other layouts of the same method."""
    for name in ("version", "format", "checkpoint_format"):
        if str(settings.get(name) or "gemm").lower() != "gemm":
            raise unread(settings, f"{name} {settings[name]!r}", where)
    if settings.get("bits", settings.get("w_bit", 4)) != 4:
        raise unread(settings, f"{settings.get('bits', settings.get('w_bit'))!r} bits", where)
    if str(settings.get("backend")).lower() == "llm-awq":  # the others name a kernel, not a layout
        raise unread(settings, f"backend {settings['backend']!r}", where)


def matrix(parts: Parts, settings: Mapping[str, Any]) -> Matrix:
    """The matrix of a module."""
    parts.check_words("qweight", "qzeros")
    scale, (inputs, words) = parts.scale("scales"), parts.shape("qweight")
    zero, outputs = _in_order(nibbles(parts["qzeros"], 4, axis=1)), 8 * words
    if scale.shape != zero.shape or scale.shape[1] != outputs or not len(scale) or inputs % len(scale):
        shapes = f"qzeros [.., {zero.shape[1] // 8}], scales {list(scale.shape)}, qweight {[inputs, words]}"
        raise InputError(f"tensors that are no AWQ matrix: {shapes}", where=parts.module)
    groups = np.arange(inputs) // (inputs // len(scale))
    return Matrix(inputs, outputs, 4, lambda: _in_order(nibbles(parts["qweight"], 4, axis=1)), scale, zero, groups)


def _in_order(codes: np.ndarray) -> np.ndarray:
    rows, outputs = codes.shape
    return np.ascontiguousarray(codes.reshape(rows, -1, 8)[..., _PLACES]).reshape(rows, outputs)
