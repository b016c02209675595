"""What the hosts of LLaVA-1.5 and LLaVA-OneVision make of pictures equals transformers' processors: pixels and tokens."""

import copy

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_models import PUBLISHED, RANDOM, noise
from PIL import Image
from random_models import write_config
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cm_export import families
from cm_export.base import dims
from cm_export.base.errors import InputError
from cm_export.build import job
from cm_export.families import llava, llava_onevision
from cm_export.recipe.recipe import Recipe
from cm_export.source import model as hf
from cm_export.source import probe as source_probe

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
CROP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
GRIDS = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]
# As published checkpoints write them, and as they may be written.
SQUARE = {
    "llava-1.5": CLIP | CROP | {"image_processor_type": "CLIPImageProcessor", "resample": 3},
    "padded": CLIP | CROP | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True},
    "padded and whole": CLIP
    | {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False, "size": 336},
    "small and cut": CROP | {"size": {"shortest_edge": 100}, "do_normalize": False},
    "cut alone": CROP | {"do_resize": False, "do_rescale": False, "crop_size": 336, "do_pad": None},
    "stretched": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 336, "width": 336}},
}
THEIRS = {"CLIP": CLIPImageProcessorPil, "Llav": LlavaImageProcessorPil, "Sigl": SiglipImageProcessorPil}
TILED = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TILED |= {"image_grid_pinpoints": GRIDS, "size": {"height": 384, "width": 384}, "resample": 3}


def tower_of(name, tmp_path):
    write_config(tmp_path, copy.deepcopy(PUBLISHED[name][0]))
    config = hf.read_config(tmp_path)
    family = families.find(config["model_type"])
    family.check_config(config)
    return family.tower(config)


