"""Which pictures are accepted and what they become, and the drawing of kept image tokens."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_export.base.errors import InputError
from cm_export.host import picture_source
from cm_export.host.images import check_size, open_image
from cm_export.host.overlay import ACCENT, check_output, draw_overlay

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _refused(path: object, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def _picture(width=40, height=30) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_common_formats_become_rgb(tmp_path, suffix):
    _picture().save(tmp_path / f"x.{suffix}")
    image = open_image(tmp_path / f"x.{suffix}")
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image, int)[15, 5] - RED).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    source = Image.new("I;16", (9, 9), 65535) if mode == "I;16" else Image.new("RGB", (9, 9), "white").convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_float_pixels_are_refused_because_their_range_is_unknown(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
    _refused(tmp_path / "x.tiff", "float")


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(0, 0, 0, 0), (*RED, 255), (0, 0, 0, 128)]):
        image.putpixel((x, 0), pixel)
    image.save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png"))[0].tolist() == [[255, 255, 255], [255, 0, 0], [127, 127, 127]]


def test_a_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "x.png"))[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    _picture(40, 30).save(tmp_path / "x.png", exif=exif)
    image = open_image(tmp_path / "x.png")
    assert image.size == (30, 40)
    assert (image.getpixel((15, 2)), image.getpixel((15, 37))) == (RED, BLUE)  # left became top


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for suffix in ("gif", "webp", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f"x.{suffix}").getpixel((4, 4)) == RED


@pytest.mark.parametrize("url", ["https://example.org/x.png", "file:///x.png", "s3://a/b.png", "data:image/png,A"])
def test_a_url_is_not_fetched(url):
    _refused(url, "not fetched", "download")


def test_paths_that_hold_no_picture_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_source, "WAIT_SECONDS", 0.2)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "none.png", "no such file")
    _refused(tmp_path, "directory")
    _refused(tmp_path / "empty.png", "is empty")
    _refused(tmp_path / "text.png", "not a picture")
    _refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_truncated_picture_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
    whole = (tmp_path / f"x.{suffix}").read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9):
        (tmp_path / f"x.{suffix}").write_bytes(whole[: int(share * len(whole))])
        _refused(tmp_path / f"x.{suffix}", f"x.{suffix}")


def test_a_decompression_bomb_is_refused_from_the_first_pixel_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    Image.new("L", (2000, 1000)).save(tmp_path / "ok.png")
    open_image(tmp_path / "ok.png")
    for height in (1001, 5000):  # Pillow alone only warns below twice the limit
        Image.new("L", (2000, height)).save(tmp_path / "x.png")
        _refused(tmp_path / "x.png", "more than 2 million pixels")


@pytest.mark.parametrize(
    ("size", "word"),
    [((1, 1), "1x1"), ((27, 100), "at least 28"), ((28, 5601), "too long and thin")],
)
def test_sizes_that_cannot_become_patches_are_refused(size, word):
    with pytest.raises(InputError, match=word):
        check_size(Image.new("L", size), min_side=28, max_ratio=200)


@pytest.mark.parametrize("size", [(28, 28), (28, 5600), (5600, 28)])
def test_sizes_at_the_limit_are_accepted(size):
    check_size(Image.new("L", size), min_side=28, max_ratio=200)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_overlay_shows_kept_patches_as_they_are_and_dims_the_others(tmp_path, suffix):
    kept = np.zeros((4, 4), bool)
    kept[1, 2] = True
    path = draw_overlay(Image.new("RGB", (64, 64), "white"), kept, tmp_path / f"o.{suffix}")
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    assert drawn.shape == (512, 512, 3)
    cells = drawn.reshape(4, 128, 4, 128, 3)[:, 40:90, :, 40:90].mean((1, 3, 4))
    assert cells[1, 2] > 250
    assert cells[~kept].max() < 128
    assert np.abs(drawn[128:256, 256:258] - ACCENT).max() < (3 if suffix == "png" else 90)  # outline at its left edge


def test_a_caption_is_written_below_the_picture(tmp_path):
    picture = Image.new("RGB", (64, 64), "white")
    plain = draw_overlay(picture, np.ones((4, 4), bool), tmp_path / "a.png")
    captioned = draw_overlay(picture, np.ones((4, 4), bool), tmp_path / "b.png", "word " * 500)
    with Image.open(plain) as a, Image.open(captioned) as b:
        assert a.size == (512, 512) and b.width == 512
        assert 512 < b.height < 700  # long captions are cut


@pytest.mark.parametrize("size", [(20, 2000), (3000, 100), (5000, 4000), (700, 500)])
def test_the_overlay_has_a_size_that_can_be_looked_at(tmp_path, size):
    with Image.open(draw_overlay(Image.new("RGB", size), np.eye(7, 5, dtype=bool), tmp_path / "o.png")) as image:
        assert 500 <= max(image.size) <= 2100


def test_an_overlay_path_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    for path, word in [("x.pdf", "use .png"), ("x", "suffix"), ("no/x.png", "no directory")]:
        with pytest.raises(InputError, match=word):
            check_output(tmp_path / path)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        check_output(tmp_path / "d.png")


def test_an_overlay_may_have_the_longest_name_and_a_longer_one_is_refused_before_any_work(tmp_path):
    draw_overlay(_picture(), np.eye(3, dtype=bool), tmp_path / ("x" * 251 + ".png"))
    with pytest.raises(InputError, match="too long"):
        check_output(tmp_path / ("x" * 252 + ".png"))


def test_a_failed_overlay_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "o.png"
    path.write_bytes(b"old")

    def fail(self, file, **_options):
        file.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match="disk full"):
        draw_overlay(_picture(), np.eye(3, dtype=bool), path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["o.png"]
    assert path.read_bytes() == b"old"
