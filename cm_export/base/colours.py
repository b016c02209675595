"""The colours of a picture as a network reads them, in the types and the order of transformers: equal to the last bit.

value of a band, 0 .. 255  ->  (value * rescale - mean) / std          one mean and one std for each of the three bands
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .settings import FIX, flag, is_number, number

if TYPE_CHECKING:
    from PIL import Image

RULE_FILE = "preprocessor_config.json"  # of a checkpoint: how its processor makes pixels of a picture
Bands = tuple[float, ...]
BICUBIC = 3  # of Pillow
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Colours:
    """What becomes of the colours of a picture, and the filter of Pillow by which it is resized."""

    mean: Bands
    std: Bands
    rescale: float
    resample: int

    @classmethod
    def of(cls, processor: Mapping[str, Any], mean: Bands, std: Bands, resample: int) -> Colours:
        """As a preprocessor_config.json says; mean, std and resample stand for what it leaves out. Raises InputError.

        null is no absent key: as in transformers, do_rescale = null rescales nothing, resample = null fails.
        """
        chosen = processor.get("resample", resample)
        if type(chosen) is not int or chosen not in range(6):
            raise InputError(f"resample = {chosen!r} is none of Pillow's filters, 0 to 5", where=RULE_FILE, fix=FIX)
        normalised, rescaled = (flag(processor, f"do_{what}", True, RULE_FILE) for what in ("normalize", "rescale"))
        found = cls(
            of_bands(processor, "image_mean", mean) if normalised else (0.0, 0.0, 0.0),
            of_bands(processor, "image_std", std) if normalised else (1.0, 1.0, 1.0),
            number(processor, "rescale_factor", 1 / 255, RULE_FILE) if rescaled else 1.0,
            chosen,
        )
        if not np.isfinite(found._values()).all():
            what = "image_mean, image_std and rescale_factor make numbers of colours that float32 does not hold"
            raise InputError(what, where=RULE_FILE, fix=FIX)
        return found

    def resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """At this size."""
        return image.resize((width, height), self.resample)

    def read(self, image: Image.Image) -> np.ndarray:
        """A PIL RGB picture as [3,height,width] float32."""
        values, bands = self._values(), np.asarray(image)
        return np.stack([values[:, band][bands[..., band]] for band in range(3)])

    def _values(self) -> np.ndarray:
        """[256,3] float32: what becomes of each value of a band."""
        with np.errstate(all="ignore"):
            scaled = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)[:, None]
            return np.asarray((scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32))


def of_bands(processor: Mapping[str, Any], key: str, default: Bands) -> Bands:
    """One number for each of the three colours, or one for all; a divisor of 0 is refused."""
    value = processor.get(key, default)
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(is_number(v) and (v or key != "image_std") for v in values):
        raise InputError(f"{key} = {value!r} is not three numbers", where=RULE_FILE, fix=FIX)
    return tuple(map(float, values))
