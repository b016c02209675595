"""Checkpoints in few bits, one file for each `quant_method` of config.json: how its tensors give the codes of a matrix.

    W[k,n] = scale[g(k),n] * (codes[k,n] - zero[g(k),n])         k inputs, n outputs, g(k) the group of an input

    PARTS, MARKS              last names of a matrix's tensors, and those of them that mark a module as one
    check(settings, where)    refuses what is not read, from quantization_config alone. Raises InputError
    matrix(parts, settings)   Matrix; reads everything but the codes, which are read when they are asked for

Codes that fit the layout of quant/rows.py are kept as they are; `Matrix.why_not` says why others cannot be.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...base import by_name
from ...base.errors import InputError
from ...quant.rows import GROUPS

PACKAGE = "cm_export.source.packings"
ORIGINAL = (
    "give the original float checkpoint, or one that transformers has dequantised (model.dequantize(), save_pretrained)"
)


class Parts(Mapping[str, np.ndarray]):
    """The tensors of one matrix by their last names, read when asked for: whole numbers as they are, floats as float32."""

    def __init__(self, module: str, files: Mapping[str, Path]):
        self.module, self._files = module, files

    def __getitem__(self, part: str) -> np.ndarray:
        import torch
        from safetensors import safe_open

        with safe_open(self._file(part), "pt") as f:
            value = f.get_tensor(f"{self.module}.{part}")
        return (value.to(torch.float32) if value.is_floating_point() else value).numpy()

    def __contains__(self, part: object) -> bool:
        return part in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file(self, part: str) -> Path:
        if part not in self._files:
            raise InputError(f"{self.module} has no {part}", where=next(iter(self._files.values())).parent)
        return self._files[part]

    def scale(self, part: str) -> np.ndarray:
        """float32 scales. Raises InputError for whole numbers: they are scales of another format, or exponents."""
        value = self[part]
        if value.dtype != np.float32:
            raise InputError(f"{part} is {self.dtype(part)}, not float", where=self.module, fix=ORIGINAL)
        if not np.isfinite(value).all():
            raise InputError(f"{part} holds NaN or infinity", where=self.module, fix="the checkpoint is damaged")
        return value

    def check_words(self, *parts: str) -> None:
        """Raises InputError for parts that are no matrices of 32-bit words."""
        for part in parts:
            if self.dtype(part) not in ("I32", "U32") or len(self.shape(part)) != 2:
                what = f"{part} is {self.dtype(part)} {list(self.shape(part))}, no matrix of 32-bit words"
                raise InputError(what, where=self.module, fix=ORIGINAL)

    def indices(self, part: str) -> np.ndarray:
        """int64: whole numbers. Raises InputError for others."""
        value = self[part]
        if value.dtype.kind not in "iu":
            raise InputError(f"{part} is {self.dtype(part)}, not whole numbers", where=self.module, fix=ORIGINAL)
        return value.astype(np.int64)

    def shape(self, part: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        from safetensors import safe_open

        with safe_open(self._file(part), "np") as f:
            return tuple(f.get_slice(f"{self.module}.{part}").get_shape())

    def dtype(self, part: str) -> str:
        """Its type in the file, such as "I8", without reading it."""
        from safetensors import safe_open

        with safe_open(self._file(part), "np") as f:
            return str(f.get_slice(f"{self.module}.{part}").get_dtype())


@dataclass(frozen=True)
class Matrix:
    """A weight of `inputs` x `outputs`: codes with scales or, where `scale` is None, numbers that no code here can hold."""

    inputs: int
    outputs: int
    bits: int
    read: Callable[[], np.ndarray]  # uint8 codes [K,N], or float32 numbers [K,N]
    scale: np.ndarray | None = None  # float32 [G,N]
    zero: np.ndarray | None = None  # uint8 [G,N]; None: 2^(bits-1) everywhere
    groups: np.ndarray | None = None  # [K]: the group of each input
    kind: str = "codes"  # what they are where they are no codes: "8-bit floats"

    def numbers(self) -> np.ndarray:
        """float32 [K,N] that is meant; exact, since a scale of 16 bits times a code fits into float32."""
        if self.scale is None or self.groups is None:
            return self.read()
        zero = np.float32(1 << (self.bits - 1)) if self.zero is None else self.zero.astype(np.float32)[self.groups]
        out = self.read().astype(np.float32)
        out -= zero
        out *= self.scale[self.groups]
        return out

    @cached_property
    def length(self) -> int | None:
        """Neighbouring inputs that share a scale; None where the inputs of a group do not lie together."""
        if self.groups is None or self.scale is None:
            return None
        length = self.inputs if len(self.scale) == 1 else int((self.groups == self.groups[0]).sum())
        together = np.array_equal(self.groups, np.arange(self.inputs) // max(length, 1))
        return length if together else None

    @property
    def group(self) -> int:
        """The length of its groups in the layout of quant/rows.py, into which longer ones are split."""
        if self.length is None:
            return 0
        if self.length == self.inputs:
            return GROUPS[-1]
        return next((g for g in reversed(GROUPS) if self.length % g == 0), 0)

    @property
    def why_not(self) -> str | None:
        """Why its codes cannot be kept; None where they can."""
        if self.scale is None:
            return f"they are {self.kind}"
        if self.length is None:
            return "the inputs of a group do not lie together (desc_act)"
        if not self.group:
            return f"groups of {self.length} inputs are no multiple of {GROUPS[0]}"
        with np.errstate(over="ignore"):
            exact = np.array_equal(self.scale.astype(np.float16).astype(np.float32), self.scale)
        return None if exact else "a scale is no 16-bit number of the stored layout"

    def stored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(codes uint8 [K,N], scale float16 [K/group,N], zero uint8 of its shape), for a matrix that can be kept."""
        assert self.scale is not None and self.groups is not None and self.why_not is None
        of_group = self.groups[:: self.group]
        zero = np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8) if self.zero is None else self.zero
        return self.read(), self.scale[of_group].astype(np.float16), zero[of_group]


