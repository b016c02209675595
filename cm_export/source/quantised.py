"""A checkpoint in few bits: its matrices by module, and the same checkpoint in float32 for everything that reads floats.

    model.layers.0.mlp.up_proj.qweight, .qzeros, .scales, .g_idx   ->   model.layers.0.mlp.up_proj.weight, float32

The float checkpoint holds exactly the numbers that the codes stand for, and is gone when the weight file has been written.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..base.errors import InputError
from ..base.json_file import read_object
from ..bundle import weights
from ..bundle.weights import Planned
from . import directory, packings
from .packings import Matrix, Parts

KEY = "quantization_config"
_BESIDE = ("bias", "k_scale", "v_scale", "q_scale")  # what a module in few bits may hold that is none of its parts


@dataclass(frozen=True)
class Quantised:
    """The matrices of a checkpoint that are stored in few bits, and every other tensor."""

    path: Path
    method: str
    settings: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Path]]  # module -> last name of a tensor -> its file
    others: Mapping[str, Path]  # tensor -> its file
    _packing: ModuleType

    def matrix(self, module: str) -> Matrix:
        """One of them; its codes are read when they are asked for. Raises InputError for tensors that do not fit."""
        try:
            found = self._packing.matrix(Parts(module, self.modules[module]), self.settings)
        except (ValueError, IndexError, KeyError, TypeError, ArithmeticError) as e:  # of shapes that nobody foresaw
            what = f"tensors of {module} that do not fit together ({type(e).__name__}: {e})"
            raise InputError(what, where=self.path, fix=packings.ORIGINAL) from e
        assert isinstance(found, Matrix)
        return found

    @contextlib.contextmanager
    def in_float32(self, folder: Path, has: Callable[[str], bool], progress: Callable[..., None]) -> Iterator[Path]:
        """A checkpoint of the same numbers in a temporary directory inside `folder`; `has`: whether the model has a parameter."""
        with tempfile.TemporaryDirectory(prefix="float32.", dir=folder) as out:
            for name in directory.NAMES:
                if (self.path / name).is_file() and name not in ("config.json", directory.INDEX):
                    shutil.copyfile(self.path / name, Path(out) / name)
            config = {k: v for k, v in read_object(self.path / "config.json").items() if k != KEY}
            (Path(out) / "config.json").write_text(json.dumps(config))
            planned = [self._planned_matrix(module) for module in self.modules]
            planned += [self._planned(name) for name in self.others if not self._is_empty_bias(name, has)]
            note = partial(progress, "read the codes: tensor", total=len(planned))
            weights.write(
                Path(out) / "model.safetensors", [_announced(t, partial(note, i + 1)) for i, t in enumerate(planned)]
            )
            yield Path(out)

    def float_elements(self) -> int:
        """How many numbers it holds besides those in few bits."""
        from safetensors import safe_open

        count = 0
        for name, file in self.others.items():
            with safe_open(file, "np") as f:
                count += math.prod(f.get_slice(name).get_shape())
        return count

    def _planned_matrix(self, module: str) -> Planned:
        matrix = self.matrix(module)

        def read() -> Iterator[np.ndarray]:
            yield np.ascontiguousarray(matrix.numbers().T)

        return Planned(f"{module}.weight", np.dtype("<f4"), (matrix.outputs, matrix.inputs), read)

    def _planned(self, name: str) -> Planned:
        module, _, last = name.rpartition(".")
        parts = Parts(module, {last: self.others[name]})

        def read() -> Iterator[np.ndarray]:
            yield parts[last].astype(np.float32)

        return Planned(name, np.dtype("<f4"), parts.shape(last), read)

    def _is_empty_bias(self, name: str, has: Callable[[str], bool]) -> bool:
        """Whether it is a bias that the model does not have: such files give every packed module one, all zero."""
        module, _, last = name.rpartition(".")
        if last != "bias" or module not in self.modules or has(name):
            return False
        if Parts(module, {last: self.others[name]})[last].any():
            raise InputError(f"{name} is not zero, and the model has no such bias", where=self.path)
        return True


def find(path: Path) -> Quantised | None:
    """What is stored in few bits in the checkpoint at `path`; None for a checkpoint of floats. Raises InputError."""
    settings = read_object(path / "config.json").get(KEY)
    if not settings:
        return None
    packing = packings.find(settings, path / "config.json")
    where = {name: file for file in directory.weight_files(path) for name in directory.tensor_types(file)}
    marked = [name.rpartition(".") for name in where]
    found = {module for module, _, last in marked if last in packing.MARKS}
    modules = {
        module: {part: where[own] for part in packing.PARTS if (own := f"{module}.{part}") in where}
        for module in sorted(found)
    }
    if not modules:
        what = f"{KEY} says {settings['quant_method']!r}, and no tensor is named ...{' or '.join(packing.MARKS)}"
        raise InputError(what, where=path, fix=f"take {KEY} out of config.json if the weights are float")
    taken = {f"{module}.{part}" for module, parts in modules.items() for part in parts}
    others = {name: file for name, file in where.items() if name not in taken}
    types = {name: kind for file in {*others.values()} for name, kind in directory.tensor_types(file).items()}
    for name in others:
        module, _, last = name.rpartition(".")
        if directory.in_few_bits(name, types[name]) or (module in modules and last not in _BESIDE):
            what = f"{name} is {types[name]}, and nothing here says what its numbers mean"
            raise InputError(what, where=path, fix=f"download the checkpoint again; or {packings.ORIGINAL}")
    return Quantised(path, settings["quant_method"], settings, modules, others, packing)


def _announced(tensor: Planned, announce: Callable[[], None]) -> Planned:
    def read() -> Iterator[np.ndarray]:
        announce()
        yield from tensor.read()

    return Planned(tensor.name, tensor.dtype, tensor.shape, read)
