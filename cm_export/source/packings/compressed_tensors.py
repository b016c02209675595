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
from . import ORIGINAL, Matrix, Parts, block_of, eight_bit_floats, nibbles, unread

MARKS = ("weight_scale",)
PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point", "output_scale", "output_zero_point",
)  # fmt: skip
_FORMATS = {  # and the types of their weights
    "pack-quantized": ("int",), "int-quantized": ("int",), "float-quantized": ("float",), "naive-quantized": ("int", "float"),
}  # fmt: skip


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for other formats of the same library."""
    own, form = _groups(settings), settings.get("format")
    formats = [g.get("format") for g in own]
    formats = formats if form == "mixed-precision" else [form, *(f for f in formats if f)]
    odd = [f for f in formats if f not in (*_FORMATS,)]
    if odd or not formats:
        raise unread(settings, f"format {(odd[0] if odd else None) or form!r}", where)
    for group in own:
        _check_numbers(settings, group, where)
    sparse = settings.get("sparsity_config") or {}
    sparse = sparse.get("format", "dense") if isinstance(sparse, dict) else sparse
    if sparse != "dense":
        raise unread(settings, f"sparsity_config format {sparse!r}", where)
    if settings.get("transform_config"):
        raise unread(settings, "transform_config", where)


def _check_numbers(settings: Mapping[str, Any], group: Mapping[str, Any], where: Path) -> None:
    """Packed numbers of other bits would be read as some of 4 or 8."""
    weights, form = group.get("weights"), str(group.get("format") or settings.get("format"))
    if not weights:
        return  # a group whose weights are left as they are
    if not isinstance(weights, dict):
        raise unread(settings, f"weights {weights!r}", where)
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind not in _FORMATS[form]:
        raise unread(settings, f"format {form!r} of weights of type {kind!r}", where)
    if bits not in ((4, 8) if form == "pack-quantized" else (8,) if kind == "float" else range(1, 9)):
        raise unread(settings, f"{bits!r} bits ({form}, {kind})", where)
    block_of(settings, "block_structure", weights.get("block_structure"), where)


def matrix(parts: Parts, settings: Mapping[str, Any]) -> Matrix:
    """The matrix of a module."""
    scale = parts.scale("weight_scale")
    if "weight_packed" in parts:
        outputs, inputs = _shape(parts)
        bits = _bits(parts, inputs, settings)
    elif parts.dtype("weight") == "I8" and len(parts.shape("weight")) == 2:
        (outputs, inputs), bits = parts.shape("weight"), 8
    else:
        floats = parts.dtype("weight").startswith("F8_")
        if floats and "weight_zero_point" in parts and parts["weight_zero_point"].any():
            raise InputError("8-bit floats with a zero point", where=parts.module, fix=ORIGINAL)
        return eight_bit_floats(parts, scale, _block(settings))
    if scale.size == 1:
        scale = np.full((outputs, 1), scale.reshape(()), np.float32)
    if scale.ndim != 2 or len(scale) != outputs or not scale.size or inputs % scale.shape[1]:
        raise InputError(f"weight_scale {list(scale.shape)} of a weight {[outputs, inputs]}", where=parts.module)
    groups = np.arange(inputs) // (inputs // scale.shape[1])
    if "weight_g_idx" in parts and (given := parts.indices("weight_g_idx")).min(initial=0) >= 0:
        groups = given
    if groups.shape != (inputs,) or groups.max() >= scale.shape[1]:
        raise InputError("weight_g_idx does not name a group for each input", where=parts.module)
    zero = _zero(parts, bits, scale.shape) if "weight_zero_point" in parts else None
    own = _groups(settings)
    if zero is None and own and all((g.get("weights") or {}).get("symmetric") is False for g in own):
        raise InputError("has no weight_zero_point, and its numbers are not symmetric", where=parts.module)
    scale = np.ascontiguousarray(scale.T)
    return Matrix(inputs, outputs, bits, lambda: _codes(parts, bits, inputs), scale, zero, groups)


def _shape(parts: Parts) -> tuple[int, int]:
    """(N, K) of packed numbers. Raises InputError where the words are others."""
    parts.check_words("weight_packed")
    said = parts.indices("weight_shape").tolist()
    if len(said) != 2 or min(said) < 1 or said[0] != parts.shape("weight_packed")[0]:
        what = f"weight_shape {said} of weight_packed {list(parts.shape('weight_packed'))}"
        raise InputError(what, where=parts.module)
    return said[0], said[1]


def _bits(parts: Parts, inputs: int, settings: Mapping[str, Any]) -> int:
    """Of the numbers in its words, by how many words there are of how many numbers."""
    words = parts.shape("weight_packed")[1]
    said = {bits for g in _groups(settings) if (bits := (g.get("weights") or {}).get("num_bits"))} or {4, 8}
    fits = [b for b in sorted(said & {4, 8}) if words == -(-inputs * b // 32)]
    if len(fits) != 1:
        what = f"{words} words of {inputs} numbers are not {' or '.join(map(str, sorted(said)))} bits"
        raise InputError(what, where=parts.module)
    return fits[0]


def _codes(parts: Parts, bits: int, inputs: int) -> np.ndarray:
    """uint8 [K,N]."""
    if "weight_packed" in parts:
        return np.ascontiguousarray(nibbles(parts["weight_packed"], bits, axis=1)[:, :inputs].T)
    return np.ascontiguousarray(_unsigned(parts["weight"], 8).T)


def _zero(parts: Parts, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [G,N]."""
    stored = parts.indices("weight_zero_point")
    if parts.dtype("weight_zero_point") == "I32" and "weight_packed" in parts:  # packed along the outputs
        parts.check_words("weight_zero_point")
        zero = nibbles(stored.astype(np.int32), bits, axis=0)
        zero = zero[: shape[0]] if len(stored) == -(-shape[0] * bits // 32) else zero
    else:
        half = 1 << (bits - 1)
        if stored.size and not -half <= stored.min() <= stored.max() < half:
            what = f"weight_zero_point from {stored.min()} to {stored.max()}, and its numbers have {bits} bits"
            raise InputError(what, where=parts.module)
        zero = np.broadcast_to(_unsigned(stored, bits), shape) if stored.size == 1 else _unsigned(stored, bits)
    if zero.shape != shape:
        raise InputError(f"weight_zero_point {list(stored.shape)} of scales {list(shape)}", where=parts.module)
    return np.ascontiguousarray(zero.T)


def _unsigned(numbers: np.ndarray, bits: int) -> np.ndarray:
    return (numbers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def _block(settings: Mapping[str, Any]) -> list[int] | None:
    found = next((b for g in _groups(settings) if (b := (g.get("weights") or {}).get("block_structure"))), None)
    return block_of(settings, "block_structure", found, Path("config.json"))


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How groups of modules are stored; a name of a preset scheme in the place of a group's settings says nothing here."""
    groups = settings.get("config_groups") or {}
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
