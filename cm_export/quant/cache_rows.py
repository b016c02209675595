"""The forms of a cache's rows (plugins/cpu/kernels.h): what a recipe calls them, what they are made of, how long they are.

fp32    d float32        fp16    d float16        int8    d codes of a byte, then a bfloat16 scale for every 32 of them
"""

CELLS = {"fp32": "float32", "fp16": "float16", "int8": "uint8"}
TOGETHER = 32  # numbers that share a scale
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def cells_of_row(form: str, width: int) -> int:
    """Cells of a row of `width` numbers."""
    return width + (2 * -(-width // TOGETHER) if form == "int8" else 0)


def bytes_of_row(form: str, width: int) -> int:
    """Its bytes."""
    return cells_of_row(form, width) * _BYTES[form]
