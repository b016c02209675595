"""How long a row of a cache in bytes is: int8 codes, then a bfloat16 scale for every 32 of them (plugins/cpu/kernels.h)."""

TOGETHER = 32  # numbers that share a scale


def row_of_bytes(width: int) -> int:
    """Bytes of a row of `width` numbers."""
    return width + 2 * -(-width // TOGETHER)
