"""Clips of the Qwen families: which frames are read, how they lie in a prompt, and that answers equal transformers'."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import cm_export
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_models import RANDOM, noise
from PIL import Image
from random_models import END, IMAGE, START, VIDEO
from stepping import Decoder, prefill, step_feeds
from test_qwen_families import bundle_of, exported_of
from test_token_cuts import recipe_of, run
from tolerances import agrees
from transformers import initialization

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.families import Frames, Layout, Pictures
from cm_export.host.loaded import load
from cm_export.host.request import Request, prefill_feeds

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTION = "what shape is red ?"


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def x(name, exported):
    return exported(1) if name == "qwen2_vl" else exported_of(*bundle_of(name))


def frames(rng, count, size=(40, 30), fps=3.0, total=None):
    """Frames of a made-up clip."""
    total = total or count
    places = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return Frames([noise(rng, *size) for _ in range(count)], places, total, fps)


def tiny_rule(tower):
    size = (tower.patch * tower.merge) ** 2
    return tower.clip_rule({"size": {"shortest_edge": 4 * size, "longest_edge": 40 * size}})


def ids_of(x, layouts, rng):
    """Token ids of words, clips and pictures; text between the frames of a clip where the family says so."""
    ids = rng.integers(7, x.shape.vocab, 3).tolist()
    for layout in layouts:
        token = VIDEO if layout.is_clip else IMAGE
        frames_apart = layout.is_clip and x.family.frames_apart
        each = [layout.tokens // layout.grid[0]] * layout.grid[0] if frames_apart else [layout.tokens]
        for count in each:
            ids += [START, *[token] * count, END, *rng.integers(7, x.shape.vocab, 2).tolist()]
    return np.array(ids, np.int64)


def asked(x, backend, pictures, ids):
    """Seen frame by frame, as a bundle does."""
    seen = []
    for picture in pictures:
        found = [backend.vision(x.tower.feeds([part])) for part in x.tower.parts(picture)]
        outputs = {n: np.concatenate([part[n] for part in found]) for n in found[0]}
        seen.append(Pictures(outputs, (picture.layout,)))
    return Request.of(ids, Pictures.joined(seen), x.family, x.shape, x.weights[x.family.embedding])


def made(x, rng):
    """A clip of seven frames, a picture, and a clip of four, as one prompt."""
    rule = tiny_rule(x.tower)
    picture = x.tower.probes(rng)[0]
    clips = [x.tower.clip(frames(rng, n, fps=fps), rule) for n, fps in ((7, 3.0), (4, 0.7))]
    pictures = [clips[0], picture, clips[1]]
    return pictures, ids_of(x, [p.layout for p in pictures], rng)


def test_answers_about_clips_and_pictures_equal_stock_generate(x):
    rng, steps = np.random.default_rng(3), 6
    pictures, ids = made(x, rng)
    is_image = np.isin(ids, (IMAGE, VIDEO))
    given = {n: torch.from_numpy(v) for n, v in x.tower.stock(pictures, is_image).items()}
    prompt = torch.from_numpy(ids)[None]
    out = x.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **given, max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens, logits = out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).numpy()
    recipe = recipe_of(prune_layer=max(1, x.shape.whole_layers))
    backend = x.backend(recipe)
    request = asked(x, backend, pictures, ids)
    found = prefill(backend, prefill_feeds(request), "prefill_dense")
    agrees("export", found["logits"].numpy(), logits[:1])
    decoder = Decoder(backend, "decode_dense", found, {})
    for i in range(steps - 1):
        agrees("export", decoder.step(step_feeds(request, tokens[i], i)), logits[i + 1 : i + 2])


def test_each_clip_keeps_its_share(x):
    rng = np.random.default_rng(4)
    pictures, ids = made(x, rng)
    total = sum(p.tokens for p in pictures)
    rows = {p.name: rng.standard_normal((total, *p.row)).astype(np.float32) for p in x.tower.outputs}
    seen = Pictures(rows, tuple(p.layout for p in pictures))
    request = Request.of(ids, seen, x.family, x.shape, x.weights[x.family.embedding])
    assert request.picture_sizes() == [p.tokens for p in pictures]
    _, out = run(x, request, recipe_of(quota="each", share=0.5, prune_layer=max(1, x.shape.whole_layers)))
    kept = request.picture[0, out["kept_tokens"][0]]
    assert [int((kept == i).sum()) for i in range(3)] == [max(1, int(0.5 * p.tokens + 0.5)) for p in pictures]


# ---------------------------------------------------------------- positions and text
MODELS = {
    "qwen2_vl": transformers.Qwen2VLModel,
    "qwen2_5_vl": transformers.Qwen2_5_VLModel,
    "qwen3_vl": transformers.Qwen3VLModel,
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.3, 1, 2, 7.5, 24])),
        min_size=1, max_size=3,
    )
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_positions_of_clips_equal_transformers(name, clips):
    kind = getattr(transformers, families.find(name).model_class)
    config = kind.config_class(vision_config={"spatial_merge_size": 2}, image_token_id=5, video_token_id=6)
    with initialization.no_init_weights(), torch.device("meta"):
        model = MODELS[name].__new__(MODELS[name])
        torch.nn.Module.__init__(model)
    model.config = config
    apart, ids, layouts, seconds = name == "qwen3_vl", [9], [], []
    for t, h, w, fps in clips:
        ids += [START, *[VIDEO] * (h * w), 4] * t if apart else [START, *[VIDEO] * (t * h * w), 4]
        seconds.append(2 / fps)
        rate = config.vision_config.tokens_per_second if name == "qwen2_5_vl" else 1
        step = float(np.float32(rate) * np.float32(2 / fps)) if name == "qwen2_5_vl" else 1
        layouts.append(Layout((t, h, w), pace=step))
    ids = torch.tensor([ids])
    grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w, _ in clips])
    more = {"second_per_grid_ts": torch.tensor(seconds)} if name == "qwen2_5_vl" else {}
    expected, _ = model.get_rope_index(ids, 2 * (ids == VIDEO).int(), video_grid_thw=grid, **more)
    picture = np.full(ids.shape[1], -1, np.int64)
    picture[ids[0].numpy() == VIDEO] = np.repeat(np.arange(len(clips)), [layout.tokens for layout in layouts])
    positions, following = families.find(name).positions(picture, Pictures({}, tuple(layouts)))
    np.testing.assert_array_equal(positions, expected[:, 0])
    assert following == positions[0, -1] + 1, "as generate counts on, whatever lies before the last token"


def tower_of(name, **vision):
    sizes = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_heads": 1}
    sizes |= {"hidden_size": 8, "out_hidden_size": 8, "window_size": 16, "fullatt_block_indexes": [1]}
    sizes |= {"num_position_embeddings": 9, "deepstack_visual_indexes": [0], "tokens_per_second": 2, "depth": 2}
    return families.find(name).tower({"vision_config": sizes | vision, "text_config": {"num_hidden_layers": 2}})


@pytest.mark.parametrize(("count", "fps"), [(4, 3.0), (5, 0.7), (7, None)])
def test_the_times_of_frames_stand_in_the_prompt_as_transformers_writes_them(count, fps):
    rng, tower = np.random.default_rng(count), tower_of("qwen3_vl")
    shown = frames(rng, count, fps=fps, total=40)
    layout = tower.clip(shown, tiny_rule(tower)).layout
    processor = object.__new__(transformers.Qwen3VLProcessor)
    processor.video_processor = type("Sizes", (), {"merge_size": 2, "temporal_patch_size": 2})
    processor.video_token = "<|video_pad|>"
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    metadata = transformers.video_utils.VideoMetadata(40, fps=fps, frames_indices=list(shown.places))
    t, h, w = layout.grid
    given = {"video_grid_thw": np.array([(t, 2 * h, 2 * w)]), "video_metadata": [metadata]}
    assert layout.written("<|video_pad|>") == processor.replace_video_token(given, 0)
    assert layout.tokens == t * h * w


@pytest.mark.parametrize(("count", "fps"), [(4, 3.0), (5, 0.7), (8, None)])
def test_positions_of_qwen2_5_vl_go_with_the_time_between_chosen_frames(count, fps):
    rng, tower = np.random.default_rng(count), tower_of("qwen2_5_vl")
    shown = frames(rng, count, fps=fps, total=40)
    metadata = transformers.video_utils.VideoMetadata(40, fps=fps, frames_indices=list(shown.places))
    seconds = torch.tensor([2 / metadata.sampled_fps])  # as its processor computes second_per_grid_ts
    clip = tower.clip(shown, tiny_rule(tower))
    assert clip.layout.pace == float(2 * seconds[0])
    np.testing.assert_array_equal(tower.stock([clip], np.ones(clip.tokens, bool))["second_per_grid_ts"], seconds)


# ---------------------------------------------------------------- which frames, and their pixels
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 900), st.integers(1, 60))
def test_so_many_frames_are_those_that_transformers_takes(total, count):
    tower = tower_of("qwen2_vl")
    rounded = round(count / 2) * 2
    if not 0 < rounded <= total:
        with pytest.raises(InputError, match="frames are asked of a clip"):
            tower.frames_of(total, 25.0, tower.clip_rule({}), None, count)
        return
    expected = torch.arange(0, total, total / rounded).int().tolist()
    assert tower.frames_of(total, 25.0, tower.clip_rule({}), None, count) == expected
    spread = tower_of("qwen3_vl")
    if count <= total:
        expected = np.linspace(0, total - 1, count).round().astype(int).tolist()
        assert spread.frames_of(total, None, spread.clip_rule({}), None, count) == expected


def test_a_rate_is_kept_within_what_the_checkpoint_allows():
    two, three = tower_of("qwen2_vl"), tower_of("qwen3_vl")
    rule = two.clip_rule({"max_frames": 10})
    assert len(two.frames_of(300, 30.0, rule, 2.0, None)) == 10 and len(two.frames_of(300, 30.0, rule, 0.1, None)) == 4
    assert two.frames_of(7, 30.0, rule, None, None) == list(range(7)), "without a rate every frame is read"
    with pytest.raises(InputError, match="the clip does not say it"):
        two.frames_of(300, None, rule, 2.0, None)
    assert len(three.frames_of(300, 30.0, three.clip_rule({}), None, None)) == 20, "two frames a second"
    assert len(three.frames_of(300, None, three.clip_rule({}), 1.0, None)) == 12, "24 frames a second are assumed"
    assert len(two.frames_of(90, 30.0, two.clip_rule({"do_sample_frames": True, "fps": 2}), None, None)) == 6


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_cut_into_patches_of_several_and_the_last_is_repeated(name):
    rng, tower = np.random.default_rng(1), tower_of(name)
    shown = frames(rng, 3, size=(16, 8))
    rule = tower.clip_rule(
        {"size": {"shortest_edge": 64, "longest_edge": 512}, "image_mean": [0] * 3, "image_std": [1] * 3}
    )
    clip = tower.clip(shown, rule)
    assert clip.grid == (2, 1, 2)
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in shown.images])[[0, 1, 2, 2]]
    found = clip.pixels.reshape(2, 2, 2, 2, 3, 2, 4, 4)  # t, column, rows and columns of a merged patch, C, T, p, p
    x = pixels.reshape(2, 2, 2, 4, 2, 2, 4, 3).transpose(0, 4, 2, 5, 7, 1, 3, 6)
    np.testing.assert_allclose(found, x, atol=1e-6)
    assert [part.grid for part in tower.parts(clip)] == [(1, 1, 2)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_frames_and_patches_are_those_of_the_processor_of_transformers(name):
    """transformers' processors of clips need torchvision, which resizes with other arithmetic than Pillow."""
    pytest.importorskip("torchvision", reason="processors of clips in transformers need it")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    rng, tower = np.random.default_rng(7), tower_of(name)
    file = {"patch_size": 4, "size": {"shortest_edge": 64 * 4, "longest_edge": 64 * 60}}
    theirs = (Qwen3VLVideoProcessor if name == "qwen3_vl" else Qwen2VLVideoProcessor)(**file)
    rule = tower.clip_rule(file)
    for trial in range(30):
        total, fps = int(rng.integers(4, 40)), float(rng.choice([8, 24, 29.97]))
        width, height = (16, 32) if trial % 2 else rng.integers(8, 90, 2).tolist()
        pixels = rng.integers(0, 256, (total, height, width, 3), np.uint8)
        metadata = transformers.video_utils.VideoMetadata(total, fps=fps)
        how = {"do_sample_frames": True, "fps": 2.0, "return_metadata": True, "return_tensors": "pt"}
        expected = theirs([pixels], video_metadata=[metadata], **how)
        places = tower.frames_of(total, fps, rule, 2.0, None)
        assert places == [int(i) for i in expected["video_metadata"][0].frames_indices]
        shown = [Image.fromarray(pixels[i]) for i in places]
        clip = tower.clip(Frames(shown, places, total, fps), rule)
        t, h, w = clip.grid
        assert expected["video_grid_thw"].tolist() == [[t, 2 * h, 2 * w]]
        if (8 * w, 8 * h) == (width, height):
            np.testing.assert_allclose(clip.pixels, expected["pixel_values_videos"].numpy(), rtol=0, atol=1e-5)


