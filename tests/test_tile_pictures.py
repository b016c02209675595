"""What the host of SmolVLM, Idefics3 and InternVL makes of pictures equals transformers': tiles, prompts, token ids."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_models import random_config
from tile_models import (
    MERGE,
    PATCH,
    PUBLISHED,
    RANDOM,
    TILE,
    asked_of,
    processor_of,
    published,
    rule_of,
    sized,
    write_processor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.families import IMAGE
from cm_export.families.idefics3 import bounded, brought_to
from cm_export.host.chat import Chat
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf

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

    shape = SimpleNamespace(sees=True, image_token=5, clip_token=-1, seen_tokens=frozenset({5}), stop_ids=(2,))
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


@names
@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 3), (1, 1)])
def test_an_image_token_covers_the_cell_that_its_layout_names(name, rows, columns):
    """A picture in which every cell has a colour of its own: the pixels of a token have the colour of its cell."""
    if (rows, columns) == (1, 1) and name != "internvl":
        return  # every picture is brought to four tiles
    tower = tower_of(name)
    high, wide, cell = rows * tower.side, columns * tower.side, TILE // tower.side
    colours = np.random.default_rng(rows).integers(0, 256, (high, wide, 3), np.uint8)
    image = Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))
    found = tower.picture(image, tower.rule(rule_of(name, TILE, image_mean=[0] * 3, image_std=[1] * 3)))
    assert found.grid == (1, high, wide)
    tokens = found.pixels.reshape(-1, 3, tower.side, cell, tower.side, cell).transpose(0, 2, 4, 1, 3, 5)
    tokens = tokens.reshape(found.tokens, 3, -1) * 255
    cells = np.array(found.layout.cells)
    covers = cells >= 0
    assert sorted(cells[covers].tolist()) == list(range(high * wide)), "every cell once"
    expected = colours.reshape(-1, 3)[cells[covers]][:, :, None]
    np.testing.assert_allclose(tokens[covers], np.broadcast_to(expected, tokens[covers].shape), atol=1e-3)
    assert (~covers).sum() == (tower.side**2 if rows * columns > 1 else 0), "the thumbnail's cover none"


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


# ---------------------------------------------------------------- published checkpoints
# Bytes of memory that a further tile takes in ONNX Runtime's vision graph, measured with two layers of each tower.
MEASURED = {
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 57e6,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 64e6,
    "OpenGVLab/InternVL3-1B-hf": 112e6,
}


def normalised(name, folder, small=False):
    (folder / "config.json").write_text(json.dumps(published(name, small)))
    config = hf.read_config(folder)
    return families.find(config["model_type"]), config


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_sizes_of_the_model_and_memory_without_its_weights(name, tmp_path):
    family, config = normalised(name, tmp_path)
    family.check_config(config)
    shape, tower = family.shape(config), family.tower(config)
    assert shape.weights == pytest.approx(1e9 * PUBLISHED[name][1], rel=1e-3)
    assert (shape.position_axes, shape.image_token, tower.hidden) == (1, config["image_token_id"], shape.hidden)
    one, several = (tower.sized(tower.side**2 * n, np.random.default_rng(0))[0] for n in (1, 5))
    assert tower.memory(several) == 5 * tower.memory(one)
    if name in MEASURED:
        assert MEASURED[name] < tower.memory(one) < 1.5 * MEASURED[name]
    fused, plain = (tower.engine_memory(13 * tower.patches, fused) for fused in (True, False))
    assert 1e8 < fused < plain < 4e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_engines_take_the_largest_picture_of_its_processor_and_a_question(name, tmp_path):
    family, config = normalised(name, tmp_path)
    shape, tower = family.shape(config), family.tower(config)
    rule = tower.rule(rule_of(config["model_type"], tower.size))
    tiles, tokens = 0, 0
    for size in itertools.product((400, 900, 1200, 4000), repeat=2):
        width, height = (n // tower.size for n in tower.resized(size, rule))
        placed = tower.layout(height, width)
        tiles, tokens = max(tiles, placed.tokens // tower.side**2), max(tokens, placed.tokens)
    assert tiles in (13, 17)
    engine = Recipe().for_model(shape).engine
    assert tower.axis_ranges(engine.max_patches)["tiles"][2] >= tiles
    assert engine.max_prompt >= tokens + 512 and engine.capacity >= engine.max_prompt + 2048
    chosen = Recipe().replace(engine__max_prompt=300).for_model(shape).engine
    assert (chosen.max_prompt, chosen.max_patches) == (300, 4096), "what somebody chose stays"
    least = tower.axis_ranges(1)["tiles"]
    assert least[2] == max(len(p.pixels) for p in tower.probes(np.random.default_rng(0))), "the proofs' pictures fit"


@names
def test_without_a_rule_tiles_have_the_size_of_the_tower(name):
    tower = tower_of(name)
    found = tower.picture(noise(np.random.default_rng(0), 90, 40), tower.rule({}))
    assert found.pixels.shape[1:] == (3, TILE, TILE) and len(found.pixels) > 3


WRONG = {
    "another rule": ("smolvlm", {"image_processor_type": "Qwen2VLImageProcessor"}, "cuts pictures in another way"),
    "tiles of another size": ("smolvlm", {"max_image_size": {"longest_edge": 30}}, "max_image_size"),
    "a size that is no edge": ("idefics3", {"size": {"height": 3, "width": 4}}, "size = "),
    "no number of pixels": ("idefics3", {"size": {"longest_edge": "64"}}, "size = "),
    "tiles that are not square": ("internvl", {"size": {"height": TILE, "width": 30}}, "size = "),
    "tiles without end": ("internvl", {"max_patches": 10**9}, "more than 1000 tiles"),
    "a broken number": ("internvl", {"max_patches": 1.5}, "max_patches"),
    "no filter": ("internvl", {"resample": 9}, "resample"),
    "no division": ("smolvlm", {"image_std": [0.5, 0, 0.5]}, "image_std"),
    "cropped": ("smolvlm", {"do_center_crop": True}, "do_center_crop"),
    "no tiles": ("internvl", {"max_patches": 1, "do_resize": False}, "do_resize"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_picture_rule_that_is_not_followed_is_refused_and_named(case):
    name, rule, said = WRONG[case]
    with pytest.raises(InputError, match=said):
        tower_of(name).rule(rule_of(name, TILE, **rule))


NOT_EXPORTED = {
    "a merge that divides no tile": ("idefics3", {"scale_factor": 3}, {}, "scale_factor 3"),
    "patches larger than a tile": ("smolvlm", {}, {"patch_size": 99}, "image_size"),
    "tiles that are not square": ("internvl", {}, {"image_size": [28, 56]}, "square"),
    "a ratio that divides no tile": ("internvl", {"downsample_ratio": 0.3}, {}, "downsample_ratio"),
    "the class row among the tokens": ("internvl", {"vision_feature_select_strategy": "full"}, {}, "class row"),
    "features of several layers": ("internvl", {"vision_feature_layer": [-2, -1]}, {}, "vision_feature_layer"),
    "a layer that is not there": ("internvl", {"vision_feature_layer": -9}, {}, "vision_feature_layer"),
    "an image token outside the vocabulary": ("smolvlm", {"image_token_id": 10**6}, {}, "image_token_id"),
}


@pytest.mark.parametrize("case", NOT_EXPORTED)
def test_a_setting_that_cannot_be_exported_is_refused_and_named(case, tmp_path):
    name, outer, vision, said = NOT_EXPORTED[case]
    config = sized(name, RANDOM[name](1), TILE, PATCH, MERGE) | outer
    config["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        families.find(name).check_config(hf.read_config(tmp_path))


@names
def test_a_decoder_that_no_family_knows_is_refused_by_its_type(name, tmp_path):
    config = RANDOM[name](1)
    config["text_config"] = {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"text_config\.model_type 'mixtral'"):
        families.find(name).check_config(hf.read_config(tmp_path))
    config["text_config"] = {**random_config(1)["text_config"], "model_type": "qwen2_vl"}
    with pytest.raises(InputError, match="no plain decoder"):
        families.find(name).check_config(config)
