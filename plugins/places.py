"""Where this machine's plugin library lies, which TensorRT loads, and ONNX Runtime where it has CUDA.

a build, which its user has asked for    the recipe's engine.plugins, or artifacts/plugins (where `make plugins` puts it) ->
                                         the current directory -> the user's cache
a run                                    the user's cache alone: a bundle's recipe and a directory may be somebody else's
"""

from pathlib import Path

from .cpu.library import cache

NAME = "libcm_plugins.so"
DOMAIN = "com.cm_export.cuda"  # of its ops, in ONNX Runtime


def candidates(given: str = "") -> list[Path]:
    """The files that are looked for, in this order; `given`: the only one."""
    return [Path(given)] if given else [Path("artifacts/plugins") / NAME, Path(NAME), cache() / NAME]


def find(given: str = "") -> Path | None:
    """The library for a build, None without one."""
    return next((place.resolve() for place in candidates(given) if place.is_file()), None)


def trusted() -> Path | None:
    """The library that a run may load, None without one."""
    found = cache() / NAME
    return found.resolve() if found.is_file() else None


def why_unusable() -> str | None:
    """One line on why ONNX Runtime cannot take our kernels from it, None where it can."""
    import onnxruntime as ort

    found = trusted()
    if found is None:
        return f"there is no {cache() / NAME}; `make plugins` builds it in artifacts/plugins, copy it from there"
    try:
        ort.SessionOptions().register_custom_ops_library(str(found))
    except Exception as e:  # not a library, of another system, or of before it had these ops
        return f"{found} does not load ({' '.join(str(e).split())[:200]}); build it again with `make plugins`"
    return None
