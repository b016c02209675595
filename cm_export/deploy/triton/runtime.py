"""The part of this package that runs bundles, copied beside vlm/1/model.py: what answers is what wrote the repository.

A server needs no cm-export installed, only what requirements.txt names; containers without a network take both from an image.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement

from ...base.errors import CmExportError
from ...base.install import DISTRIBUTION, pip_install

# In the order of imports, from the first to `serving`; without what makes bundles.
PACKAGES = (
    "base", "quant", "families", "recipe", "bundle", "plugins", "policies", "host", "backends", "serving",
)  # fmt: skip
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.cu", "*.cuh", "native", "emulator", "harness")


def copy(folder: Path) -> None:
    """Put the package `cm_export` into `folder`."""
    here, there = Path(str(files("cm_export"))), folder / "cm_export"
    there.mkdir()
    shutil.copyfile(here / "__init__.py", there / "__init__.py")
    for name in PACKAGES:
        shutil.copytree(Path(str(files(f"cm_export.{name}"))), there / name, ignore=_IGNORED)


def requirements(tensorrt: str | None) -> list[str]:
    """Lines of requirements.txt: what the package needs, in the versions that are here; `tensorrt`: that of engines.

    Containers of older Pythons than this one's take the lowest versions that the package admits instead.
    """
    try:
        lines = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError as e:
        raise CmExportError(
            "is not installed, so nothing says what it needs", where=DISTRIBUTION, fix=pip_install()
        ) from e
    out = []
    for line in lines:
        if line.marker is None or (line.marker.evaluate({"extra": ""}) and "extra" not in str(line.marker)):
            out.append(f"{line.name}=={metadata.version(line.name)}; python_version >= '3.11'")
        if line.marker is None or ("extra" not in str(line.marker) and "<" in str(line.marker)):
            out.append(f"{line.name}{line.specifier}; python_version < '3.11'")
    if tensorrt:
        out += [f"tensorrt=={tensorrt}", "cuda-bindings>=12.8"]
    return out
