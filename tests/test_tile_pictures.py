"""What the host of SmolVLM, Idefics3 and InternVL makes of pictures equals transformers': tiles, prompts, token ids."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tile_models import MERGE, PATCH, RANDOM, TILE, asked_of, processor_of, rule_of, sized, write_processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from cm_export import families
from cm_export.families import IMAGE
from cm_export.families.idefics3 import bounded, brought_to
from cm_export.host.chat import Chat

names = pytest.mark.parametrize("name", RANDOM)
QUESTION = "what shape is red ?"


def tower_of(name, tile=TILE, patch=PATCH, merge=MERGE):
    return families.find(name).tower(sized(name, RANDOM[name](1), tile, patch, merge))


def noise(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def chat_of(name, folder):
    """The chat of a bundle with these processor files."""

    def processor(file):
        return folder / file if (folder / file).is_file() else None

    shape = SimpleNamespace(sees=True, image_token=5, stop_ids=(2,))
    return Chat(SimpleNamespace(processor=processor, shape=shape, path=folder))


def check_pictures(name, folder, count, largest, tower):
    """`count` generated pictures as the processor makes them: ids of the whole prompt, and pixels within 1e-5."""
    write_processor(name, folder, tower.size, tower.side**2)
    read, theirs, chat = tower.rule(rule_of(name, tower.size)), processor_of(name, folder), chat_of(name, folder)
    rng, worst, tiles = np.random.default_rng(count), 0.0, set()
    for number in range(count):
        sizes = np.exp(rng.uniform(np.log(1), np.log(largest), (1 + number % 2, 2))).astype(int)
        images = [noise(rng, *size) for size in sizes]
        expected = asked_of(theirs, images, QUESTION)
        found = [tower.picture(image, read) for image in images]
        ids = chat.encode(QUESTION, None, [picture.layout for picture in found])
        np.testing.assert_array_equal(ids, expected["input_ids"][0])
        pixels = expected["pixel_values"].numpy().reshape(-1, 3, tower.size, tower.size)
        ours = tower.feeds(found)["pixel_values"]
        assert ours.shape == pixels.shape and ours.dtype == np.float32
        worst = max(worst, float(np.abs(ours - pixels).max()))
        for picture, image in zip(found, images, strict=True):
            assert picture.tokens == len(picture.pixels) * tower.side**2 == picture.layout.text.count(IMAGE)
            width, height = tower.resized(image.size, read)
            assert picture.grid == (1, height // tower.size * tower.side, width // tower.size * tower.side)
            tiles.add(len(picture.pixels))
    assert worst <= 1e-5
    assert len(tiles) > 2, "pictures of several numbers of tiles"


@names
def test_pictures_and_prompts_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 10, 300, tower_of(name))


@pytest.mark.wide
@names
def test_200_pictures_and_prompts_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 200, 1200, tower_of(name))


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("smolvlm", (384, 14, 3)), ("smolvlm", (512, 16, 4)), ("idefics3", (364, 14, 2)), ("internvl", (448, 14, 2))],
)
def test_so_are_tiles_of_the_published_sizes(name, sizes, tmp_path):
    check_pictures(
        name, tmp_path, 12, 3000, tower_of(name, **dict(zip(("tile", "patch", "merge"), sizes, strict=True)))
    )


RULES = [
    ("smolvlm", {"do_image_splitting": False}),
    ("smolvlm", {"size": {"longest_edge": TILE}}),  # one tile
    ("idefics3", {"size": {"longest_edge": 3 * TILE + 5}, "do_normalize": False}),
    ("smolvlm", {"do_resize": False, "resample": 3, "do_rescale": False}),
    ("internvl", {"min_patches": 4, "max_patches": 6, "do_resize": False, "rescale_factor": 0.01}),
    ("internvl", {"max_patches": 1}),
]


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_other_rules_are_followed_as_well(name, rule, tmp_path):
    check_rule(name, tmp_path, rule, 6, 120)


def check_rule(name, folder, rule, count, largest):
    tower = tower_of(name)
    write_processor(name, folder, TILE, tower.side**2, **rule)
    read, theirs, chat = tower.rule(rule_of(name, TILE, **rule)), processor_of(name, folder), chat_of(name, folder)
    rng = np.random.default_rng(count)
    for size in [*rng.integers(1, largest, (count, 2)).tolist(), (1, largest), (3 * largest, 1), (TILE, TILE)]:
        image = noise(rng, *size)
        expected, found = asked_of(theirs, [image], QUESTION), tower.picture(image, read)
        np.testing.assert_array_equal(chat.encode(QUESTION, None, [found.layout]), expected["input_ids"][0])
        pixels = expected["pixel_values"].numpy().reshape(-1, 3, TILE, TILE)
        np.testing.assert_allclose(found.pixels, pixels, rtol=0, atol=1e-5)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 5000))
def test_sizes_of_any_picture_are_those_of_transformers(width, height, longest):
    """Up to the bound of 4096 pixels, and the many roundings on the way to whole tiles."""
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = get_resize_output_image_size(image, longest)
    assert bounded(brought_to((width, height), longest)) == expected[::-1]
    rule = tower_of("smolvlm").rule(rule_of("smolvlm", TILE, size={"longest_edge": longest}))
    asked = []
    stub = SimpleNamespace(resize=lambda _, size, resample: asked.append((size.width, size.height)))
    SmolVLMImageProcessorPil.resize_for_vision_encoder(stub, np.broadcast_to(np.uint8(0), (3, *expected)), TILE)
    assert rule.canvas((width, height), TILE) == [expected[::-1], *asked]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 4), st.integers(1, 14))
def test_grids_of_tiles_are_those_of_transformers(width, height, least, most):
    rule = tower_of("internvl").rule(rule_of("internvl", TILE, min_patches=least, max_patches=most))
    expected = get_optimal_tiled_canvas((height, width), (TILE, TILE), least, most) if most > 1 else (1, 1)
    assert rule.grid((width, height), TILE) == expected
