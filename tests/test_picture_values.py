"""From the file to `pixel_values`: every picture equals what the PIL variant of transformers' own processor makes of it."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from cm_export.families import qwen2_vl as family
from cm_export.host.images import opened

PAGE = (Path(__file__).parent.parent / "docs/pictures.md").read_text()
PICTURES = 240
# Modes as files hold them, and a format that keeps them.
KINDS = [("1", "png"), ("L", "png"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("RGB", "png"), ("RGBA", "png")]
KINDS += [("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "bmp")]
KINDS += [("CMYK", "tif"), ("YCbCr", "tif"), ("RGBA", "tif"), ("PA", "png")]


def _size(rng: np.random.Generator) -> tuple[int, int]:
    short = int(rng.integers(1, 80))
    long = min(int(short * np.exp(rng.uniform(0, np.log(200)))), 200 * short, 2500)
    return (short, max(short, long)) if rng.random() < 0.5 else (max(short, long), short)


def _saved(rng: np.random.Generator, folder: Path, mode: str, suffix: str) -> Path:
    width, height = _size(rng)
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
    if mode == "P" and rng.random() < 0.5:
        image, options = rgba.convert("RGB").convert("P"), {"transparency": int(rng.integers(256))}
    else:
        image, options = rgba.convert("RGB").convert("L").convert("LA") if mode == "PA" else rgba, {}
        image = rgba.convert(mode) if mode in ("LA", "RGBA", "RGB", "L") else rgba.convert("RGB").convert(mode[:5])
    if mode == "PA":
        image = rgba.quantize(32, Image.Quantize.FASTOCTREE)  # a palette whose colours have an opacity each
    if rng.random() < 0.3 and suffix in ("jpg", "png", "webp"):
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options["exif"] = exif
    image.save(folder / f"x.{suffix}", **options)
    return folder / f"x.{suffix}"


def test_pixel_values_differ_from_transformers_by_no_more_than_the_page_says(tmp_path):
    stated = float(re.search(r"largest difference of `pixel_values`: \*\*([\d.e-]+)\*\*", PAGE)[1])
    assert f"{PICTURES} generated pictures" in PAGE
    rng, worst, seen = np.random.default_rng(7), 0.0, set()
    for number in range(PICTURES):
        path = _saved(rng, tmp_path, *KINDS[number % len(KINDS)])
        patch = int(rng.choice([2, 4, 14]))
        rule = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "resample": int(rng.choice([1, 2, 3]))}
        rule |= {"min_pixels": 16 * patch**2, "max_pixels": int(rng.choice([60, 4000])) * patch**2}
        with Image.open(path) as image:
            seen.add(image.mode)
            expected = Qwen2VLImageProcessorPil(**rule)([ImageOps.exif_transpose(image)], return_tensors="np")
        pixels, grid = family.patchify([opened(path).image], family.image_rule(rule))
        np.testing.assert_array_equal(grid, expected["image_grid_thw"])
        assert pixels.dtype == expected["pixel_values"].dtype == np.float32
        worst = max(worst, float(np.abs(pixels - expected["pixel_values"]).max()))
    assert seen >= {"1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"}
    assert worst <= stated, f"differs by {worst:.3g}"


def test_sizes_after_the_resize_equal_those_of_transformers_and_the_same_pictures_are_refused():
    rng = np.random.default_rng(3)
    for _ in range(3000):
        size = [int(np.exp(rng.uniform(0, np.log(9000)))) for _ in range(2)]
        patch, low = int(rng.choice([4, 14, 16])), int(np.exp(rng.uniform(0, 12)))
        rule = family.ImageRule(patch=patch, min_pixels=low, max_pixels=low * int(rng.integers(1, 60)))
        try:
            expected = smart_resize(*size, 2 * patch, rule.min_pixels, rule.max_pixels)
        except ValueError:
            expected = None
        try:
            found = family.target_size(*size, rule)
        except family.InputError:
            found = None
        assert found == expected, (size, rule)
