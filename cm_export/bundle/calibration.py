"""The calibration file: what a model's FFN neurons do in text that it generates itself, measured once per checkpoint.

calibration.safetensors                                          n runs over generated tokens only
  energy      [L,F] f32   mean of (z_n / ||z||)^2                prior of `glass`; every layer sums to 1
  mean_z      [L,F] f32   mean of z_n                            fill = "calibrated": what a dropped neuron gave
  mean_y      [L,D] f32   mean of the FFN's output               = mean_z W_down
  sensitivity [L,P] f32   KL to dense, nats per token, when only layer l computes shares[p] of its neurons
  shares      [P]   f32   ascending
  order       [L,F] i32   neurons so that those active together are neighbours: place -> id
  prune_kl    [N,Q] f32   KL to dense when the image tokens are cut after layer prune_layers[n] to prune_shares[q]
  prune_layers [N]  i32   ascending; none (N = 0) where no prompt had a picture
  prune_shares [Q]  f32   ascending
  active_*                what thresholds.py holds, under the names it has there
  answers, answer_ends    what phrases.py holds; missing where no prompts were answered

Ids are those of the checkpoint. One metadata entry holds the checkpoint's hashes, what was run and the versions.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..base import atomic
from ..base.errors import BundleError, InputError
from .phrases import ARRAYS as _PHRASES
from .phrases import Phrases
from .thresholds import Thresholds

FILE = "calibration.safetensors"
FORMAT = 3
_META = "cm_export"  # one entry: the order of several is not fixed, and the file must be repeatable to the byte
_FLOATS = {"energy": "LF", "mean_z": "LF", "mean_y": "LD", "sensitivity": "LP", "shares": "P"}
_FLOATS |= {"prune_kl": "NQ", "prune_shares": "Q"}
_FLOATS |= {"active_levels": "W", "active_thresholds": "TW", "active_sensitivity": "T", "active_sizes": "T"}
_INTEGERS = {"order": "LF", "prune_layers": "N"}

_ACTIVE = "active_"
_NO_THRESHOLDS = {
    "levels": np.zeros(0),
    "thresholds": np.zeros((0, 0)),
    "sensitivity": np.zeros(0),
    "sizes": np.zeros(0),
}


@dataclass(frozen=True)
class Calibration:
    """The arrays of the file by their names there; `about` is its metadata."""

    energy: np.ndarray
    mean_z: np.ndarray
    mean_y: np.ndarray
    sensitivity: np.ndarray
    shares: np.ndarray
    order: np.ndarray
    about: dict[str, Any]
    prune_layers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    prune_shares: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prune_kl: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    active: Thresholds | None = None
    phrases: Phrases | None = None

    @cached_property
    def inverse(self) -> np.ndarray:
        """[L,F] int64: id -> place."""
        return np.argsort(self.order, axis=1)

    def reordered(self) -> "Calibration":
        """The same with neurons counted by place: what fits weights that are stored in `order`."""
        ids = self.order.astype(np.int64)
        energy, mean_z = (np.take_along_axis(a, ids, axis=1) for a in (self.energy, self.mean_z))
        own = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        return replace(self, energy=energy, mean_z=mean_z, order=own)


def checkpoint_id(files: dict[str, str]) -> str:
    """One hash for a checkpoint: of its weight files' hashes, so that a new tokenizer or README changes nothing."""
    weights = {n: h for n, h in files.items() if n.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def write(path: Path, calibration: Calibration) -> None:
    """Write the file under a temporary name, then rename it. Raises InputError when that is impossible."""
    from safetensors.numpy import save

    own = {n: getattr(calibration, n) for n in _FLOATS if not n.startswith(_ACTIVE)}
    for name, none in _NO_THRESHOLDS.items():
        own[_ACTIVE + name] = none if calibration.active is None else getattr(calibration.active, name)
    arrays = {n: np.ascontiguousarray(a, np.float32) for n, a in own.items()}
    arrays |= {n: np.ascontiguousarray(getattr(calibration, n), np.int32) for n in _INTEGERS}
    if calibration.phrases is not None:
        arrays |= {n: np.ascontiguousarray(getattr(calibration.phrases, n), np.int32) for n in _PHRASES}
    about = json.dumps({"format": FORMAT, **calibration.about}, sort_keys=True)
    atomic.write(path, save(arrays, {_META: about}))


def read(path: Path) -> Calibration:
    """The calibration at `path`. Raises InputError for a file that is missing, damaged or not a calibration."""
    from safetensors import SafetensorError, safe_open

    again = "measure it with `cm-export calibrate`"
    if not path.is_file():
        raise InputError("no such calibration file", where=path, fix=again)
    try:
        with safe_open(path, "np") as f:
            about = json.loads((f.metadata() or {}).get(_META, "{}"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise InputError(f"is not a calibration file of format {FORMAT}", where=path, fix=again)
            arrays = {n: f.get_tensor(n) for n in (*_FLOATS, *_INTEGERS)}
            written = {n: f.get_tensor(n) for n in _PHRASES if n in f.keys()}  # noqa: SIM118 - f is no dict
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(f"cannot be read ({e})", where=path, fix=again) from e
    _check(path, arrays, again)
    active = {n.removeprefix(_ACTIVE): arrays.pop(n) for n in _FLOATS if n.startswith(_ACTIVE)}
    try:
        return Calibration(
            **arrays,
            about=about,
            active=Thresholds(**active) if len(active["sizes"]) else None,
            phrases=Phrases(**written) if len(written) == len(_PHRASES) else None,
        )
    except BundleError as e:
        raise InputError(e.what, where=path, fix=again) from e


def belongs(calibration: Calibration, files: dict[str, str], where: object) -> None:
    """Raises InputError unless it was measured on the checkpoint whose `files` (name -> sha256) these are."""
    if calibration.about.get("checkpoint") != checkpoint_id(files):
        was = calibration.about.get("model", "another checkpoint")
        fix = "measure this one with `cm-export calibrate`"
        raise InputError(f"was measured on other weights than these ({was})", where=where, fix=fix)


def _check(path: Path, arrays: dict[str, np.ndarray], fix: str) -> None:
    sizes: dict[str, int] = {}
    for name, axes in {**_FLOATS, **_INTEGERS}.items():
        array, wanted = arrays[name], np.int32 if name in _INTEGERS else np.float32
        fits = array.dtype == wanted and array.ndim == len(axes)
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, array.shape, strict=True)):
            raise InputError(f"{name} is {array.dtype}{list(array.shape)}, not [{','.join(axes)}]", where=path, fix=fix)
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity", where=path, fix=fix)
    if (np.sort(arrays["order"], axis=1) != np.arange(sizes["F"])).any():
        raise InputError("order is not a permutation of the neurons", where=path, fix=fix)
    if (arrays["energy"] < 0).any():
        raise InputError("energy is negative somewhere", where=path, fix=fix)