def find(settings: Any, where: Path) -> ModuleType:
    """The file that reads a quantization_config. Raises InputError for one that nothing here reads."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    known = [name.replace("_", "-") for name in by_name.names_in(PACKAGE)]
    if method not in known:
        what = f"is a quantised checkpoint (quantization_config, quant_method {method!r}), which is not read"
        raise InputError(what, where=where, fix=f"{ORIGINAL}; read are {', '.join(known)}")
    found = by_name.load(PACKAGE, str(method).replace("-", "_"), "quant_method")
    found.check(settings, where)
    return found


def unread(settings: Mapping[str, Any], what: str, where: Path) -> InputError:
    """The error for a form of a known method that is not read."""
    said = f"is a quantised checkpoint ({settings['quant_method']}) with {what}, which is not read"
    return InputError(said, where=where, fix=ORIGINAL)


def block_of(settings: Mapping[str, Any], name: str, block: Any, where: Path) -> list[int] | None:
    """[rows, columns] of the blocks that share a scale; older releases wrote "128x128". Raises InputError for others."""
    if block is None:
        return None
    given = block.split("x") if isinstance(block, str) else block
    given = [int(n) if isinstance(n, str) and n.isdecimal() else n for n in given] if isinstance(given, list) else []
    found = [n for n in given if type(n) is int and n > 0]
    if len(found) != 2 or len(given) != 2:
        raise unread(settings, f"{name} {block!r}", where)
    return found


def notes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a checkpoint asks of activations, which is not followed here."""
    groups = settings.get("config_groups")
    of_groups = groups.values() if isinstance(groups, dict) else ()
    rounds = settings.get("activation_scheme") or any(
        g.get("input_activations") for g in of_groups if isinstance(g, dict)
    )
    found = ["inputs of its products"] if rounds else []
    found += ["keys and values"] if settings.get("kv_cache_scheme") else []
    if not found:
        return ()
    return (
        f"the checkpoint asks to round {' and '.join(found)}, too; that is not followed, its weights alone are read",
    )


def eight_bit_floats(parts: Parts, scale: np.ndarray, block: Any) -> Matrix:
    """weight fp8 [N,K] times a scale: one number, one by output [N,1], or one for each block of `block` [rows, columns]."""
    if not parts.dtype("weight").startswith("F8_") or len(parts.shape("weight")) != 2:
        found = f"weight is {parts.dtype('weight')} {list(parts.shape('weight'))} and has a scale"
        what = f"{found}: numbers that are still to be rounded, or another format"
        raise InputError(what, where=parts.module, fix=ORIGINAL)
    outputs, inputs = parts.shape("weight")
    if scale.size == 1:
        scale, (rows, columns) = scale.reshape(1, 1), (outputs, inputs)
    elif scale.shape in ((outputs,), (outputs, 1)):
        scale, (rows, columns) = scale.reshape(outputs, 1), (1, inputs)
    else:
        rows, columns = block or (0, 0)
    if not rows or scale.shape != (-(-outputs // rows), -(-inputs // columns)):
        said = f"blocks of {list(block)}" if block else "no size of blocks"
        what = f"a scale {list(scale.shape)} of a weight {[outputs, inputs]}, and quantization_config says {said}"
        raise InputError(what, where=parts.module)

    def read() -> np.ndarray:
        whole = np.repeat(np.repeat(scale, rows, axis=0)[:outputs], columns, axis=1)[:, :inputs]
        return np.ascontiguousarray((parts["weight"] * whole).T)

    return Matrix(inputs, outputs, 8, read, kind="8-bit floats")


def nibbles(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Words of 32 bits -> uint8 numbers of `bits`, the lowest first, along `axis` of two."""
    words = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    out = np.empty((*words.shape, len(shifts)), np.uint8)
    for place, shift in enumerate(shifts):  # one at a time: all together would take eight times the memory
        out[..., place] = words >> shift & np.uint32((1 << bits) - 1)
    rows, columns = words.shape
    if axis == 1:
        return out.reshape(rows, -1)
    return np.ascontiguousarray(out.swapaxes(1, 2)).reshape(-1, columns)
