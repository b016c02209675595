"""The part of this package that runs bundles, copied beside vlm/1/model.py: what answers is what wrote the repository.

A server needs no cm-export installed, only what requirements.txt names; containers without a network take both from an image.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from ...base.errors import CmExportError
from ...base.install import pip_install
from .containers import Container

# In the order of imports, from the first to `serving`; without what makes bundles.
PACKAGES = (
    "base", "quant", "families", "recipe", "bundle", "plugins", "policies", "surgery", "host", "backends", "serving",
)  # fmt: skip
# Distributions that these import; a test compares them with what the files say.
NEEDS = (
    "jinja2", "ml-dtypes", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "pillow", "psutil", "safetensors",
    "tokenizers",
)  # fmt: skip
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.cu", "*.cuh", "native", "emulator", "harness", "ort")


def copy(folder: Path) -> None:
    """Put the package `cm_export` into `folder`."""
    here, there = Path(str(files("cm_export"))), folder / "cm_export"
    there.mkdir()
    shutil.copyfile(here / "__init__.py", there / "__init__.py")
    for name in PACKAGES:
        shutil.copytree(Path(str(files(f"cm_export.{name}"))), there / name, ignore=_IGNORED)


def requirements(tensorrt: str | None, container: Container) -> list[str]:
    """Lines of requirements.txt: what that package imports, in the versions that are here; `tensorrt`: that of engines.

    A container with an older Python than 3.11 takes what there is for it.
    """
    out = []
    for name in NEEDS:
        if name == "numpy" and not container.takes_numpy_2:
            out.append("numpy<2")
            continue
        found = next(filter(None, map(_version, (name, f"{name}-gpu"))), None)
        if found is None:
            raise CmExportError("is not installed, so its version is not known", where=name, fix=pip_install())
        out += [f"{found}; python_version >= '3.11'", f"{name}; python_version < '3.11'"]
    out.append("tomli; python_version < '3.11'")
    return [*out, f"tensorrt=={tensorrt}", "cuda-bindings>=12.8"] if tensorrt else out


def _version(name: str) -> str | None:
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return None
