"""Clips that strangers give: files that are none, or other than they say, are one clear line; so is what no clip is taken for.

Files are made with PyAV here; the figures of a sound one are in test_clips.py.
"""

import base64
import contextlib
import io
import json
import os
from fractions import Fraction

import numpy as np
import pytest
from conftest import cm_export
from PIL import Image
from test_clips import QUESTION, write_clip
from test_qwen_families import bundle_of
from test_tile_families import bundle_of as of_tiles

from cm_export.base.errors import InputError
from cm_export.calibrating.answers import read_prompts
from cm_export.evals import user_data
from cm_export.evals.exam import Exam
from cm_export.host import clips
from cm_export.host.loaded import load
from cm_export.host.runner import Budget
from cm_export.serving.messages import Bounds
from cm_export.serving.wire import read
from cm_export.tune.search import questions_key

av = pytest.importorskip("av", reason="clips are read by PyAV, of the extra video")


MS = Fraction(1, 1000)


def every(total, fps, size):
    return list(range(total))


def picture(i=0, size=(64, 48)):
    image = np.full((size[1], size[0], 3), 230, np.uint8)
    image[10:30, i : i + 20] = (200, 20, 20)
    return image


def jpeg(i=0, size=(64, 48)):
    data = io.BytesIO()
    Image.fromarray(picture(i, size)).save(data, "JPEG")
    return data.getvalue()


