"""Where the compiled CPU ops lie on this machine, and what they say about themselves.

    find()       beside this file (made by `pip install`) -> in the user's cache (made by `built`) -> None
    built()      the same, compiled into the user's cache if it is nowhere and a compiler is there

Only a library of exactly these sources is found: its name carries their hash.
"""

import ctypes
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cm_export.base.errors import CmExportError, InputError
from cm_export.base.install import pip_install
from cm_export.quant.cache_rows import CELLS, TOGETHER, cells_of_row

from . import build

DOMAIN = "com.cm_export.native"


def find() -> Path | None:
    """The library of these sources, if it was built."""
    name = build.library_name()
    return next((place / name for place in (build.SOURCES, cache()) if (place / name).is_file()), None)


def built() -> Path:
    """The library, compiled now if need be (half a minute, once). Raises InputError where that is not possible."""
    return find() or build.compile_library(cache())


def cache() -> Path:
    """The user's folder of compiled libraries."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cm-export" / "native"


def why_missing() -> str | None:
    """One line for `doctor` on why there is no usable library and what to do, None if there is one."""
    if sys.platform not in ("linux", "darwin"):
        return f"the CPU ops are not made for {sys.platform}"
    if find() is None:
        if build.compiler() is None:
            names = ", ".join(build.COMPILERS)
            return (
                f"the CPU ops are not built and there is no C++ compiler; install one of {names}, then {pip_install()}"
            )
        return f"the CPU ops are not built; {pip_install()} compiles them"
    try:
        info()
    except CmExportError as error:
        return str(error)
    return None


def counts() -> tuple[int, int]:
    """Bytes of weights that the ops read in this process since the last `reset`, and that dense products would have read."""
    both = (ctypes.c_uint64 * 2)()
    _loaded(_path()).cm_native_counts(both)
    return both[0], both[1]


def reset() -> None:
    """Counts begin at nothing again."""
    _loaded(_path()).cm_native_reset()


def rounded(rows: np.ndarray, form: str) -> np.ndarray:
    """Rows of a cache, float32 [...,d], as fp16, float16 [...,d], or as int8, uint8 [...,w].

    What `widened` gave goes to the same rows again.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((*rows.shape[:-1], cells_of_row(form, rows.shape[-1])), CELLS[form])
    _loaded(_path()).cm_native_round(form == "int8", *_counted(rows, rows.shape[-1], out))
    return out


def widened(rows: np.ndarray) -> np.ndarray:
    """float32 [...,d] of such rows. Raises TypeError for others."""
    rows = np.ascontiguousarray(rows)
    form, width = ("fp16" if rows.dtype == np.float16 else "int8"), rows.shape[-1]
    if form == "int8":
        width -= 2 * -(-width // (TOGETHER + 2))
    if rows.dtype != CELLS[form] or rows.shape[-1] != cells_of_row(form, width):
        raise TypeError(f"not rows of a narrow cache: {rows.dtype} {list(rows.shape)}")
    out = np.empty((*rows.shape[:-1], width), np.float32)
    _loaded(_path()).cm_native_widen(form == "int8", *_counted(rows, width, out))
    return out


def _counted(rows: np.ndarray, width: int, out: np.ndarray) -> tuple[Any, ...]:
    """What both functions take: from where, how many rows, of how many numbers, to where."""
    count = ctypes.c_int64(math.prod(rows.shape[:-1]))
    return ctypes.c_void_p(rows.ctypes.data), count, ctypes.c_int64(width), ctypes.c_void_p(out.ctypes.data)


def info() -> dict[str, Any]:
    """{"version": 1, "instructions": the set in use, "usable": [every set that this processor has, best first]}"""
    library = _loaded(_path())
    library.cm_native_info.restype = ctypes.c_char_p
    return json.loads(library.cm_native_info().decode())


def use(instructions: str, library: Path | None = None) -> None:
    """For tests and benchmarks: the kernels of this name from now on, the best with "". Raises InputError."""
    if not _loaded(library or _path()).cm_native_use(instructions.encode()):
        raise InputError(
            "this processor does not have these instructions", where=instructions, fix="see library.info()"
        )


def _path() -> Path:
    found = find()
    if found is None:
        raise InputError(why_missing() or "the CPU ops are not built", where="cm_export.plugins.cpu")
    return found


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    """Loaded once per process: ONNX Runtime, which opens the same file, gets the same library and the same counts."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CmExportError(f"cannot be loaded ({error})", where=path, fix="delete it and install again") from error
