"""`quant_method = compressed-tensors`: llm-compressor's checkpoints; whole numbers of 4 or 8 bits, or 8-bit floats.

    pack-quantized   weight_packed int32 [N, K bits/32], the lowest first, numbers + 2^(bits-1); weight_shape [N,K]
    int-quantized    weight int8 [N,K]                     float-quantized   weight fp8 [N,K]
    weight_scale     [N,G], [N,1] by output, [1] for all, or by blocks of a float weight
    weight_zero_point   as the scale: int8, or packed along the outputs      weight_g_idx [K] with actorder = group

Source: compressed_tensors (compressors/pack_quantized, quantization/lifecycle/forward.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import InputError
from . import Matrix, Parts, eight_bit_floats, nibbles, unread

MARKS = ("weight_scale",)
PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point", "output_scale", "output_zero_point",
)  # fmt: skip
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for other formats of the same library."""
    groups = settings.get("config_groups") or {}
    own = [g.get("format") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    form = settings.get("format")
    formats = own if form == "mixed-precision" else [form, *(f for f in own if f)]
    if odd := next((f for f in formats if f not in _FORMATS), None if formats else form):
        raise unread(settings, f"format {odd!r}", where)
    if not formats or None in formats:
        raise unread(settings, f"format {form!r}", where)
    sparse = settings.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        raise unread(settings, f"sparsity_config format {sparse['format']!r}", where)
    if settings.get("transform_config"):
        raise unread(settings, "transform_config", where)


def matrix(parts: Parts, settings: Mapping[str, Any]) -> Matrix:
    """The matrix of a module."""
    scale = parts["weight_scale"]
    if "weight_packed" in parts:
        outputs, inputs = (int(n) for n in parts["weight_shape"])
        words = parts.shape("weight_packed")[1]
        bits = next((b for b in (4, 8) if words == -(-inputs * b // 32)), None)
        if bits is None:
            raise InputError(f"{words} words of {inputs} numbers are neither 4 nor 8 bits", where=parts.module)
    elif parts.dtype("weight") == "I8":
        (outputs, inputs), bits = parts.shape("weight"), 8
    else:
        return eight_bit_floats(parts, scale, _block(settings))
    if scale.size == 1:
        scale = np.full((outputs, 1), scale.reshape(()), np.float32)
    if scale.ndim != 2 or len(scale) != outputs or inputs % scale.shape[1]:
        raise InputError(f"weight_scale {list(scale.shape)} of a weight {[outputs, inputs]}", where=parts.module)
    groups = np.arange(inputs) // (inputs // scale.shape[1])
    if "weight_g_idx" in parts and (given := parts["weight_g_idx"].astype(np.int64)).min() >= 0:
        groups = given
    if groups.shape != (inputs,) or groups.max() >= scale.shape[1]:
        raise InputError("weight_g_idx does not name a group for each input", where=parts.module)
    zero = _zero(parts, bits, scale.shape) if "weight_zero_point" in parts else None
    return Matrix(
        inputs, outputs, bits, lambda: _codes(parts, bits, inputs), np.ascontiguousarray(scale.T), zero, groups
    )


def _codes(parts: Parts, bits: int, inputs: int) -> np.ndarray:
    """uint8 [K,N]."""
    if "weight_packed" in parts:
        return np.ascontiguousarray(nibbles(parts["weight_packed"], bits, axis=1)[:, :inputs].T)
    return np.ascontiguousarray(_unsigned(parts["weight"], 8).T)


def _zero(parts: Parts, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [G,N]."""
    stored = parts["weight_zero_point"]
    if stored.dtype == np.int32 and stored.shape != shape:  # packed along the outputs
        zero = nibbles(stored, bits, axis=0)[: shape[0]]
    else:
        zero = np.broadcast_to(_unsigned(stored, bits), shape) if stored.size == 1 else _unsigned(stored, bits)
    if zero.shape != shape:
        raise InputError(f"weight_zero_point {list(stored.shape)} of scales {list(shape)}", where=parts.module)
    return np.ascontiguousarray(zero.T)


def _unsigned(numbers: np.ndarray, bits: int) -> np.ndarray:
    return (numbers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def _block(settings: Mapping[str, Any]) -> Any:
    groups = (settings.get("config_groups") or {}).values()
    return next((b for g in groups if (b := (g.get("weights") or {}).get("block_structure"))), None)