def test_a_clip_for_a_model_without_clips_and_a_rule_of_another_are_refused():
    with pytest.raises(InputError, match="video_processor_type"):
        tower_of("qwen2_vl").clip_rule({"video_processor_type": "LlavaOnevisionVideoProcessor"})
    with pytest.raises(InputError, match="fps = 0"):
        tower_of("qwen2_vl").clip_rule({"do_sample_frames": True, "fps": 0})
    with pytest.raises(InputError, match="reads 2 together"):
        tower = tower_of("qwen3_vl")
        tower.clip(frames(np.random.default_rng(0), 1), tower.clip_rule({}))


# ---------------------------------------------------------------- the command line and Python
@pytest.mark.parametrize("name", NAMES[1:])
def test_frames_of_a_program_are_answered_and_their_share_is_kept(name):
    _, plan = bundle_of(name)
    rng = np.random.default_rng(2)
    with load(plan, threads=1) as model:
        clip = model.clip([noise(rng, 40, 30) for _ in range(6)], fps=2.0)
        dense = model.generate(QUESTION, [clip, noise(rng, 50, 40)], max_new_tokens=4, dense=True)
        kept = model.generate(QUESTION, clip, max_new_tokens=4, token_share=0.5)
        few = model.generate(QUESTION, model.clip([noise(rng, 40, 30) for _ in range(6)], count=2), max_new_tokens=2)
        with pytest.raises(InputError, match="differ in size"):
            model.clip([noise(rng, 40, 30), noise(rng, 30, 40)])
        with pytest.raises(InputError, match="a rate and a number"):
            model.clip([noise(rng, 40, 30)], rate=1, count=1)
    clip_cells, picture_cells = (cells.size for cells in dense.kept)  # of a clip those of its first frame
    assert dense.stats["image_tokens"] == dense.stats["image_tokens_kept"] == 3 * clip_cells + picture_cells
    assert kept.stats["image_tokens_kept"] == math.ceil(kept.stats["image_tokens"] / 2)
    per_frame = name == "qwen2_5_vl"  # the limits of qwen3_vl are those of all frames together
    assert (few.stats["image_tokens"] * 3 == kept.stats["image_tokens"]) is per_frame


