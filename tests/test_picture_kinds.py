"""Pictures of uncommon kinds: pipes, values of few bits, animations that begin empty, and what is said about them."""

import os
import struct
import subprocess
import sys
import threading
import zlib
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_export.base.errors import InputError
from cm_export.base.paths import expanded
from cm_export.families.qwen2_vl import Qwen2VLTower
from cm_export.host import picture_source
from cm_export.host.images import check_size, given, open_image, opened, opened_standard_input
from cm_export.host.picture_notes import Note, counted, line, on_size

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
TOWER = Qwen2VLTower(
    {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "hidden_size": 8}
    | {"in_channels": 3}
)


def _said(path: Path) -> list[str]:
    return [note.text for note in opened(path).notes]


def _halves(size=(40, 30)) -> Image.Image:
    """Left half red, right half white."""
    image = Image.new("RGB", size, RED)
    image.paste(WHITE, (size[0] // 2, 0, *size))
    return image


def _png(values: np.ndarray, significant: int = 0, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits of [H,W,bands]; `significant`: its chunk sBIT, `clear`: its chunk tRNS."""
    height, width, bands = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head)]
        + ([chunk(b"sBIT", bytes([significant] * bands))] if significant else [])
        + ([chunk(b"tRNS", clear)] if clear else [])
        + [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def _ramp(bits: int, bands: int, high: int = 0) -> np.ndarray:
    """[8,16,bands] values of 0 up to the largest of so many bits, or to `high`; opacity is full."""
    values = np.linspace(0, high or 2**bits - 1, 128).round().astype(int).reshape(8, 16, 1).repeat(bands, 2)
    if bands in (2, 4):
        values[..., -1] = 2**bits - 1
    return values


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_values_of_few_bits_in_16_are_shown_from_black_to_white_and_said(tmp_path, bits, bands):
    values = _ramp(bits, bands)
    (tmp_path / "x.png").write_bytes(_png(values))
    shown = np.asarray(open_image(tmp_path / "x.png")).astype(int)
    exact = values[..., :1] * 255 / (2**bits - 1)
    rounded = (
        0.5 if bits < 16 or bands == 1 else 1.0
    )  # of 16-bit colour Pillow reads the upper bytes, as transformers does
    assert np.abs(shown - exact).max() <= rounded
    said = [f"its 16-bit values end at {2**bits - 1} of 65535, so they are read as {bits} bits"] if bits < 16 else []
    assert _said(tmp_path / "x.png") == said


def _tiff(values: np.ndarray, packed: bool) -> bytes:
    """A TIFF of 16 bits of [H,W,bands], little-endian, one strip; `packed`: deflated, which libtiff reads, not Pillow."""
    height, width, bands = values.shape
    data = values.astype("<u2").tobytes()
    data = zlib.compress(data) if packed else data
    bits = struct.pack("<HHHH", 16, 16, 16, 0)
    tags = {256: width, 257: height, 258: 8 if bands == 3 else 16, 259: 8 if packed else 1, 262: 2 if bands == 3 else 1}
    tags |= {273: 16, 277: bands, 278: height, 279: len(data)}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, bands if tag == 258 else 1, value)
        for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<I", 16 + len(data)) + bits + data + struct.pack("<H", 9) + entries + bytes(4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_tiff_of_12_bits_in_16_is_not_black(tmp_path, bands, packed):
    values = _ramp(12, bands)
    (tmp_path / "x.tif").write_bytes(_tiff(values, packed))
    shown = np.asarray(open_image(tmp_path / "x.tif")).astype(int)
    assert np.abs(shown - values[..., :1] * 255 / 4095).max() <= 0.5


def test_bits_that_the_file_states_are_believed_without_a_remark(tmp_path):
    dim = _ramp(12, 1, high=900)  # would be taken for 10 bits
    (tmp_path / "x.png").write_bytes(_png(dim, significant=12))
    Image.fromarray(dim[..., 0].astype(np.uint16)).save(tmp_path / "x.tif", tiffinfo={281: 4095})
    for name in ("x.png", "x.tif"):
        assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - dim * 255 / 4095).max() <= 0.5
        assert _said(tmp_path / name) == []


def test_stated_bits_that_the_values_exceed_are_those_of_values_already_scaled_up(tmp_path):
    (tmp_path / "x.png").write_bytes(_png(_ramp(16, 1), significant=12))
    assert np.asarray(open_image(tmp_path / "x.png")).max() == 255
    assert _said(tmp_path / "x.png") == []


def test_a_16_bit_picture_of_a_quarter_of_the_brightness_stays_so_and_is_said_to_be_dark(tmp_path):
    (tmp_path / "x.png").write_bytes(_png(_ramp(16, 1, high=16000)))
    assert np.asarray(open_image(tmp_path / "x.png")).max() == 62
    assert "is dark: its 16-bit values end at 16000" in _said(tmp_path / "x.png")[0]


def test_the_transparent_value_of_16_bit_grey_lies_over_white(tmp_path):
    values = np.array([[[0], [30000], [65535]]])
    (tmp_path / "x.png").write_bytes(_png(values, clear=struct.pack(">H", 30000)))
    assert np.asarray(open_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(("values", "word"), [(np.int32([[-5, 9]]), "below 0"), (np.int32([[0, 70000]]), "32 bits")])
def test_values_that_are_no_16_bits_are_refused(tmp_path, values, word):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=word):
        open_image(tmp_path / "x.tif")


def test_every_spelling_of_16_bit_grey_in_memory_is_the_same_picture():
    values = _ramp(12, 1)[..., 0].astype(np.uint16)
    expected = np.asarray(given(Image.fromarray(values), "x").image)
    assert expected.max() == 255
    big = Image.frombytes("I;16B", (16, 8), values.astype(">u2").tobytes())
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    for image in (big, wide):
        np.testing.assert_array_equal(np.asarray(given(image, "x").image), expected)


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
@pytest.mark.parametrize("blank", [(0, 0, 0, 0), (*BLACK, 255)])
def test_an_animation_that_begins_empty_gives_its_first_frame_with_content_and_says_so(tmp_path, suffix, blank):
    frames = [Image.new("RGBA", (40, 30), blank)] * 2 + [_halves().convert("RGBA")]
    frames[1] = Image.new("RGBA", (40, 30), "white")
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        number = image.n_frames  # writers join equal frames
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"x.{suffix}")), np.asarray(_halves()))
    said = f"has several frames, of which number {number} is read, since those before it show one colour only"
    assert _said(tmp_path / f"x.{suffix}") == [said]


def test_an_animation_that_shows_nothing_anywhere_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (BLACK, WHITE, RED)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "x.gif").getpixel((0, 0)) == BLACK
    first, second = _said(tmp_path / "x.gif")
    assert "the first is read: all of them show one colour only" in first and second == "shows one colour only, #000000"


def test_an_animation_damaged_after_its_first_frame_gives_the_first_and_says_so(tmp_path):
    noise = [Image.effect_noise((60, 60), 90 + i) for i in range(3)]
    Image.new("RGB", (60, 60)).save(tmp_path / "x.png", save_all=True, append_images=noise)
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 6])  # within the second frame
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == BLACK
    assert "what follows is damaged" in _said(tmp_path / "x.png")[0]


def test_the_search_of_an_animation_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("cm_export.host.images._SEARCHED_PIXELS", 250)
    frames = [Image.new("RGB", (10, 10), (i, i, i)) for i in range(0, 90, 9)] + [_halves((10, 10))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "x.gif").getpixel((0, 0)) == BLACK
    assert "the first is read: it and 2 after it show one colour only" in _said(tmp_path / "x.gif")[0]


def test_pages_are_told_and_the_depth_map_of_a_photo_is_not(tmp_path):
    _halves().save(tmp_path / "x.tif", save_all=True, append_images=[_halves()])
    assert _said(tmp_path / "x.tif") == ["has several pages, of which the first is read"]
    _halves().save(tmp_path / "x.mpo", save_all=True, append_images=[_halves()])
    assert _said(tmp_path / "x.mpo") == []


# ---------------------------------------------------------------- remarks


def test_a_picture_of_one_colour_is_told_and_an_ordinary_one_is_not(tmp_path):
    Image.new("RGB", (9, 9), (128, 0, 255)).save(tmp_path / "one.png")
    Image.new("RGBA", (9, 9), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.tile(np.uint8([[100, 102]]), (9, 5))).save(tmp_path / "nearly.png")
    _halves().save(tmp_path / "x.png")
    assert _said(tmp_path / "one.png") == ["shows one colour only, #8000ff"]
    assert _said(tmp_path / "clear.png") == ["shows one colour only, #ffffff"]
    assert _said(tmp_path / "nearly.png")[0].startswith("shows nearly one colour, #656565")
    assert _said(tmp_path / "x.png") == []


def test_a_picture_that_is_nearly_black_is_told(tmp_path):
    Image.fromarray(_ramp(16, 3, high=16).astype(np.uint8)).save(tmp_path / "x.png")
    assert _said(tmp_path / "x.png") == ["is nearly black: no value of it is above 16 of 255"]
    Image.fromarray(_ramp(5, 3).astype(np.uint8)).save(tmp_path / "x.png")
    assert _said(tmp_path / "x.png") == []


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((8, 8), "8x8 pixels are enlarged 7 times, to 56x56"),
        ((1, 200), "1x200 pixels are enlarged 28 and 4.06 times, to 28x812"),
        ((14, 14), "14x14 pixels are enlarged 4 times, to 56x56"),
        ((15, 15), None),
        ((3000, 2000), None),
    ],
)
def test_a_picture_that_is_enlarged_many_times_is_told(size, said):
    notes = on_size(Image.new("RGB", size), TOWER, TOWER.rule({}))
    assert [note.text for note in notes] == ([said] if said else [])


def test_remarks_on_many_pictures_are_counted(tmp_path):
    notes = {}
    for number in range(50):
        path = tmp_path / f"{number:02}.png"
        (Image.new("RGB", (9, 9)) if number % 2 else _halves()).save(path)
        notes[path.name] = opened(path).notes
    assert counted(notes, 50) == ["pictures of one colour: 25 of 50, such as 01.png: shows one colour only, #000000"]


def test_a_remark_is_one_line_whatever_the_name_of_the_file(tmp_path):
    note = Note("text", "kind")
    assert line("a\nb\x1b[31m\udcff ü.png", note) == "a\ufffdb\ufffd[31m\ufffd ü.png: text"
    assert "\n" not in counted({"a\nb": [note]}, 1)[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_the_tower_of_qwen2_vl_takes_every_size_that_its_processor_takes(size):
    check_size(Image.new("RGB", size), TOWER.min_side, TOWER.max_ratio)
    picture = TOWER.picture(Image.new("RGB", size), TOWER.rule({}))
    assert picture.tokens >= 4 and TOWER.resized(size, TOWER.rule({})) == tuple(28 * n for n in picture.grid[:0:-1])


def test_damaged_exif_data_does_not_cost_the_picture(tmp_path):
    _halves().save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), np.asarray(_halves()))


# ---------------------------------------------------------------- what a program hands over


def test_what_a_program_hands_over_is_the_same_picture_in_every_form(tmp_path):
    _halves().save(tmp_path / "x.png")
    expected = np.asarray(_halves())
    forms = [_halves(), _halves().convert("RGBA"), _halves().convert("P"), expected, expected[::1], tmp_path / "x.png"]
    forms += [str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), Image.open(tmp_path / "x.png")]
    for form in [*forms, given(_halves(), "x")]:
        np.testing.assert_array_equal(np.asarray(given(form, "x").image), expected)
    assert given(Image.new("L", (9, 9)), "picture 3").name == "picture 3"


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (3, "int is not taken"),
        (np.zeros((4, 4)), "float64"),
        (b"", "is empty"),
        (b"x" * 9, "not a picture"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (5, 5)), "float"),
    ],
)
def test_what_is_no_picture_is_refused_by_the_name_that_it_was_given(what, word):
    with pytest.raises(InputError, match=f"picture 2: .*{word}"):
        given(what, "picture 2")


def test_a_picture_whose_file_was_closed_before_it_was_read_is_named(tmp_path):
    _halves().save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pass
    with pytest.raises(InputError, match="its file was closed"):
        given(image, "picture 1")


def test_a_program_that_hands_over_an_unturned_photo_gets_it_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    _halves().save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as image:
        assert given(image, "x").image.size == (30, 40)


# ---------------------------------------------------------------- pipes, standard input, home directories


def _bytes_of_a_picture() -> bytes:
    data = BytesIO()
    _halves().save(data, "PNG")
    return data.getvalue()


def test_a_picture_comes_through_a_named_pipe_however_slowly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    data = _bytes_of_a_picture()

    def write() -> None:
        threading.Event().wait(0.3)  # the reader is there first
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            for part in (data[:20], data[20:]):
                threading.Event().wait(0.2)
                pipe.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    image = open_image(tmp_path / "pipe")
    writer.join()
    np.testing.assert_array_equal(np.asarray(image), np.asarray(_halves()))


def test_a_pipe_that_is_already_closed_is_read_as_process_substitution_gives_it():
    read, write = os.pipe()
    os.write(write, _bytes_of_a_picture())
    os.close(write)
    assert open_image(f"/dev/fd/{read}").size == (40, 30)
    os.close(read)


def test_a_pipe_that_nobody_writes_into_is_refused_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_source, "WAIT_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"nothing was written into it for 0\.1 seconds"):
        open_image(tmp_path / "pipe")


def test_a_stream_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(picture_source, "PIPE_BYTES", 2**21)
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        with pytest.raises(InputError, match="more than 2 MiB"):
            open_image(f"/dev/fd/{endless.stdout.fileno()}")
        endless.kill()


def test_standard_input_is_read_and_a_closed_or_empty_one_is_named(monkeypatch):
    for data, word in ((_bytes_of_a_picture(), None), (b"", "standard input: is empty"), (b"x" * 9, "standard input")):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(data)))
        if word is None:
            assert opened_standard_input().image.size == (40, 30)
        else:
            with pytest.raises(InputError, match=word):
                opened_standard_input()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input: is closed"):
        opened_standard_input()


def test_the_home_directory_is_found_and_nobodys_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _halves().save(tmp_path / "x.png")
    assert open_image("~/x.png").size == (40, 30)
    for use in (open_image, expanded):
        with pytest.raises(InputError, match="no home directory is known for ~no-such-user") as error:
            use("~no-such-user/x.png")
        assert "\n" not in str(error.value)


OTHERS = {
    "an HTML page": b"\n<!doctype html><title>404</title>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
    "an SVG drawing": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "an XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a PDF": b"%PDF-1.7\n",
    "a HEIC photo, which is not read": b"\0\0\0\x18ftypheic\0\0\0\0",
    "a TIFF that is truncated": b"II*\0\x08\0",
    "a picture whose beginning is damaged": b"\x89PNG\r\n\x1a\n\0",
    "a video": b"\0\0\0\x18ftypisom\0\0\0\0",
    "an archive": b"PK\x03\x04\0\0",
    "base64": b"iVBORw0KGgoAAAANSUhEUgAA",
    "nothing but zero bytes": bytes(600),
    "text": "Grüße".encode(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_picture_is_called_what_it_is(tmp_path, what):
    (tmp_path / "x.png").write_bytes(OTHERS[what])
    with pytest.raises(InputError, match=f"x.png: is (not a picture that can be read: it is )?.*{what}") as error:
        open_image(tmp_path / "x.png")
    assert error.value.fix and "\n" not in str(error.value)


def test_a_postscript_drawing_is_not_given_to_the_program_that_draws_it(tmp_path):
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"%!PS-Adobe-3.0\n"):
        (tmp_path / "x.eps").write_bytes(data)
        with pytest.raises(InputError, match=r"format EPS, of which no pixels|a PostScript drawing"):
            open_image(tmp_path / "x.eps")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_a_device_is_refused(name):
    with pytest.raises(InputError, match="is a device"):
        open_image(name)


@pytest.mark.parametrize(("name", "word"), [("a" * 5000, "cannot be found"), ("a\0b", "no such file"), ("", "empty")])
def test_a_path_that_cannot_be_one_is_refused(name, word):
    with pytest.raises(InputError, match=word):
        open_image(name)


def test_a_bomb_is_refused_with_its_figure_and_the_scale_that_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    for height, pixels, scale in ((1_600, 1.6, 79), (16_000, 16, 25)):
        Image.new("L", (1000, height)).save(tmp_path / "x.png")
        with pytest.raises(InputError, match=rf"more than 1 million .*it has {pixels} million.*scale it to {scale} %"):
            open_image(tmp_path / "x.png")
