"""What the host of SmolVLM, Idefics3 and InternVL makes of pictures equals transformers': tiles, prompts, token ids."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tile_models import RANDOM, asked_of, processor_of, rule_of, write_processor

from cm_export import families
from cm_export.families import IMAGE
from cm_export.host.chat import Chat

names = pytest.mark.parametrize("name", RANDOM)
TILE, PATCH, MERGE = 28, 7, 2  # 2 x 2 image tokens a tile
QUESTION = "what shape is red ?"


def config_of(name, tile=TILE, patch=PATCH, merge=MERGE):
    """A configuration with tiles of these sizes."""
    config = RANDOM[name](1)
    both = [tile] * 2, [patch] * 2
    size, cut = both if name == "internvl" else (tile, patch)
    config["vision_config"] |= {"image_size": size, "patch_size": cut}
    return config | ({"downsample_ratio": 1 / merge} if name == "internvl" else {"scale_factor": merge})


def tower_of(name, **sizes):
    return families.find(name).tower(config_of(name, **sizes))


def noise(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def chat_of(name, folder):
    """The chat of a bundle with these processor files."""

    def processor(file):
        return folder / file if (folder / file).is_file() else None

    shape = SimpleNamespace(sees=True, image_token=5, stop_ids=(2,))
    return Chat(SimpleNamespace(processor=processor, shape=shape, path=folder))


def check_pictures(name, folder, count, largest, **rule):
    """`count` generated pictures as the processor makes them: ids of the whole prompt, and pixels within 1e-5."""
    tower = tower_of(name)
    write_processor(name, folder, TILE, tower.side**2, **rule)
    read, theirs, chat = tower.rule(rule_of(name, TILE, **rule)), processor_of(name, folder), chat_of(name, folder)
    rng, worst, tiles = np.random.default_rng(count), 0.0, set()
    for number in range(count):
        sizes = np.exp(rng.uniform(np.log(1), np.log(largest), (1 + number % 2, 2))).astype(int)
        images = [noise(rng, *size) for size in sizes]
        expected = asked_of(theirs, images, QUESTION)
        found = [tower.picture(image, read) for image in images]
        ids = chat.encode(QUESTION, None, [picture.layout for picture in found])
        np.testing.assert_array_equal(ids, expected["input_ids"][0])
        pixels = expected["pixel_values"].numpy().reshape(-1, 3, TILE, TILE)
        ours = tower.feeds(found)["pixel_values"]
        assert ours.shape == pixels.shape and ours.dtype == np.float32
        worst = max(worst, float(np.abs(ours - pixels).max()))
        for picture, image in zip(found, images, strict=True):
            assert picture.tokens == len(picture.pixels) * tower.side**2 == picture.layout.text.count(IMAGE)
            width, height = tower.resized(image.size, read)
            assert picture.grid == (1, height // TILE * tower.side, width // TILE * tower.side)
            tiles.add(len(picture.pixels))
    assert worst <= 1e-5
    assert len(tiles) > min(4, count // 4), "pictures of several numbers of tiles"


@names
def test_pictures_and_prompts_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 10, 300)


@pytest.mark.wide
@names
def test_200_pictures_and_prompts_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 200, 1200)


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


def test_no_side_of_a_picture_is_above_4096_pixels(tmp_path):
    check_rule("smolvlm", tmp_path, {"size": {"longest_edge": 5000}}, 0, 300)
