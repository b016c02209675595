"""How a weight is stored in few bits, and the weight in that form: codes, and a scale for each group of them.

w [F,D] float  ->  codes [F,D] int8 in -2^(bits-1) .. 2^(bits-1) - 1,  w ~ (codes - zero) * scale of the group

axis 1: groups lie along a row,    scale [F,D/group]           axis 0: along a column,  scale [F/group,D]
symmetric: the zero of every group is 0 and is not stored      otherwise a code of its own, so that 0 stays exactly 0
Kernels that count from 0 read codes and zeros 2^(bits-1) higher: `Quantised.unsigned`.
"""

from dataclasses import dataclass

import numpy as np

from ..base.errors import InputError

_BITS = (4, 8)
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Scheme:
    """Bits of a code, weights that share a scale, the axis along which they lie, the scale's type, and whether zero is 0."""

    bits: int
    group: int
    axis: int = 1
    scale: np.dtype = _FLOAT32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise InputError(f"weights of {self.bits} bits", where="quantised weight", fix="give 4 or 8")
        if self.group < 1 or self.axis not in (0, 1):
            what = f"groups of {self.group} along axis {self.axis}"
            raise InputError(what, where="quantised weight", fix="give at least 1 and the axis 0 or 1")
        object.__setattr__(self, "scale", np.dtype(self.scale))

    @property
    def lowest(self) -> int:
        """The smallest code; the largest is -lowest - 1."""
        return -(2 ** (self.bits - 1))

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its part of a scale and of a zero (a byte) included."""
        return self.bits + 8 * (self.scale.itemsize + (not self.symmetric)) / self.group

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a weight [F,D]. Raises InputError where it is not made of whole groups."""
        length = shape[self.axis]
        if length % self.group:
            name = ("columns", "rows")[self.axis]
            what, fix = f"{name} of {length} in groups of {self.group}", f"{name} must be whole groups"
            raise InputError(what, where="quantised weight", fix=fix)
        rows, columns = (n // self.group if axis == self.axis else n for axis, n in enumerate(shape))
        return rows, columns


@dataclass(frozen=True)
class Quantised:
    """A weight in few bits, not packed yet."""

    codes: np.ndarray  # int8 [F,D]
    scale: np.ndarray  # of the scheme's type and `scale_shape`
    scheme: Scheme
    zero: np.ndarray | None = None  # int8, of the same shape as `scale`; None where the scheme is symmetric

    def numbers(self) -> np.ndarray:
        """What the codes stand for: float32 [F,D]."""
        return (self.codes.astype(np.float32) - self._each(self.zero)) * self._each(self.scale)

    def unsigned(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes uint8 [F,D] and zeros uint8 counted from 0 up; zeros are None, and 2^(bits-1), where it is symmetric."""
        return self._from_zero(self.codes), None if self.zero is None else self._from_zero(self.zero)

    def _each(self, values: np.ndarray | None) -> np.ndarray | np.float32:
        if values is None:
            return np.float32(0)
        return np.repeat(values.astype(np.float32), self.scheme.group, axis=self.scheme.axis)

    def _from_zero(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.int16) - self.scheme.lowest).astype(np.uint8)