def written(path, pts):
    """A clip whose frames come at these times, in ms."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p", MS
        stream.codec_context.time_base = MS
        for i, at in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = at, MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, share):
    write_clip(path, count=40)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def before_index(path):
    """The index of an mp4 comes last; its place follows from how the encoder of a machine packs the frames."""
    write_clip(path, count=40)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])


def playlist(path):
    """One that names a sound clip beside it."""
    written(path.with_name("other.ts"), range(0, 20 * 100, 100))
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.ts\n#EXT-X-ENDLIST\n")


HOSTILE = {  # what is wrong: (name of the file, how it is made, words of the error)
    "nothing in it": ("x.mp4", lambda p: p.write_bytes(b""), "cannot be read"),
    "another kind of file": ("x.mp4", lambda p: p.write_text("no clip at all"), "cannot be read"),
    "no index": ("x.mp4", before_index, "cannot be read"),
    "half of it": ("x.avi", lambda p: cut(p, 0.6), "cannot be read"),
    "sound alone": ("x.wav", sound, "has no pictures that move"),
    "frames of two sizes": ("x.mjpeg", lambda p: p.write_bytes(jpeg() + jpeg(3, (32, 48))), "differ in size"),
    "a list of other files": ("x.m3u8", playlist, "cannot be read"),
    "a folder": ("x.mp4", lambda p: p.mkdir(), "is a directory"),
    "a pipe": ("x.mp4", os.mkfifo, "is no regular file"),
    "nothing": ("x.mp4", lambda p: None, "no such file"),
    "a name without end": ("x" * 300, lambda p: None, "cannot be read (File name too long)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_read_as_a_clip_is_one_line(case, tmp_path):
    name, make, word = HOSTILE[case]
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        clips.opened_clip(tmp_path / name, every)
    assert word in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1, "the path stands there once"


def test_an_mp4_that_ends_anywhere_in_its_index_is_one_line(tmp_path):
    path = tmp_path / "x.mp4"
    write_clip(path, count=40)
    data = path.read_bytes()
    for end in range(data.index(b"moov"), len(data), 7):
        path.write_bytes(data[:end])
        with contextlib.suppress(InputError):  # the last bytes are not missed
            clips.opened_clip(path, every)


def test_addresses_and_frames_of_an_absurd_size_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="URLs are not fetched"):
        clips.opened_clip("https://example.org/x.mp4", every)
    write_clip(tmp_path / "x.mp4")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(InputError, match=r"frames of 64x48: more than"):
        clips.opened_clip(tmp_path / "x.mp4", every)


def test_frames_that_do_not_fit_in_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    write_clip(tmp_path / "x.mp4")
    monkeypatch.setattr(clips.psutil, "virtual_memory", lambda: type("Free", (), {"available": 10**5}))
    monkeypatch.setattr(clips, "_decoded", None)
    with pytest.raises(InputError, match=r"24 frames of 64x48 need 221.2 kB, 100.0 kB are free"):
        clips.opened_clip(tmp_path / "x.mp4", every)


def test_a_count_of_frames_that_no_file_of_its_size_holds_is_refused(tmp_path):
    """Before numbers of so many frames are listed; the count is that of the box `stsz`."""
    write_clip(tmp_path / "x.mp4")
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"stsz") + 8  # after version and flags: size of every sample, then their number
    assert int.from_bytes(data[at + 4 : at + 8], "big") == 24
    data[at : at + 8] = (16).to_bytes(4, "big") + (10**8).to_bytes(4, "big")
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"says that it has|cannot be read|ends after"):
        clips.opened_clip(tmp_path / "x.mp4", every)


def test_a_file_that_ends_before_the_frames_that_it_says_is_no_shorter_clip(tmp_path, monkeypatch):
    write_clip(tmp_path / "x.mp4")
    monkeypatch.setattr(clips, "_facts", lambda *_: (60, 8.0, (64, 48)))
    with pytest.raises(InputError, match="ends after 24 of 60 frames that were chosen of 60"):
        clips.opened_clip(tmp_path / "x.mp4", every)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("gray16le", (64, 48)),
        ("yuv444p10le", (63, 47)),
        ("yuva420p", (64, 48)),
        ("yuv444p", (1, 1)),
    ],
)
def test_frames_of_other_pixels_and_of_one_are_read(kind, size, tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        (stream.width, stream.height), stream.pix_fmt = size, kind
        shown = np.full((size[1], size[0], 3), 230, np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format=kind)))
        container.mux(stream.encode())
    found = clips.opened_clip(tmp_path / "x.mkv", every).frames
    assert (len(found.images), found.fps, {(i.mode, i.size) for i in found.images}) == (3, 8.0, {("RGB", size)})
    np.testing.assert_allclose(np.asarray(found.images[-1]), 230, atol=3)


def test_one_frame_is_a_clip(tmp_path):
    write_clip(tmp_path / "x.mp4", count=1)
    found = clips.opened_clip(tmp_path / "x.mp4", every)
    assert (len(found.frames.images), found.frames.total, found.notes) == (1, 1, ())


def test_uneven_times_are_noted_and_even_ones_are_not(tmp_path):
    written(tmp_path / "even.mp4", range(0, 20 * 100, 100))
    written(tmp_path / "uneven.mp4", [*range(0, 1000, 100), *range(5000, 6000, 100)])
    assert clips.opened_clip(tmp_path / "even.mp4", every).notes == ()
    (note,) = clips.opened_clip(tmp_path / "uneven.mp4", every).notes
    assert "uneven times" in note.text


def test_a_clip_that_was_filmed_turned_is_read_upright(tmp_path):
    """The matrix of the track (box `tkhd`) says by how much; phones write it."""
    write_clip(tmp_path / "x.mp4", count=3)
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]  # 90 degrees clockwise
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    plain, turned = (clips.opened_clip(tmp_path / f"{n}.mp4", every) for n in ("x", "turned"))
    assert turned.image.size == (48, 64)
    np.testing.assert_array_equal(np.asarray(turned.image), np.rot90(np.asarray(plain.image), -1))


# ---------------------------------------------------------------- who takes clips
NAME = "qwen2_5_vl"


@pytest.fixture(scope="module")
def model():
    with load(bundle_of(NAME)[1], threads=1) as found:
        yield found


def test_a_clip_longer_than_the_model_holds_is_refused_before_it_is_decoded(model, tmp_path, monkeypatch):
    write_clip(tmp_path / "x.mp4", count=240)
    monkeypatch.setattr(clips, "_decoded", None)
    with pytest.raises(InputError, match=r"x\.mp4: 240 frames become \d+ tokens, the model holds 2048"):
        model.clip(tmp_path / "x.mp4")
    monkeypatch.undo()
    few = model.clip(tmp_path / "x.mp4", count=4)
    tokens = model.tower.clip_tokens(4, few.image.size, model.clip_rule)
    assert tokens == model.tower.clip(few.frames, model.clip_rule).tokens


def test_questions_about_clips_are_asked_as_run_asks_them(model, tmp_path):
    write_clip(tmp_path / "a.mp4")
    Image.fromarray(picture()).save(tmp_path / "b.png")
    lines = [
        {"video": "a.mp4", "frames": 4, "question": QUESTION, "answer": "x"},
        {"videos": ["a.mp4"], "fps": 2, "image": "b.png", "question": QUESTION, "answer": "x", "kind": "both"},
    ]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = user_data.load(tmp_path / "my.jsonl", 3)
    exam = Exam(model, task, lambda *_: None)
    for question, shown in zip(
        task.questions,
        ([model.clip(tmp_path / "a.mp4", count=4)], [tmp_path / "b.png", model.clip(tmp_path / "a.mp4", rate=2)]),
        strict=True,
    ):
        found = exam.answer(model, question, Budget(dense=True))
        alone = model.generate(QUESTION, shown, max_new_tokens=3, dense=True)
        stops = model.bundle.shape.stop_ids
        assert [i for i in found.ids if i not in stops] == alone.token_ids
        assert found.prefilled.request.image_tokens == alone.stats["image_tokens"]
    before = exam.fingerprint, questions_key(task)
    lines[0]["frames"] = 6
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = user_data.load(tmp_path / "my.jsonl", 3)
    after = Exam(model, task, lambda *_: None).fingerprint, questions_key(task)
    assert before[0] != after[0] and before[1] != after[1], "other frames are another question"


FILM = {"video": "a.mp4", "question": "q", "answer": "x"}
BAD_LINES = {
    "none": (FILM | {"video": "b.mp4"}, "no clip b.mp4"),
    "a URL": (FILM | {"video": "https://example.org/a.mp4"}, "clips are not fetched"),
    "no clip": (FILM | {"video": "my.jsonl"}, "cannot be read"),
    "both": (FILM | {"fps": 1, "frames": 2}, "fps and frames were given"),
    "no number": (FILM | {"fps": "1"}, "fps = '1' is not a number above 0"),
    "half a frame": (FILM | {"frames": 2.5}, "frames = 2.5 is not a number above 0"),
    "frames of nothing": ({"question": "q", "answer": "x", "frames": 2}, "frames without a clip"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name, tmp_path):
    line, words = BAD_LINES[name]
    write_clip(tmp_path / "a.mp4", count=2)
    (tmp_path / "my.jsonl").write_text(f"{json.dumps(FILM)}\n{json.dumps(line)}\n")
    with pytest.raises(InputError, match=r"my\.jsonl, line 2") as error:
        user_data.load(tmp_path / "my.jsonl")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_clips_refuses_such_questions_before_the_first(tmp_path):
    write_clip(tmp_path / "a.mp4", count=2)
    (tmp_path / "my.jsonl").write_text(json.dumps(FILM))
    with load(of_tiles("internvl")[1], threads=1) as found, pytest.raises(InputError, match="takes no clips"):
        Exam(found, user_data.load(tmp_path / "my.jsonl"), lambda *_: None)


def test_a_calibration_refuses_clips_and_reads_several_pictures(tmp_path):
    (tmp_path / "my.jsonl").write_text(json.dumps(FILM))
    with pytest.raises(InputError, match="clips are not read here"):
        read_prompts(tmp_path / "my.jsonl")
    (tmp_path / "my.jsonl").write_text(json.dumps({"images": ["a.png", "b.png"], "question": "q", "answer": "x"}))
    assert read_prompts(tmp_path / "my.jsonl")[0].images == (tmp_path / "a.png", tmp_path / "b.png")


# ---------------------------------------------------------------- clips that clients send
def film(*frames, kind="video/jpeg", **more):
    data = ",".join(base64.b64encode(frame).decode() for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{data}", **more}}


def asking(*parts):
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], "max_tokens": 3}


def test_frames_that_a_client_sends_are_answered_as_those_of_a_program(model):
    frames = [jpeg(i) for i in range(4)]
    asked = read(asking(film(*frames, fps=2.0))).asked
    (clip,) = asked.images
    assert (len(clip.frames.images), clip.frames.fps, clip.pixels) == (4, 2.0, 4 * 64 * 48)
    answer = model.generate(asked.prompts[0], asked.images, max_new_tokens=3)
    alone = model.generate(QUESTION, model.clip(frames, fps=2.0), max_new_tokens=3)
    assert answer.token_ids == alone.token_ids and answer.stats["image_tokens"] == alone.stats["image_tokens"]


CLIENTS = {
    "a file": (film(b"x" * 9, kind="video/mp4"), "files of clips are not opened"),
    "an address": (
        {"type": "video_url", "video_url": {"url": "https://example.org/x.mp4"}},
        "URLs and paths are not opened",
    ),
    "no url": ({"type": "video_url", "video_url": "x"}, "no video_url that can be read"),
    "no frames": (film(), "is empty"),
    "a frame that is none": (film(jpeg(), b"not a picture"), r"frame 1: .*of a kind that is not taken"),
    "no base64": ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,%%"}}, "no base64"),
    "other sizes": (film(jpeg(), jpeg(0, (32, 48))), "differ in size"),
    "a speed of nothing": (film(jpeg(), fps=0), "fps 0 is no number"),
    "too many": (film(*[jpeg()] * 5), "has 5 frames, at most 4"),
    "another form": ({"type": "video", "video": "x.mp4"}, "no part that can be read.*video_url"),
}


@pytest.mark.parametrize("case", CLIENTS)
def test_what_a_client_sends_as_a_clip_and_is_none_is_refused_with_a_way_out(case):
    part, words = CLIENTS[case]
    with pytest.raises(InputError, match=words) as caught:
        read(asking(part), Bounds(frames=4))
    assert caught.value.fix and "\n" not in str(caught.value)


def test_all_frames_count_against_the_pixels_of_a_request():
    with pytest.raises(InputError, match="left for this request"):
        read(asking(film(*[jpeg()] * 4)), Bounds(pixels=3 * 64 * 48))


def test_the_command_line_refuses_a_hostile_clip_in_one_line_with_its_name(tmp_path):
    sound(tmp_path / "x.wav")
    done = cm_export("run", bundle_of(NAME)[1], "--video", tmp_path / "x.wav", "--prompt", QUESTION, "--quiet")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has no pictures that move" in done.stderr
