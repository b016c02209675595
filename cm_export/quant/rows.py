"""Weights stored by inputs, as the CPU kernels of plugins/cpu read them: all outputs of one input are neighbours.

    W[k,n] = scale[k // group, n] * (code[k,n] - zero[k // group, n])          code 0 .. 15 or 0 .. 255, zero none: 8 or 128

    codes  uint8 [K,N]   -> uint8 [K', N'/2] (4 bits) or [K', N'] (8 bits)     N' a multiple of 128, K' of group
    floats [K,N]         -> float32 [K,N'] ("32 bits"), in their order
    scale  [K/group,N]   -> float16 [K'/group, N'], 0 in the outputs that were added
    zero   [K/group,N]   -> uint8 [K'/group, N'] or [0]

Within a panel of 128 outputs, output n = 64 h + 16 q + 4 l + w lies in half h at place 16 l + 4 q + w. A kernel that
interleaves the bytes, then the words, of four inputs in lanes of 128 bits gets four codes of each output, in order.
A half is a nibble with 4 bits (h = 0: the low one) and 64 bytes with 8.

A matrix of 4 bits may have a remainder (remainder.py), which is part of its numbers.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..base.errors import InputError
from . import remainder

PANEL = 128
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class PackedRows:
    """A weight of `inputs` x `outputs` in the kernels' order; bits 32: codes are the float32 numbers, scale and zero empty."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: int
    inputs: int
    outputs: int
    remainder: np.ndarray | None = None  # uint8 [outputs, remainder.row_bytes(inputs)]


