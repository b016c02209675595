"""Where this machine's plugin library lies, which TensorRT loads, and ONNX Runtime where it has CUDA.

the recipe's engine.plugins  or  artifacts/plugins (where `make plugins` puts it) -> the current directory -> the user's cache
"""

from pathlib import Path

from .cpu.library import cache

NAME = "libcm_plugins.so"
DOMAIN = "com.cm_export.cuda"  # of its ops, in ONNX Runtime


def candidates(given: str = "") -> list[Path]:
    """The files that are looked for, in this order; `given`: the only one."""
    return [Path(given)] if given else [Path("artifacts/plugins") / NAME, Path(NAME), cache() / NAME]


def find(given: str = "") -> Path | None:
    """The library, None without one."""
    return next((place.resolve() for place in candidates(given) if place.is_file()), None)


def why_unusable(given: str = "") -> str | None:
    """One line on why ONNX Runtime cannot take our kernels from it, None where it can."""
    import onnxruntime as ort

    found = find(given)
    if found is None:
        return f"there is no {given or NAME}; `make plugins` builds it, {cache()} is looked through as well"
    try:
        ort.SessionOptions().register_custom_ops_library(str(found))
    except Exception as e:  # not a library, of another system, or of before it had these ops
        return f"{found} does not load ({' '.join(str(e).split())[:200]}); build it again with `make plugins`"
    return None