def pictures(count, largest, seed=0):
    """Generated pictures, no side over 200 times the other."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        width, height = (int(np.exp(rng.uniform(np.log(8), np.log(largest)))) for _ in range(2))
        yield noise(rng, width, height)


# ---------------------------------------------------------------- squares
def check_squares(tower, case, count, largest):
    given = SQUARE[case]
    rule, theirs = tower.rule(given), THEIRS[given.get("image_processor_type", "Llava")[:4]](**given)
    for image in pictures(count, largest, list(SQUARE).index(case)):
        expected = theirs([image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(tower.picture(image, rule).pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SQUARE)
def test_squares_are_those_of_the_processors_of_transformers(case, tmp_path):
    check_squares(tower_of("llava-hf/llava-1.5-7b-hf", tmp_path), case, 4, 600)


@pytest.mark.wide
@pytest.mark.parametrize("case", SQUARE)
def test_200_squares_are_those_of_the_processors_of_transformers(case, tmp_path):
    check_squares(tower_of("llava-hf/llava-1.5-7b-hf", tmp_path), case, 200, 1500)


def test_llava_1_5_has_576_tokens_of_any_picture(tmp_path):
    tower = tower_of("llava-hf/llava-1.5-7b-hf", tmp_path)
    rule = tower.rule(SQUARE["llava-1.5"])
    for size in ((8, 1000), (336, 336), (1, 1)):
        assert tower.picture(Image.new("RGB", size), rule).tokens == 576


def drawn(layout):
    """The cells of a picture that some token covers, as text."""
    kept = layout.kept(np.ones(layout.tokens, bool))
    return ["".join(".#"[cell] for cell in row) for row in kept.tolist()]


def test_cells_beyond_the_cut_are_counted_and_those_beyond_the_picture_are_not():
    config = RANDOM["llava"](2)
    vision = config["vision_config"] | {"image_size": 8, "patch_size": 4}
    tower = llava.SquareTower(config | {"vision_config": vision, "vision_feature_select_strategy": "full"})
    cut, padded = tower.rule({}), tower.rule({"do_pad": True})
    assert drawn(tower.picture(Image.new("RGB", (80, 40)), cut).layout) == [".##.", ".##."]
    assert drawn(tower.picture(Image.new("RGB", (40, 80)), cut).layout) == ["..", "##", "##", ".."]
    assert drawn(tower.picture(Image.new("RGB", (40, 40)), padded).layout) == ["##", "##"]
    tall = tower.picture(Image.new("RGB", (10, 80)), padded)
    assert tall.layout.cells[0] == -1 and tall.tokens == 5, "a token of the whole picture covers no cell"
    assert drawn(tall.layout) == ["#", "#"]


# ---------------------------------------------------------------- tiles
def expected_tokens(tower, given):
    """Of each picture, by transformers' own processor."""
    processor = object.__new__(transformers.LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(**TILED)
    processor.num_image_tokens, processor.image_token = tower.side**2, "i"
    processor.vision_feature_select_strategy, processor.vision_aspect_ratio = "full", "anyres_max_9"
    return [len(processor.replace_image_token(given, i)) for i in range(len(given["image_sizes"]))]


def check_tiles(tower, images):
    """Pictures of one question."""
    rule = tower.rule_for(tower.rule(TILED), len(images))
    theirs = LlavaOnevisionImageProcessorPil(**TILED)([images], return_tensors="np")
    found = [tower.picture(image, rule) for image in images]
    feeds = tower.stock(found, np.ones(1, bool))
    np.testing.assert_array_equal(feeds["image_sizes"], theirs["image_sizes"])
    np.testing.assert_array_equal(feeds["batch_num_images"], theirs["batch_num_images"])
    np.testing.assert_allclose(feeds["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-5)
    assert [p.tokens for p in found] == expected_tokens(tower, theirs)
    assert all(len(p.rows) == len(p.weights) == p.tokens for p in found)


def test_tiles_are_those_of_the_processor_of_transformers(tmp_path):
    tower = tower_of("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", tmp_path)
    for image in pictures(9, 700):
        check_tiles(tower, [image])
    check_tiles(tower, list(pictures(3, 700, 1)))


@pytest.mark.wide
def test_200_pictures_are_the_tiles_of_the_processor_of_transformers(tmp_path):
    tower = tower_of("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", tmp_path)
    for image in pictures(160, 1500):
        check_tiles(tower, [image])
    several = list(pictures(40, 1500, 1))
    for at in range(0, 40, 4):
        check_tiles(tower, several[at : at + 4])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_picture_of_any_size_has_as_many_tokens_as_transformers_counts(width, height):
    config = copy.deepcopy(PUBLISHED["llava-hf/llava-onevision-qwen2-0.5b-ov-hf"][0])
    config |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    tower = llava_onevision.OnevisionTower(config)
    processor = object.__new__(transformers.LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=config["image_grid_pinpoints"])
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    layout, rows, _ = tower._joined(height, width)
    assert layout.tokens == len(rows) == processor._get_number_of_features(height, width, 384, 384)
    tiles = 1 + np.prod(tower.grid(height, width)) // 384**2
    assert layout.tokens <= tower.axis_ranges(int(tiles) * 729)[dims.IMAGE_TOKENS][2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_interpolated_cells_equal_torch(rows, columns, h, w):
    values = torch.rand(rows * columns, 3)
    taps, weights = llava_onevision._interpolated(np.arange(rows * columns).reshape(rows, columns), (h, w))
    found = (values[torch.from_numpy(taps)] * torch.from_numpy(weights)[..., None]).sum(2)
    expected = F.interpolate(values.T.reshape(1, 3, rows, columns), [h, w], mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_a_picture_covers_its_cells_row_by_row_and_row_ends_cover_none(tmp_path):
    tower = tower_of("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", tmp_path)
    layout, _, _ = tower._joined(400, 700)
    frames, rows, columns = layout.grid
    cells = np.array(layout.cells)
    assert frames == 1 and (cells[:729] == -1).all()
    grid = cells[729:].reshape(rows, columns + 1)
    assert (grid[:, -1] == -1).all() and grid[:, :-1].ravel().tolist() == list(range(rows * columns))
    several, _, _ = tower._single(400, 700)
    assert several.tokens == 730 and several.cells[-1] == -1 and several.grid == (1, 16, 27)


# ---------------------------------------------------------------- what is refused
WRONG_RULES = {
    "another processor": ({"image_processor_type": "Qwen2VLImageProcessor"}, "cuts pictures in another way"),
    "another size": ({"crop_size": 224}, "the tower of config.json reads 8"),
    "no square": ({"do_center_crop": False, "size": {"shortest_edge": 8}}, "do not become squares"),
    "two edges": ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "no size that is supported"),
    "no number": ({"size": "8"}, "no size that is supported"),
    "a size without end": ({"size": {"shortest_edge": 10**12}}, "more than 8 times"),
    "no filter": ({"resample": 9}, "none of Pillow's filters"),
    "no flag": ({"do_pad": "yes"}, "neither true nor false"),
    "a mean beyond float32": ({"image_mean": [0, 1e300, 0]}, "float32 does not hold"),
    "a divisor that float32 takes for 0": ({"image_std": 1e-300}, "float32 does not hold"),
}
WRONG_TILES = {
    "other grids": ({"image_grid_pinpoints": [[8, 8]]}, "image_grid_pinpoints differ"),
    "grids that are a number": ({"image_grid_pinpoints": 8}, "image_grid_pinpoints differ"),
    "another size": ({"size": {"height": 9, "width": 9}}, "the tower of config.json reads"),
    "no resize": ({"do_resize": False}, "do_resize = false"),
    "another processor": ({"image_processor_type": "CLIPImageProcessor"}, "cuts pictures in another way"),
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_a_rule_that_makes_no_squares_of_the_tower_is_refused(case):
    config = RANDOM["llava"](2)
    tower = llava.SquareTower(config | {"vision_config": config["vision_config"] | {"image_size": 8, "patch_size": 4}})
    rule, said = WRONG_RULES[case]
    with pytest.raises(InputError, match=said):
        tower.rule(rule)


@pytest.mark.parametrize("case", WRONG_TILES)
def test_a_rule_that_makes_no_tiles_of_the_tower_is_refused(case):
    rule, said = WRONG_TILES[case]
    with pytest.raises(InputError, match=said):
        llava_onevision.OnevisionTower(RANDOM["llava_onevision"](2)).rule(rule)


WRONG = {
    "no plain decoder": ("llava", ("text_config", "model_type"), "qwen2_vl", "no plain decoder"),
    "an unknown decoder": ("llava", ("text_config", "model_type"), "gpt2", "model_type 'gpt2' is not supported"),
    "an unknown tower": ("llava", ("vision_config", "model_type"), "pixtral", "'pixtral' is not supported"),
    "a layer that is not there": ("llava", ("vision_feature_layer",), [-1, 9], "vision_feature_layer"),
    "no layer": ("llava", ("vision_feature_layer",), [], "vision_feature_layer"),
    "a tower smaller than a patch": ("llava", ("vision_config", "image_size"), 1, "smaller than patch_size"),
    "an image token beyond the vocabulary": ("llava", ("image_token_index",), 999, "image_token_id 999"),
    "grids of no whole tiles": ("llava_onevision", ("image_grid_pinpoints",), [[7, 11]], "image_grid_pinpoints"),
    "grids that are numbers": ("llava_onevision", ("image_grid_pinpoints",), [7], "image_grid_pinpoints"),
    "an unknown activation": ("llava", ("projector_hidden_act",), "sinus", "projector_hidden_act 'sinus'"),
    "no limit": ("llava_onevision", ("vision_aspect_ratio",), "anyres", "vision_aspect_ratio"),
    "tokens without a patch": ("llava_onevision", ("vision_feature_select_strategy",), "full", "leaves"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_cannot_be_exported_is_refused_and_the_setting_named(case, tmp_path):
    name, keys, value, said = WRONG[case]
    config = RANDOM[name](2)
    part = config if len(keys) == 1 else config[keys[0]]
    part[keys[-1]] = value
    write_config(tmp_path, config)
    with pytest.raises(InputError, match=said):
        families.find(name).check_config(hf.read_config(tmp_path))


# ---------------------------------------------------------------- published checkpoints
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_sizes_of_the_model_and_memory_without_its_weights(name, tmp_path):
    tower = tower_of(name, tmp_path)
    config = hf.read_config(tmp_path)
    shape = families.find(config["model_type"]).shape(config)
    assert shape.weights == pytest.approx(1e9 * PUBLISHED[name][1], rel=1e-3)
    assert shape.sees and shape.position_axes == 1 and shape.image_token == PUBLISHED[name][2]
    assert shape.stop_ids == ((2,) if "1.5" in name else (151645,))
    asked, recipe = source_probe.probe(shape, tower, config), Recipe()
    job.check_proof(recipe, tower, asked)
    with pytest.raises(InputError, match="proved on a prompt"):
        job.check_proof(recipe.replace(engine__max_prompt=600), tower, asked)
    if "onevision" in name:
        with pytest.raises(InputError, match="one of which has more patches"):
            job.check_proof(recipe.replace(engine__max_patches=1500), tower, asked)
    probe = tower.probes(np.random.default_rng(0))
    assert sum(p.tokens for p in probe) < 2000, "proofs of engines fit into the default prompt"
    assert all(1e7 < tower.memory(p) < 1e9 for p in probe)
    fused, plain = (tower.engine_memory(4096, fused) for fused in (True, False))
    assert 1e6 < fused < plain < 1e9
    for axes in (tower.axis_ranges(1), tower.axis_ranges(4096)):
        assert all(1 <= least <= likely <= most for least, likely, most in axes.values())
