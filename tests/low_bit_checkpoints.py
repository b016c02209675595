"""Checkpoints in few bits as other programs write them, packed from the formats' descriptions, not by our reader.

floats -> codes, scales, zeros (drawn so that nothing is special) -> tensors of GPTQ, AWQ, compressed-tensors, fp8

    low = Low.of(weight [N,K], bits, group, rng)        low.numbers [N,K] is what every reader must give back
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Low:
    """codes [K,N], scale float16 [G,N], zero [G,N], groups [K]; `bits` of a code."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    groups: np.ndarray
    bits: int

    @classmethod
    def of(
        cls,
        weight: np.ndarray,
        bits: int,
        group: int,
        rng: np.random.Generator,
        symmetric: bool = True,
        shuffled: bool = False,
        one: bool = False,
    ) -> "Low":
        """`one`: all outputs have the same scale."""
        w, (inputs, outputs) = weight.T.astype(np.float64), weight.T.shape
        length = inputs if group == -1 else group
        groups = np.arange(inputs) // length
        groups = rng.permutation(groups) if shuffled else groups
        count, middle, most = -(-inputs // length), 1 << (bits - 1), (1 << bits) - 1
        largest = np.stack([np.abs(w[groups == g]).max(0) for g in range(count)])
        largest = np.full_like(largest, largest.max()) if one else largest
        scale = (largest / (middle - 1)).astype(np.float16)
        zero = np.full((count, outputs), middle)
        if not symmetric:
            zero = rng.integers(0, most + 1, (count, outputs))  # 0 and the largest code among them
        codes = np.clip(np.rint(w / scale.astype(np.float64)[groups]) + zero[groups], 0, most).astype(np.int64)
        return cls(codes, scale, zero, groups, bits)

    @property
    def numbers(self) -> np.ndarray:
        """float32 [N,K]: exact in float32, a scale of 11 bits times 9 bits."""
        apart = (self.codes - self.zero[self.groups]).astype(np.float32)
        return np.ascontiguousarray((apart * self.scale.astype(np.float32)[self.groups]).T)


def words(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32: `32 / bits` numbers along `axis` in a word; place i of a word takes number `order[i]`."""
    per = 32 // bits
    numbers = np.moveaxis(numbers.astype(np.uint64), axis, -1)
    short = -numbers.shape[-1] % per
    numbers = np.pad(numbers, ((0, 0), (0, short))).reshape(len(numbers), -1, per)
    out = np.zeros(numbers.shape[:2], np.uint64)
    for place, number in enumerate(order or range(per)):
        out |= numbers[:, :, number] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis))


def gptq(low: Low, v2: bool = False) -> dict[str, np.ndarray]:
    stored = words(low.zero, low.bits, 1)
    if not v2:  # as GPTQModel writes it: 1 is taken from every number of a word at once, so that a zero of 0 borrows
        ones = np.uint32(sum(1 << place for place in range(0, 32, low.bits)))
        stored = (stored.view(np.uint32) - ones).view(np.int32)
    g_idx = low.groups.astype(np.int32)
    return {"qweight": words(low.codes, low.bits, 0), "qzeros": stored, "scales": low.scale, "g_idx": g_idx}


def awq(low: Low) -> dict[str, np.ndarray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(low.codes, 4, 1, order), "qzeros": words(low.zero, 4, 1, order), "scales": low.scale}


def packed(low: Low, with_order: bool = False) -> dict[str, np.ndarray]:
    """compressed-tensors, pack-quantized."""
    own = {"weight_packed": words(low.codes.T, low.bits, 1), "weight_scale": low.scale.T}
    own["weight_shape"] = np.array(low.codes.T.shape, np.int64)
    if (low.zero != 1 << (low.bits - 1)).any():
        own["weight_zero_point"] = words(low.zero.T, low.bits, 0)
    return own | ({"weight_g_idx": low.groups.astype(np.int32)} if with_order else {})


def whole(low: Low) -> dict[str, np.ndarray]:
    """compressed-tensors, int-quantized, 8 bits."""
    own = {"weight": (low.codes.T - 128).astype(np.int8), "weight_scale": low.scale.T}
    if (low.zero != 128).any():
        own["weight_zero_point"] = (low.zero.T - 128).astype(np.int8)
    return own


def without(pack: Callable[[Low], dict[str, np.ndarray]], part: str) -> Callable[[Low], dict[str, np.ndarray]]:
    """The same without one of the tensors."""
    return lambda low: {name: tensor for name, tensor in pack(low).items() if name != part}


def packed_without_order(low: Low) -> dict[str, np.ndarray]:
    """As compressed-tensors writes an order of activations that it did not use."""
    return packed(low) | {"weight_g_idx": np.full(len(low.groups), -1, np.int32)}


def whole_by_one_scale(low: Low) -> dict[str, np.ndarray]:
    """int-quantized with strategy "tensor"."""
    return whole(low) | {"weight_scale": low.scale.reshape(-1)[:1]}


def fp8(
    weight: np.ndarray, block: tuple[int, int], name: str = "weight_scale_inv"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(tensors, numbers [N,K]) of a weight in float8_e4m3 with a float32 scale for each block of [rows, columns]."""
    (outputs, inputs), (rows, columns) = weight.shape, block
    scale = np.empty((-(-outputs // rows), -(-inputs // columns)), np.float32)
    codes, numbers = np.empty(weight.shape, ml_dtypes.float8_e4m3fn), np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(scale.shape):
        at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        scale[i, j] = np.abs(weight[at]).max() / 448
        codes[at] = (weight[at] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        numbers[at] = codes[at].astype(np.float32) * scale[i, j]
    return {"weight": codes, name: scale}, numbers


def read(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, 8-bit floats among them, which safetensors' own numpy does not know."""
    import torch
    from safetensors.torch import load_file as load

    def plain(tensor: torch.Tensor) -> np.ndarray:
        if tensor.dtype == torch.float8_e4m3fn:
            return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return tensor.numpy()

    return {name: plain(tensor) for name, tensor in load(file).items()}


def write(
    source: Path,
    out: Path,
    settings: Mapping[str, Any],
    pack: Callable[[str, np.ndarray], tuple[Mapping[str, np.ndarray], np.ndarray] | None],
    zero_biases: bool = False,
) -> dict[str, np.ndarray]:
    """`source` in few bits at `out`; `pack(module, weight)` -> (tensors, numbers). Returns every weight as it is meant."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": dict(settings)}
    (out / "config.json").write_text(json.dumps(config))
    tensors, meant = {}, {}
    for name, value in load_file(source / "model.safetensors").items():
        module, _, last = name.rpartition(".")
        packed = pack(module, value) if last == "weight" and value.ndim == 2 else None
        if packed is None:
            tensors[name] = meant[name] = value
            continue
        own, meant[name] = packed
        tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in own.items()}
        if zero_biases:
            tensors.setdefault(f"{module}.bias", np.zeros(len(value), np.float16))
    if zero_biases:  # a model's own biases are what they were
        tensors |= {n: v for n, v in load_file(source / "model.safetensors").items() if n.endswith(".bias")}
    save_file(tensors, out / "model.safetensors")
    return meant
