"""How many neighbouring weights share a scale: the largest usual size that divides their number.

768 -> 128        1696 -> 32        72 -> 8        72, at least 16 -> an error
"""

from ..base.errors import InputError

SIZES = (128, 64, 32, 16, 8)  # for which runtimes have kernels; 8 numbers of 4 bits fill an int32 word


def fitting(length: int, what: str, *, where: object, fix: str, most: int = SIZES[0], least: int = SIZES[-1]) -> int:
    """The largest of SIZES from `least` to `most` that divides `length`, which errors call `what`. Raises InputError."""
    for size in SIZES:
        if least <= size <= most and length % size == 0:
            return size
    raise InputError(f"{what} {length} is no multiple of {least}", where=where, fix=fix)
