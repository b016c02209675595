"""The numpy rules of Qwen2-VL equal transformers' own, on generated pictures and layouts."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLModel, initialization, vision_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cm_export.families import Layout, Pictures
from cm_export.families import qwen2_vl as family

side = st.integers(4, 90)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(side, side), min_size=1, max_size=3),
    st.sampled_from([2, 4, 7]),
    st.sampled_from([1, 2]),
    st.fixed_dictionaries({}, optional={"do_rescale": st.booleans(), "do_normalize": st.booleans()}),
)
def test_patches_equal_the_processor_of_transformers(sizes, patch, temporal, steps):
    rng = np.random.default_rng(sum(map(sum, sizes)))
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]
    values = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": temporal}
    values |= {"min_pixels": 16 * patch**2, "max_pixels": 60 * patch**2} | steps
    expected = Qwen2VLImageProcessorPil(**values)(images, return_tensors="np")
    pixels, grid = family.patchify(images, family.image_rule(values))
    np.testing.assert_array_equal(grid, expected["image_grid_thw"])
    np.testing.assert_allclose(pixels, expected["pixel_values"], rtol=1e-6, atol=1e-6)  # up to 1000 without rescale


grids = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(grids, st.integers(1, 3))
def test_vision_inputs_equal_transformers(sizes, merge):
    grid = np.array([(t, h * merge, w * merge) for t, h, w in sizes], np.int64)
    ours = family.vision_inputs(np.zeros((int(grid.prod(1).sum()), 1), np.float32), grid, merge)
    theirs = torch.from_numpy(grid)
    np.testing.assert_array_equal(ours["position_ids"], vision_utils.get_vision_position_ids(theirs, merge))
    np.testing.assert_array_equal(ours["cu_seqlens"], vision_utils.get_vision_cu_seqlens(theirs))


def _positions_of_transformers(ids, grid, merge):
    config = Qwen2VLConfig(vision_config={"spatial_merge_size": merge}, image_token_id=5)
    with initialization.no_init_weights(), torch.device("meta"):
        model = Qwen2VLModel.__new__(Qwen2VLModel)
        torch.nn.Module.__init__(model)
    model.config = config
    ids = torch.from_numpy(ids)[None]
    return model.get_rope_index(ids, (ids == 5).int(), image_grid_thw=torch.from_numpy(grid))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), max_size=4), st.integers(1, 5))
def test_positions_equal_transformers(pictures, tail):
    ids, grid = [], []
    for words, h, w in pictures:
        ids += [9] * words + [3] + [5] * (h * w) + [4]
        grid.append((1, 2 * h, 2 * w))
    ids = np.array(ids + [9] * tail, np.int64)
    grid = np.array(grid, np.int64).reshape(-1, 3)
    seen = Pictures({}, tuple(Layout((t, h // 2, w // 2)) for t, h, w in grid.tolist()))
    picture = np.full(len(ids), -1, np.int64)
    picture[ids == 5] = np.repeat(np.arange(len(grid)), seen.counts)
    positions, nxt = family.FAMILY.positions(picture, seen)
    expected, delta = _positions_of_transformers(ids, grid, 2)
    np.testing.assert_array_equal(positions, expected[:, 0])
    assert nxt == len(ids) + int(delta)