def write_clip(path, count=24, fps=8):
    """A generated clip: a square that moves."""
    av = pytest.importorskip("av", reason="clips are read by PyAV, of the extra video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(count):
            image = np.full((48, 64, 3), 230, np.uint8)
            image[10:30, i : i + 20] = (200, 20, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", NAMES[1:])
def test_run_reads_a_clip_as_its_frames(name, tmp_path):
    write_clip(tmp_path / "clip.mp4")
    _, plan = bundle_of(name)
    with load(plan, threads=1) as model:
        clip = model.clip(tmp_path / "clip.mp4", count=4)
        assert (clip.frames.total, clip.frames.fps, len(clip.frames.images)) == (24, 8.0, 4)
        answer = model.generate(QUESTION, clip, max_new_tokens=4)
    words = ["--video", tmp_path / "clip.mp4", "--frames", "4", "--overlay", tmp_path / "kept.png"]
    done = cm_export("run", plan, *words, "--prompt", QUESTION, "--max-new-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["token_ids"] == answer.token_ids and found["image_tokens"] == answer.stats["image_tokens"]
    (tmp_path / "no.mp4").write_bytes(b"no clip at all")
    done = cm_export("run", plan, "--video", tmp_path / "no.mp4", "--prompt", QUESTION)
    assert done.returncode == 2 and "cannot be read" in done.stderr


def test_a_model_that_takes_no_clips_says_so():
    with pytest.raises(InputError, match="takes no clips"):
        families.find("llava").tower(RANDOM["llava"](2)).clip_rule({})
