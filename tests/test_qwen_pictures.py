"""What the host of Qwen2.5-VL and Qwen3-VL computes equals transformers': patches, windows, interpolation, positions."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_models import PUBLISHED, RANDOM, published
from random_models import START, write_config
from transformers import initialization, vision_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cm_export import families
from cm_export.base import environment
from cm_export.base.errors import InputError
from cm_export.families import Layout, Picture, Pictures
from cm_export.families.qwen2_5_vl import window_patches
from cm_export.families.qwen3_vl import interpolated
from cm_export.source import model as hf

# As the published checkpoints write them.
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
RULES = {
    "qwen2_5_vl": CLIP
    | {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
    "qwen3_vl": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "temporal_patch_size": 2}
    | {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "merge_size": 2,
        "processor_class": "Qwen3VLProcessor",
    }
    | {"image_processor_type": "Qwen2VLImageProcessorFast"},
}
CONFIGS = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct", "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct"}
names = pytest.mark.parametrize("name", RULES)


def normalised(name, tmp_path, **text):
    write_config(tmp_path, published(name, **text))
    config = hf.read_config(tmp_path)
    return families.find(config["model_type"]), config


def check_pictures(name, tmp_path, count, largest):
    """`count` generated pictures, as the processor makes them: their grids, and pixels within 1e-5."""
    family, config = normalised(CONFIGS[name], tmp_path)
    tower, worst, rng = family.tower(config), 0.0, np.random.default_rng(count)
    rule, theirs = tower.rule(RULES[name]), Qwen2VLImageProcessorPil(**RULES[name])
    for _ in range(count):
        size = [
            int(np.exp(rng.uniform(np.log(8), np.log(largest)))) for _ in range(2)
        ]  # no side over 200 times the other
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        expected = theirs([image], return_tensors="np")
        found = tower.picture(image, rule)
        feeds = tower.stock([found], np.ones(1, bool))
        np.testing.assert_array_equal(feeds["image_grid_thw"], expected["image_grid_thw"])
        assert found.tokens == expected["image_grid_thw"].prod() // 4
        worst = max(worst, float(np.abs(feeds["pixel_values"] - expected["pixel_values"]).max()))
    assert worst <= 1e-5


@names
def test_pictures_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 10, 500)


@pytest.mark.wide
@names
def test_200_pictures_are_those_of_the_processor_of_transformers(name, tmp_path):
    check_pictures(name, tmp_path, 200, 1500)


# ---------------------------------------------------------------- what the towers read
grids = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_windows_hold_the_patches_of_those_of_transformers_in_their_order(sizes, merge, side, over):
    patch, unit = 2, merge**2
    ours = window_patches(sizes, merge, side)
    grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in sizes])
    index, borders = vision_utils.get_vision_window_index(
        grid, merge, side * merge * patch + min(over, 2 * merge - 1), patch
    )
    patches = (index[:, None] * unit + torch.arange(unit)).flatten().numpy()
    expected = np.split(patches, borders[1:-1].numpy())
    assert len(ours) == len(expected)
    for row, members in zip(ours, expected, strict=True):
        assert row[row >= 0].tolist() == members.tolist()


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(1, 3), st.integers(2, 7))
def test_interpolated_positions_equal_transformers_to_the_last_bit(sizes, merge, side):
    config = {"patch_size": 2, "spatial_merge_size": merge, "temporal_patch_size": 1, "in_channels": 3, "num_heads": 1}
    config |= {"hidden_size": 8, "out_hidden_size": 8, "num_position_embeddings": side**2}
    from cm_export.families.qwen3_vl import Qwen3VLTower

    tower = Qwen3VLTower(config, 1)
    pictures = [Picture(np.zeros((t * h * w * merge**2, 12), np.float32), Layout((t, h, w))) for t, h, w in sizes]
    feeds = tower.feeds(pictures)
    grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in sizes])
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, align_corners=True, spatial_merge_size=merge
    )
    np.testing.assert_array_equal(feeds["interp_indices"], indices)
    np.testing.assert_array_equal(feeds["interp_weights"], weights)
    assert feeds["interp_weights"].dtype == np.float32
    at = interpolated(np.zeros((1, 2), np.int64), (1, 1), side)
    assert at[0].tolist() == [[0, 1, side, side + 1]] and at[1].tolist() == [[1, 0, 0, 0]]


@names
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), max_size=4), st.integers(1, 5))
def test_positions_equal_transformers(name, pictures, tail):
    kind = getattr(transformers, families.find(name).model_class)
    config = kind.config_class(vision_config={"spatial_merge_size": 2}, image_token_id=5)
    with initialization.no_init_weights(), torch.device("meta"):
        model = {"qwen2_5_vl": transformers.Qwen2_5_VLModel, "qwen3_vl": transformers.Qwen3VLModel}[name]
        model = model.__new__(model)
        torch.nn.Module.__init__(model)
    model.config = config
    ids = [i for words, h, w in pictures for i in [9] * words + [START] + [5] * (h * w) + [4]] + [9] * tail
    ids = torch.tensor([ids])
    grid = torch.tensor([(1, 2 * h, 2 * w) for _, h, w in pictures]).reshape(-1, 3)
    expected, delta = model.get_rope_index(ids, (ids == 5).int(), image_grid_thw=grid)
    seen = Pictures({}, tuple(Layout((1, h, w)) for _, h, w in pictures))
    picture = np.full(ids.shape[1], -1, np.int64)
    picture[ids[0].numpy() == 5] = np.repeat(np.arange(len(grid)), seen.counts)
    positions, following = families.find(name).positions(picture, seen)
    np.testing.assert_array_equal(positions, expected[:, 0])
    assert following == ids.shape[1] + int(delta)


# ---------------------------------------------------------------- published checkpoints
# Bytes of memory that a further patch takes in the vision graph on ONNX Runtime, measured from 1024 to 8192 of them.
MEASURED = {"Qwen/Qwen2.5": 62e3, "Qwen/Qwen3": 68e3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_sizes_of_the_model_and_memory_without_its_weights(name, tmp_path, monkeypatch):
    family, config = normalised(name, tmp_path)
    family.check_config(config)
    shape, tower = family.shape(config), family.tower(config)
    assert shape.weights == pytest.approx(1e9 * PUBLISHED[name][1], rel=1e-3)
    assert shape.stop_ids == (151645,) and shape.head_dim == 128
    if tower is None:
        assert not shape.sees
        return
    assert (shape.position_axes, shape.image_token, tower.hidden) == (3, 151655, shape.hidden)
    assert shape.whole_layers == (3 if "Qwen3" in name else 0)
    picture = Picture(np.zeros((4096, tower.patch_dim), np.float32), Layout((1, 32, 32)))
    measured, in_blocks = MEASURED[name.split("-VL")[0]], tower.memory(picture)
    assert measured < in_blocks / 4096 < 1.3 * measured
    monkeypatch.setattr(environment, "attends_in_blocks", lambda: False)
    assert tower.memory(picture) == in_blocks + 16 * 4 * 4096**2
    fused, plain = (tower.engine_memory(4096, fused) for fused in (True, False))
    assert 1e8 < fused < plain < 2e9
    for axes in (tower.axis_ranges(1), tower.axis_ranges(4096)):
        assert all(1 <= least <= likely <= most for least, likely, most in axes.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_no_picture_has_more_windows_than_the_profile_of_its_patches_allows(rows, columns):
    config = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3, "num_heads": 1}
    config |= {"hidden_size": 8, "out_hidden_size": 8, "window_size": 16, "fullatt_block_indexes": [1]}
    tower = families.find("qwen2_5_vl").tower({"vision_config": config})
    picture = Picture(np.zeros((rows * columns * 4, 12), np.float32), Layout((1, rows, columns)))
    ranges, feeds = tower.axis_ranges(len(picture.pixels)), tower.feeds([picture])
    assert len(feeds["window_patches"]) <= ranges["windows"][2]


WRONG = {
    "a window smaller than an image token": ("qwen2_5_vl", "window_size", 3, "window_size"),
    "blocks that are no numbers": ("qwen2_5_vl", "fullatt_block_indexes", [1.5], "fullatt_block_indexes|transformers refuses"),
    "features of blocks that the tower lacks": ("qwen3_vl", "deepstack_visual_indexes", [0, 7], "deepstack_visual_indexes"),
    "features of another width": ("qwen3_vl", "out_hidden_size", 7, "out_hidden_size differs"),
    "a tower of another width": ("qwen2_5_vl", "out_hidden_size", 7, "out_hidden_size differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_tower_that_cannot_be_exported_is_refused_and_the_setting_named(case, tmp_path):
    name, key, value, said = WRONG[case]
    config = RANDOM[name](3)
    config["vision_config"][key] = value
    write_config(tmp_path, config)
    with pytest.raises(InputError, match=said):
        families.find(name).check_config(hf.read_config(tmp_path))


@names
def test_sections_of_positions_that_do_not_fill_half_a_head_are_refused(name, tmp_path):
    config = RANDOM[name](3)
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 99]
    write_config(tmp_path, config)
    with pytest.raises(InputError, match="mrope_section"):
        families.find(name).check_config(hf.read_config(tmp_path))
