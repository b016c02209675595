"""What an archive carries so that the device can ask its model: parts of this package, and what they read besides engines.

    cm_export.cli.verbs.run, cm_export.backends.tensorrt   ->   every module that they import or name   ->   host/cm_export/
    token embedding, and down rows where a fill adds a bias   ->   places in 16 bit in the archive's weight files

Which modules these are is read from their imports, so nobody keeps a list; the device needs PACKAGES besides.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...base import by_name
from ...base.errors import CmExportError
from ...build import sources
from ...bundle import weights
from ...bundle.bundle import MEASURED, Bundle
from ...bundle.names import core_row_names
from ...families import GROUP
from .devices import JetPack

FOLDER = "host"
ROOTS = (
    "cm_export.__main__",
    "cm_export.cli.verbs.run",
    "cm_export.backends.tensorrt",
    "cm_export.deploy.jetson.assemble",
)
# Verbs and backends that are asked for by name are not there, but for the roots.
NAMED_ONLY = (*sources.NAMED_ONLY, "cm_export.cli.verbs")
# Module -> what pip is told, as in pyproject.toml. TensorRT itself is JetPack's.
PACKAGES = {
    "click": "click>=8.1",
    "jinja2": "jinja2>=3.1",
    "ml_dtypes": "ml-dtypes>=0.5",
    "numpy": "numpy>=1.26",
    "PIL": "pillow>=10.1",
    "psutil": "psutil>=5.9.4",
    "safetensors": "safetensors>=0.5",  # reads a calibration
    "tokenizers": "tokenizers>=0.22",
}
_ROWS = 1 << 23  # numbers that are converted at a time
_OWN = "host.safetensors"  # what the engines' weight file does not hold in 16 bit


def modules() -> dict[str, Path]:
    """Place in the archive -> source file, of every module that asking takes."""
    names = {name for root in ROOTS for name in sources.behind(root, NAMED_ONLY)}
    out = {}
    for name in sorted(names):
        file = sources.file_of(name)
        if file is None:
            raise CmExportError(f"has no module {name}", where="this installation", fix="install cm-export again")
        place = PurePosixPath(FOLDER, *name.split("."))
        out[str(place / "__init__.py" if file.name == "__init__.py" else place.with_suffix(".py"))] = file
    return out


def packages(bundle: Bundle, jetpack: JetPack) -> dict[str, str]:
    """Of PACKAGES what this bundle takes, and NVIDIA's bindings of the CUDA that this JetPack has."""
    major, read = int(jetpack.cuda.split(".")[0]), PACKAGES.items()
    calibrated = set(MEASURED) & set(bundle.manifest["files"])
    needed = {module: what for module, what in read if calibrated or module != "safetensors"}
    return needed | {"cuda.bindings": f"cuda-bindings>={max(12.8, major):g},<{major + 1}"}


def cannot_ask(bundle: Bundle) -> str | None:
    """Why the device will build, prove and measure the engines, but not ask them; None where it can."""
    family = bundle.manifest["model"]["type"]
    if family in by_name.names_in(GROUP):
        return None
    return f"the family {family} comes from another distribution, of which an archive carries nothing"


def host_weights(bundle: Bundle, folder: Path, file: str, graphs: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the host finds what it reads, all of it in 16 bit: first the token embedding [V,D], then down rows [F,D].

    `folder`: where the weight file of the engines lies; what that has in another type, or not at all, is written beside it.
    """
    names = [bundle.family.embedding]
    if any(v["name"] == "core_bias" for v in graphs["decode"]["inputs"]):
        names += [down for *_, down in core_row_names(bundle.family, bundle.shape.layers)]
    there = {n: t for n, t in weights.index(folder / file).items() if t.dtype == np.float16}
    shapes = {n: bundle.weights.tensors[n].shape for n in names}
    own = [n for n in names if n not in there or there[n].shape != shapes[n]]
    if own:
        planned = [weights.Planned(n, np.dtype("<f2"), shapes[n], partial(_pieces, bundle.weights[n])) for n in own]
        weights.write(folder / _OWN, planned)
        mine = weights.index(folder / _OWN)
    places = {n: (_OWN, mine[n]) if n in own else (file, there[n]) for n in names}
    return [
        {
            "file": f"{folder.name}/{where}",
            "tensor": name,
            "dtype": "float16",
            "shape": list(tensor.shape),
            "offset": tensor.offset,
            "length": tensor.length,
        }
        for name, (where, tensor) in places.items()
    ]


def _pieces(table: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _ROWS // table.shape[1])
    for at in range(0, len(table), rows):
        yield table[at : at + rows].astype(np.float16)