def pack(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int) -> PackedRows:
    """codes uint8 [K,N], scale [K/group,N] and zero uint8 [K/group,N] or None (K/group rounded up). Raises InputError."""
    _check(codes, scale, zero, bits, group)
    inputs, outputs = codes.shape
    K, N = -(-inputs // group) * group, -(-outputs // PANEL) * PANEL
    middle = 1 << (bits - 1)
    zeros = np.full(scale.shape, middle, np.uint8) if zero is None else zero
    if codes.shape != (K, N):
        padded = np.full((K, N), middle, np.uint8)
        padded[:inputs, :outputs] = codes
        padded[inputs:, :outputs] = zeros[-1]  # the added inputs share the last group, and weigh nothing
        codes = padded
    return PackedRows(
        _interleaved(codes, bits),
        _widened(scale.astype(np.float16), N, 0),
        np.empty(0, np.uint8) if zero is None else _widened(zero, N, middle),
        bits,
        group,
        inputs,
        outputs,
    )


def pack_float(weight: np.ndarray) -> PackedRows:
    """weight [K,N] of any float type, kept as float32 [K,N']; no groups, so no inputs are added."""
    (inputs, outputs), none = weight.shape, np.empty(0, np.uint8)
    padded = np.zeros((inputs, -(-outputs // PANEL) * PANEL), np.float32)
    padded[:, :outputs] = weight
    return PackedRows(padded, none.astype(np.float16), none, 32, GROUPS[0], inputs, outputs)


def unpack(packed: PackedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes uint8 [K,N], scale float16 [K/group,N], zero uint8 [K/group,N] or None): what `pack` was given."""
    if packed.bits == 32:
        raise InputError("float32 rows have no codes", where="unpack", fix="use numbers()")
    scale = packed.scale[:, : packed.outputs]
    zero = packed.zero[:, : packed.outputs] if packed.zero.size else None
    return _in_order(packed.codes, packed.bits)[: packed.inputs, : packed.outputs], scale, zero


def numbers(packed: PackedRows) -> np.ndarray:
    """float32 [K,N] that the codes stand for."""
    if packed.bits == 32:
        return packed.codes[:, : packed.outputs]
    codes, scale, zero = unpack(packed)
    return _refined(_numbers(codes, scale, zero, packed), packed, slice(packed.inputs), slice(packed.outputs))


def numbers_between(packed: PackedRows, inputs: tuple[int, int], outputs: tuple[int, int]) -> np.ndarray:
    """float32 numbers(packed)[first:end of inputs, first:end of outputs], without a look at the others. bits: 4 or 8."""
    (row, last_row), (column, last_column) = inputs, outputs
    panel, group = column // PANEL * PANEL, row // packed.group
    width, groups = -(-(last_column - panel) // PANEL) * PANEL, slice(group, -(-last_row // packed.group))
    columns = slice(panel, panel + width)
    part = replace(
        packed,
        codes=packed.codes[group * packed.group : last_row, panel * packed.bits // 8 : columns.stop * packed.bits // 8],
        scale=packed.scale[groups, columns],
        zero=packed.zero[groups, columns] if packed.zero.size else packed.zero,
        inputs=last_row - group * packed.group,
        outputs=last_column - panel,
        remainder=None,
    )
    found = numbers(part)[row - group * packed.group :, column - panel :]
    return _refined(found, packed, slice(row, last_row), slice(column, last_column))


def numbers_of(packed: PackedRows, outputs: np.ndarray) -> np.ndarray:
    """float32 [len(outputs),K]: numbers(packed)[:, outputs], turned; nothing is read of the others. bits: 4 or 8."""
    panel, within = np.divmod(outputs, PANEL)
    half, within = np.divmod(within, PANEL // 2)
    places = (4 * (within % 16 // 4) + within // 16) * 4 + within % 4
    if packed.bits == 8:
        codes = packed.codes[:, panel * PANEL + half * (PANEL // 2) + places]
    else:
        codes = packed.codes[:, panel * (PANEL // 2) + places] >> (4 * half).astype(np.uint8) & 15
    zero = packed.zero[:, outputs] if packed.zero.size else None
    found = _numbers(codes[: packed.inputs], packed.scale[:, outputs], zero, packed)
    return np.ascontiguousarray(_refined(found, packed, slice(packed.inputs), outputs).T)


def _refined(found: np.ndarray, packed: PackedRows, inputs: slice, outputs: slice | np.ndarray) -> np.ndarray:
    """found [K,N], the numbers of these inputs and outputs, with their remainder, if there is one."""
    if packed.remainder is not None:
        found += remainder.numbers(packed.remainder[outputs])[:, inputs].T
    return found


def _numbers(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, packed: PackedRows) -> np.ndarray:
    """float32 [K,N] of codes [K,N] in order."""
    middle = np.float32(1 << (packed.bits - 1)) if zero is None else _per_input(zero, packed).astype(np.float32)
    return (codes.astype(np.float32) - middle) * _per_input(scale, packed).astype(np.float32)


def _per_input(values: np.ndarray, packed: PackedRows) -> np.ndarray:
    return np.repeat(values, packed.group, axis=0)[: packed.inputs]


def _widened(values: np.ndarray, columns: int, fill: int) -> np.ndarray:
    if values.shape[1] == columns:
        return np.ascontiguousarray(values)
    wide = np.full((len(values), columns), fill, values.dtype)
    wide[:, : values.shape[1]] = values
    return wide


def _interleaved(codes: np.ndarray, bits: int) -> np.ndarray:
    # Four neighbours stay together, so they move as one word.
    K, N = codes.shape
    words = np.ascontiguousarray(codes).view(np.uint32).reshape(K, N // PANEL, 2, 4, 4)
    if bits == 4:
        both = words[:, :, 0] | words[:, :, 1] << np.uint32(4)
        return np.ascontiguousarray(both.swapaxes(-1, -2)).view(np.uint8).reshape(K, N // 2)
    return np.ascontiguousarray(words.swapaxes(-1, -2)).view(np.uint8).reshape(K, N)


def _in_order(stored: np.ndarray, bits: int) -> np.ndarray:
    K, N = len(stored), stored.shape[1] * 8 // bits
    words = np.ascontiguousarray(stored).view(np.uint32)
    if bits == 4:
        both = words.reshape(K, N // PANEL, 1, 4, 4)
        nibbles = np.uint32(0x0F0F0F0F)
        halves = np.concatenate([both & nibbles, both >> np.uint32(4) & nibbles], axis=2)
    else:
        halves = words.reshape(K, N // PANEL, 2, 4, 4)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).view(np.uint8).reshape(K, N)


def _check(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int) -> None:
    where = "packed rows"
    if bits not in (4, 8):
        raise InputError(f"codes of {bits} bits", where=where, fix="use 4 or 8, or pack_float")
    if group not in GROUPS:
        raise InputError(f"groups of {group} inputs", where=where, fix=f"use one of {GROUPS}")
    if codes.ndim != 2 or 0 in codes.shape or codes.dtype != np.uint8:
        raise InputError(f"codes are {codes.dtype} {list(codes.shape)}", where=where, fix="give uint8 [K,N]")
    expected = (-(-codes.shape[0] // group), codes.shape[1])
    for name, values in (("scale", scale), ("zero", zero)):
        if values is not None and values.shape != expected:
            raise InputError(f"{name} is {list(values.shape)}", where=where, fix=f"give {list(expected)}")
    if zero is not None and zero.dtype != np.uint8:
        raise InputError(f"zero is {zero.dtype}", where=where, fix="give uint8")
    if not (np.abs(scale) <= np.finfo(np.float16).max).all():
        raise InputError("a scale does not fit into float16", where=where, fix="check the weight that it is of")
    for name, values in (("a code", codes), ("a zero", zero)):
        if bits == 4 and values is not None and values.max() > 15:
            raise InputError(f"{name} of {values.max()} does not fit into 4 bits", where=where, fix="give 0 to 15")
