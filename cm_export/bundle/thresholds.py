"""Thresholds of policy `active`: for every product of decode, the weight of a channel below which it is left out.

    thresholds.safetensors, or the same arrays in a calibration           site: one side of a product; T = 4 L + 1 of them
      levels      [P] f32     shares of the channels that are kept, ascending, the last one 1
      thresholds  [T,P] f32   what a channel must weigh to be among them, on generated text; 0 at share 1
      sensitivity [T] f32     KL to dense, nats per token, when this site alone keeps half of its channels
      sizes       [T] f32     weights that the site's product reads, densely

site 4l      x of gate and up        4l+1  z of down        4l+2  x of q, k, v        4l+3  x of o        4L  x of the head

A threshold holds for every token: one that needs more channels keeps more. Shares are allotted by sensitivity:
share_i = 1 - c s_i^-1/4, with c such that the sites together read the share of their weights that was asked for.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..base.errors import BundleError
from ..recipe.recipe import LEAST_ACTIVE
from . import weights
from .weights import WeightFile

FILE = "thresholds.safetensors"
SIDES = 4  # of a layer; the order is that of the docstring
FFN_IN, FFN_OUT, ATTENTION_IN, ATTENTION_OUT = range(SIDES)
_POWER = -0.25  # of the sensitivity: beats even shares, and -.5 does not (docs/quality.md)
_ARRAYS = ("levels", "thresholds", "sensitivity", "sizes")


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The arrays of the file, by their names there."""

    levels: np.ndarray
    thresholds: np.ndarray
    sensitivity: np.ndarray
    sizes: np.ndarray

    def __post_init__(self) -> None:
        """Raises BundleError for arrays that do not belong together, or hold what cannot be."""
        sites, levels = len(self.sizes), len(self.levels)
        fits = self.thresholds.shape == (sites, levels) and self.sensitivity.shape == (sites,)
        sane = fits and all(np.isfinite(getattr(self, name)).all() for name in _ARRAYS)
        rising = sane and levels > 1 and bool((np.diff(self.levels) > 0).all()) and self.levels[-1] == 1
        falling = rising and bool((np.diff(self.thresholds, axis=1) <= 0).all()) and not self.thresholds[:, -1].any()
        if not falling or sites % SIDES != 1 or (self.sizes <= 0).any():
            raise BundleError("its thresholds cannot be", where=FILE, fix="calibrate or build again")

    @property
    def layers(self) -> int:
        return len(self.sizes) // SIDES

    @property
    def of_ffn(self) -> np.ndarray:
        """[T] bool: which sites are the FFNs'."""
        at = np.arange(len(self.sizes))
        return (at % SIDES < ATTENTION_IN) & (at < SIDES * self.layers)

    def shares(self, ffn: float, rest: float) -> np.ndarray:
        """[T]: share of its channels that each site keeps, so that FFNs read `ffn` of their weights and the others `rest`."""
        out = np.ones(len(self.sizes))
        for sites, target in ((self.of_ffn, ffn), (~self.of_ffn, rest)):
            out[sites] = _allotted(self.sensitivity[sites], self.sizes[sites], target)
        return out

    def at(self, shares: np.ndarray) -> np.ndarray:
        """[T] float32: the thresholds at which the sites keep these shares of their channels."""
        rows = zip(shares, self.thresholds, strict=True)
        return np.array([np.interp(share, self.levels, row) for share, row in rows], np.float32)


def _allotted(sensitivity: np.ndarray, sizes: np.ndarray, target: float) -> np.ndarray:
    """Shares, LEAST_ACTIVE to 1, whose mean weighted by size is `target` (or as close as that allows)."""
    dispensable = np.maximum(sensitivity.astype(np.float64), 1e-6) ** _POWER
    dispensable /= dispensable.max()
    low, high = 0.0, 1e6

    def shares(c: float) -> np.ndarray:
        return np.clip(1 - c * dispensable, LEAST_ACTIVE, 1)

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(shares(middle), weights=sizes) > target else (low, middle)
    return shares(high)


def write(path: Path, found: Thresholds) -> str:
    """Write the file; returns its sha256."""
    return weights.write_arrays(path, {name: getattr(found, name).astype("<f4") for name in _ARRAYS})


def read(path: Path) -> Thresholds:
    """The thresholds at `path`. Raises BundleError for a file that is damaged or holds something else."""
    file = WeightFile(path)
    if missing := [name for name in _ARRAYS if name not in file]:
        raise BundleError(f"it has no {missing[0]}", where=path, fix="build the bundle again")
    return Thresholds(**{name: np.array(file[name]) for name in _ARRAYS})
