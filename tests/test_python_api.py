"""The Python API: what it answers, what it takes as prompts and pictures, what it refuses, and what it leaves behind."""

import ctypes
import gc
import io
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import cm_export
from cm_export.base.errors import InputError
from cm_export.host import decode as decoding
from cm_export.host import images as pictures
from cm_export.recipe.aliases import DEMO

ROOT = Path(__file__).parent.parent
IMAGES = sorted((DEMO.parent / "images").glob("*.png"))
QUESTION = "describe : what shape is in the image?"


@pytest.fixture(scope="module")
def model(demo_bundle):
    with cm_export.load(demo_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def whole(whole_bundle):
    """Its cache stays whole, so it converses and drafts."""
    with cm_export.load(whole_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def answer(model):
    return model.generate(QUESTION, IMAGES[0])


# ---------------------------------------------------------------- what it answers


def test_importing_it_imports_nothing_heavy():
    code = "import sys, cm_export; print(sorted({'numpy', 'onnxruntime', 'torch', 'PIL', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    assert all(getattr(cm_export, name) for name in cm_export.__all__)
    assert set(cm_export.__all__) <= set(dir(cm_export))
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        cm_export.lode  # noqa: B018


def test_the_marker_of_a_typed_package_is_shipped():
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / "cm_export" / "py.typed").is_file() and "py.typed" in data["cm_export"]


def test_a_stream_is_the_answer_in_pieces(model, answer):
    stream = model.stream(QUESTION, IMAGES[0])
    assert stream.answer is None
    found = list(stream)
    assert len(found) > 3 and "".join(found) == answer.text
    assert stream.answer.token_ids == answer.token_ids and next(stream, None) is None


def test_a_stream_counts_no_time_for_which_its_reader_let_it_wait(model, monkeypatch):
    import time

    stream = model.stream(QUESTION, IMAGES[0])
    for piece in stream:
        if piece:
            time.sleep(0.1)
    assert stream.answer.stats["decode_s"] < 0.5 < 0.1 * len(stream.answer.token_ids)


def test_a_stream_that_is_closed_early_frees_its_row(model, monkeypatch):
    rows = weakref.WeakSet()
    make = decoding.Batch.__init__

    def watched(self, backend, given=()):
        rows.update(given)
        make(self, backend, given)

    monkeypatch.setattr(decoding.Batch, "__init__", watched)
    stream = model.stream(QUESTION, IMAGES[0])
    next(stream)
    assert len(rows) == 1
    stream.close()
    gc.collect()
    assert len(rows) == 0 and list(stream) == [] and stream.answer is None


def test_requests_can_be_made_while_a_stream_is_open(model, answer):
    said = []
    for piece in model.stream(QUESTION, IMAGES[0]):
        assert model.generate(QUESTION, IMAGES[0]).token_ids == answer.token_ids
        said.append(piece)
    assert "".join(said) == answer.text


def requests():
    """Unequal in everything."""
    budgets = {}, {"neuron_share": 0.3}, {"dense": True}, {"token_share": 0.2}, {"max_new_tokens": 1}, {"seed": 3}
    words = QUESTION, "describe : is there a red shape?", "what color is the shape?", "describe"
    return [
        {"prompt": words[i % 4], "images": IMAGES[: i % 3], "max_new_tokens": 4 + 3 * (i % 5), **budgets[i % 6]}
        for i in range(14)
    ]


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_each_request_of_a_batch_gets_what_it_gets_alone(model, at_once):
    alone = [model.generate(**request) for request in requests()]
    assert len({tuple(a.token_ids) for a in alone}) > 6
    found = model.batch(requests(), at_once=at_once)
    assert [a.token_ids for a in found] == [a.token_ids for a in alone]
    assert [a.text for a in found] == [a.text for a in alone]
    timed = re.compile(".*(_s|bytes)")
    for one, other in zip(found, alone, strict=True):
        same = {k: v for k, v in other.stats.items() if not timed.fullmatch(k)}
        assert one.stats == one.stats | same
        assert all(np.array_equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))


def test_a_batch_decodes_together(model, monkeypatch):
    sizes = []
    read = decoding.Batch.read
    monkeypatch.setattr(decoding.Batch, "read", lambda self: (sizes.append(len(self.rows)), read(self))[1])
    model.batch([{"prompt": QUESTION, "images": IMAGES[0], "max_new_tokens": 9}] * 5, at_once=3)
    assert max(sizes) == 3 and sum(sizes) < 60
    assert model.batch([]) == []
    assert [a.text for a in model.batch((QUESTION, QUESTION))] == [model.generate(QUESTION).text] * 2


def test_messages_are_one_prompt(model, answer):
    asked = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": QUESTION}]
    assert model.generate([{"role": "user", "content": asked}]).token_ids == answer.token_ids
    assert model.generate([{"role": "user", "content": QUESTION}], images=IMAGES[0]).token_ids == answer.token_ids
    said = [{"role": "system", "content": "describe the image ."}, {"role": "user", "content": asked}]
    system = model.generate(QUESTION, IMAGES[0], system="describe the image .")
    assert model.generate(said).stats["prompt_tokens"] == system.stats["prompt_tokens"] != answer.stats["prompt_tokens"]
    assert model.generate(said).token_ids == system.token_ids


def test_messages_with_answers_are_what_a_conversation_says(whole):
    talk = whole.conversation(IMAGES[0], dense=True)
    first, second = talk.ask(QUESTION), talk.ask("describe : is there a red shape?")
    asked = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": QUESTION}]
    said = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
        {"role": "user", "content": "describe : is there a red shape?"},
    ]
    found = whole.generate(said, dense=True)
    silent = [said[0], {"role": "assistant", "content": ""}, said[2]]  # as an answer may be
    assert whole.generate(silent, dense=True).stats["prompt_tokens"] < found.stats["prompt_tokens"]
    assert found.token_ids == second.token_ids
    assert found.stats["prompt_tokens"] == second.stats["prompt_tokens"] > first.stats["prompt_tokens"]


def test_the_guard_takes_a_number_or_true(whole):
    dense = whole.generate(QUESTION, IMAGES[0], dense=True)
    for guard, every in ((4, 4), (True, 16)):
        found = whole.generate(QUESTION, IMAGES[0], neuron_share=0.2, guard=guard)
        assert found.token_ids == dense.token_ids and found.stats["guard"]["every"] == every
    assert "guard" not in whole.generate(QUESTION, IMAGES[0], guard=False).stats


# ---------------------------------------------------------------- conversations


@pytest.mark.parametrize("closed_at", range(3))
def test_a_conversation_whose_stream_was_closed_goes_on_as_if_it_had_not_been_asked(closed_at, whole, monkeypatch):
    monkeypatch.setattr(whole.chat, "stop_ids", frozenset())  # so that no answer is empty
    talk, plain = whole.conversation(IMAGES[0]), whole.conversation(IMAGES[0])
    for number, question in enumerate((QUESTION, "describe : is there a red shape?", "what color is the shape?")):
        if number == closed_at:
            with talk.stream("describe : what is the blue shape?", 9) as stream:
                assert next(stream) and stream.answer is None
        assert talk.ask(question, 9).token_ids == plain.ask(question, 9).token_ids


def test_a_conversation_that_is_answering_refuses_another_question(whole):
    talk = whole.conversation(IMAGES[0])
    stream = talk.stream(QUESTION)
    next(stream)
    with pytest.raises(InputError, match=r"conversation: is still answering .* read or close its stream first"):
        talk.ask(QUESTION)
    rest = list(stream)
    assert rest and talk.ask(QUESTION).text


def test_what_a_reader_of_the_text_raises_leaves_the_conversation_free(whole):
    talk = whole.conversation(IMAGES[0])

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:  # `held` keeps the frames alive, as a notebook does
        talk.ask(QUESTION, on_text=stop)
    assert held and talk.ask(QUESTION).text


# ---------------------------------------------------------------- pictures

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "RGBX"]


def picture(mode: str) -> Image.Image:
    """Half transparent where the mode knows it."""
    with Image.open(IMAGES[0]) as image:
        image = image.convert("RGB")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_picture_of_any_mode_is_what_its_file_is(mode, model, tmp_path):
    given = picture(mode)
    before = given.tobytes()
    suffix = "tiff" if mode in ("CMYK", "YCbCr", "I", "RGBX", "PA", "HSV") else "png"
    saved = given.convert("RGBA") if mode == "PA" else given.convert("RGB") if mode in ("HSV", "RGBX") else given
    saved.save(tmp_path / f"x.{suffix}")
    read = pictures.open_image(tmp_path / f"x.{suffix}")
    assert np.array_equal(np.asarray(pictures.given(given, "x").image), np.asarray(read))
    assert given.tobytes() == before, "the caller's picture stays as it is"
    assert model.generate(QUESTION, given).token_ids == model.generate(QUESTION, tmp_path / f"x.{suffix}").token_ids


def test_path_bytes_file_array_and_list_are_the_same_picture(model, answer):
    data = IMAGES[0].read_bytes()
    array = np.asarray(Image.open(IMAGES[0]).convert("RGB"))
    backwards = np.asfortranarray(array[:, ::-1])[:, ::-1]
    for given in (str(IMAGES[0]), IMAGES[0], data, bytearray(data), memoryview(data), array, backwards):
        for images in (given, [given], (given,), iter([given])):
            assert model.generate(QUESTION, images).token_ids == answer.token_ids
    for none in ((), [], None):
        assert model.generate("describe", none).stats["image_tokens"] == 0


def test_a_picture_that_stands_on_its_side_is_turned_as_its_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as given:
        assert pictures.given(given, "x").image.size == (40, 60) == pictures.open_image(tmp_path / "x.jpg").size
    assert pictures.given((tmp_path / "x.jpg").read_bytes(), "x").image.size == (40, 60)


def a_closed_picture() -> Image.Image:
    with Image.open(IMAGES[0]) as image:
        pass
    return image


WRONG_PICTURES = [
    (b"", r"images\[0\]: is empty"),
    (b"hello", r"images\[0\]: is not a picture that can be read"),
    (IMAGES[0].read_bytes()[:200], r"images\[0\]: damaged or truncated"),
    ("missing.png", r"missing\.png: no such file"),
    (Path("/"), r"/: is a directory"),
    ("https://example.org/x.png", "URLs are not fetched"),
    (np.zeros((64, 64)), r"images\[0\]: an array of float64\[64, 64\] is not taken as a picture"),
    (np.zeros((64, 64, 3)), r"float64\[64, 64, 3\] is not taken as a picture; give a path"),
    (np.zeros((64, 64), np.uint8), r"uint8\[64, 64\] is not"),
    (np.zeros((3, 64, 64), np.uint8), r"uint8\[3, 64, 64\] is not"),
    (np.zeros((64, 64, 4), np.uint8), r"uint8\[64, 64, 4\] is not"),
    (np.zeros((1, 64, 64, 3), np.uint8), r"uint8\[1, 64, 64, 3\] is not"),
    (np.zeros((0, 64, 3), np.uint8), r"images\[0\]: "),
    (np.zeros((1, 300, 3), np.uint8), r"images\[0\]: 300x1 pixels is too long and thin"),
    ([IMAGES[0], Image.new("RGB", (1, 300))], r"images\[1\]: 1x300 pixels is too long and thin"),
    ([[IMAGES[0]]], r"images\[0\]: list is not taken as a picture"),
    ([None], r"images\[0\]: NoneType is not taken"),
    (7, "images: is a int; give a list of pictures"),
    ({"a": IMAGES[0]}, "images: is a dict"),
    (io.BytesIO(b"x"), r"images\[0\]: BytesIO is not taken as a picture"),
    (Image.new("F", (64, 64)), r"images\[0\]: holds float pixels"),
    (Image.new("I", (64, 64), 100_000), r"images\[0\]: has 32 bits per pixel"),
    (a_closed_picture, r"images\[0\]: its pixels cannot be read .* before its file is closed"),
]


@pytest.mark.parametrize(("images", "words"), WRONG_PICTURES, ids=range(len(WRONG_PICTURES)))
def test_what_is_no_picture_is_refused_in_one_line(images, words, model):
    with pytest.raises(InputError, match=words) as caught:
        model.stream(QUESTION, images() if callable(images) else images)
    assert "\n" not in str(caught.value)


def test_a_picture_in_memory_has_the_same_limit_of_pixels_as_a_file(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    buffer = io.BytesIO()
    Image.new("RGB", (2001, 1000)).save(buffer, "png")
    for given in (Image.new("L", (2001, 1000)), np.zeros((1000, 2001, 3), np.uint8), buffer.getvalue()):
        with pytest.raises(InputError, match="x: more than 2 million pixels"):
            pictures.given(given, "x")


# ---------------------------------------------------------------- arguments

USER = {"role": "user", "content": "hello"}
SHOWN = {"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "what ?"}]}
WRONG = [
    ({"prompt": ""}, "prompt: is empty"),
    ({"prompt": " \n"}, "prompt: is empty"),
    ({"prompt": None}, "prompt: is a NoneType; give a text, or a list of messages"),
    ({"prompt": b"what"}, "prompt: is a bytes"),
    ({"prompt": 3}, "prompt: is a int"),
    ({"prompt": []}, "messages: the roles are none"),
    ({"prompt": ["what ?"]}, "messages: the roles are None"),
    ({"prompt": [USER, USER]}, "messages: the roles are user, user; give an optional system message"),
    ({"prompt": [USER, {"role": "assistant", "content": "a"}]}, "messages: the roles are user, assistant"),
    ({"prompt": [{"role": "tool", "content": "a"}]}, "the roles are tool"),
    ({"prompt": [{"role": "user"}]}, r"messages\[0\]: its content is a NoneType"),
    ({"prompt": [{"role": "user", "content": " "}]}, r"messages\[0\]: has no text"),
    ({"prompt": [{"role": "user", "content": SHOWN["content"][::-1]}]}, "is a picture after text"),
    (
        {"prompt": [USER, {"role": "assistant", "content": "a"}, SHOWN]},
        r"messages\[2\]: has a picture; they stand before",
    ),
    ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"block 0: is not a block .* 'image_url'"),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "is not a block that can be read"),
    ({"prompt": [SHOWN], "images": IMAGES[0]}, "images: some stand among the messages, too"),
    ({"prompt": [{"role": "system", "content": "s"}, USER], "system": "t"}, "system: stands among the messages, too"),
    ({"system": 3}, "system: is a int"),
    ({"max_new_tokens": 0}, "max_new_tokens: is 0; give 1 or more"),
    ({"max_new_tokens": -5}, "max_new_tokens: is -5"),
    ({"max_new_tokens": 2.0}, "max_new_tokens: 2.0 is not a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens: True is not a whole number"),
    ({"max_new_tokens": None}, "max_new_tokens: None is not a whole number"),
    ({"neuron_share": 0}, "neuron_share: 0 is not above 0"),
    ({"neuron_share": 40}, "neuron_share: 40 is not above 0 and up to 1; for 40 % write 0.4"),
    ({"neuron_share": float("nan")}, "neuron_share: nan is not"),
    ({"token_share": "0.4"}, "token_share: '0.4' is not a number"),
    ({"token_share": -0.1}, "token_share: -0.1 is not above 0"),
    ({"dense": True, "token_share": 0.4}, "dense: means all neurons and all tokens; leave"),
    ({"dense": "yes"}, "dense: is 'yes'"),
    ({"dense": True, "guard": 4}, "guard: a dense answer needs no guard"),
    ({"seed": -1}, "seed: is -1; give 0 to 2147483647"),
    ({"seed": 2**31}, "seed: is 2147483648"),
    ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
    ({"guard": 1}, "guard: is 1; give 2 or more"),
    (
        {"guard": 4},
        "token-cache index|guard: checks one request at a time",
    ),  # this bundle drops the cache of cut tokens
    ({"prompt": "what \ud800 ?"}, "prompt: is not valid text"),
    ({"system": "\ud800"}, "system: is not valid text"),
    ({"prompt": [{"role": "user", "content": "\ud800"}]}, r"messages\[0\]: is not valid text"),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=str)
def test_an_argument_that_is_wrong_is_refused_in_one_line(given, words, model):
    for ask in (model.generate, lambda **given: model.batch([QUESTION, given])):
        with pytest.raises(InputError, match=words) as caught:
            ask(**{"prompt": QUESTION} | given)
        assert "\n" not in str(caught.value)


def test_a_stream_refuses_arguments_before_its_first_piece(model):
    for given, words in WRONG:
        with pytest.raises(InputError, match=words):
            model.stream(**{"prompt": QUESTION} | given)


def test_a_wrong_request_of_a_batch_is_named_before_any_is_answered(model, monkeypatch):
    monkeypatch.setattr(model.backend, "prefill", None)
    for request, words in [
        ({"prompt": ""}, "request 1: prompt: is empty"),
        ({"promt": "x"}, "request 1: unknown key 'promt'; did you mean 'prompt'"),
        ({"images": IMAGES[0]}, "request 1: has no prompt"),
        ({"prompt": "x", "guard": 4}, "request 1: guard: checks one request at a time"),
        ({"prompt": "x", "on_text": print}, "request 1: unknown key 'on_text'"),
        (
            {"prompt": "x", "images": [np.zeros((1, 300, 3), np.uint8)]},
            r"request 1: images\[0\]: 300x1 pixels is too long and thin",
        ),
        (None, "request 1: prompt: is a NoneType"),
    ]:
        with pytest.raises(InputError, match=words):
            model.batch([QUESTION, request])
    for requests_, words in [("what ?", "batch: is a str"), (None, "batch: is a NoneType"), ({}, "batch: is a dict")]:
        with pytest.raises(InputError, match=words):
            model.batch(requests_)
    with pytest.raises(InputError, match="at_once: is 0"):
        model.batch([QUESTION], at_once=0)


def test_a_request_too_long_for_the_model_is_named_by_its_number(model):
    longest = model.bundle.shape.max_positions
    with pytest.raises(InputError, match=rf"request 1: prompt: \d+ tokens, the model holds {longest}"):
        model.batch([QUESTION, "is there a circle? " * longest])


def test_a_conversation_checks_its_arguments(model, whole):
    with pytest.raises(InputError, match="neuron_share: 2 is not"):
        whole.conversation(neuron_share=2)
    with pytest.raises(InputError, match="token-cache index"):
        model.conversation()
    talk = whole.conversation()
    for given, words in [({"prompt": [USER]}, "prompt: is a list"), ({"max_new_tokens": 0}, "max_new_tokens: is 0")]:
        with pytest.raises(InputError, match=words):
            talk.ask(**{"prompt": QUESTION} | given)


def test_numbers_of_numpy_are_numbers(model):
    given = {"max_new_tokens": np.int64(3), "neuron_share": np.float32(0.5), "seed": np.int32(3), "dense": np.False_}
    assert len(model.generate(QUESTION, IMAGES[0], **given).token_ids) == 3


def test_load_refuses_what_is_no_bundle(tmp_path, demo_bundle):
    for given, words in [
        ({"path": 3}, "load: a bundle is a directory, not a int"),
        ({"path": tmp_path / "none.plan"}, "none.plan: no such bundle"),
        ({"path": tmp_path}, "not a bundle"),
        ({"path": demo_bundle, "threads": -1}, "threads: is -1; give 0 or more"),
        ({"path": demo_bundle, "threads": "2"}, "threads: '2' is not a whole number"),
        ({"path": "x" * 5000}, "cannot be opened .File name too long"),
        ({"path": demo_bundle, "backend": 3}, "backend: is a int; give a name"),
        ({"path": demo_bundle, "backend": "onnx"}, "unknown backend 'onnx'; did you mean 'onnxruntime'"),
    ]:
        with pytest.raises(InputError, match=words):
            cm_export.load(**given)


# ---------------------------------------------------------------- what it leaves behind


def test_a_closed_bundle_says_so_whatever_is_asked(whole_bundle):
    with cm_export.load(whole_bundle, threads=1) as model:
        talk, stream = model.conversation(IMAGES[0]), model.stream(QUESTION, IMAGES[0])
        unread = model.stream(QUESTION)
        assert talk.ask(QUESTION).text and next(stream)
    model.close()
    for use in (
        lambda: model.generate(QUESTION),
        lambda: model.stream(QUESTION),
        lambda: model.batch([QUESTION]),
        lambda: model.conversation(),
        model.__enter__,
        lambda: talk.ask(QUESTION),
        lambda: talk.stream(QUESTION),
        lambda: next(stream),
        lambda: list(unread),
        lambda: model.see([Image.new("RGB", (64, 64))]),
    ):
        with pytest.raises(InputError, match="was closed; load it again"):
            use()


def test_a_loaded_bundle_is_not_sent_to_another_process(model):
    import pickle

    with pytest.raises(
        InputError, match="cannot be copied or sent to another process; load it in the process that asks"
    ):
        pickle.dumps(model)


def test_closing_frees_the_sessions(demo_bundle):
    model = cm_export.load(demo_bundle, threads=1)
    model.generate(QUESTION, IMAGES[0])
    backend = weakref.ref(model.backend)
    sessions = [weakref.ref(s) for s in model.backend._sessions.values()]
    model.close()
    gc.collect()
    assert sessions and backend() is None and all(s() is None for s in sessions)


def growth(kind: str, bundle: str) -> int:
    """Bytes by which this process has grown over 56 requests, after 28; a batch takes two at once."""
    model, rounds = cm_export.load(bundle, threads=1), 14 if kind == "batch" else 28

    def some(n):
        for i in range(n):
            given = requests()[i % 14]
            if kind == "generate":
                model.generate(**given)
            elif kind == "batch":
                model.batch([given] * 2)
            else:
                with model.stream(**given) as stream:
                    next(stream, None)

    def resident() -> int:
        gc.collect()
        trim = getattr(
            ctypes.CDLL(None), "malloc_trim", None
        )  # what the C library keeps for later differs from run to run
        if trim is not None:
            trim(0)
        return psutil.Process().memory_info().rss

    some(rounds)  # arenas and spare rows grow to what the largest request needs, and hold what the last one left
    before = resident()
    some(2 * rounds)
    return resident() - before


@pytest.mark.parametrize("kind", ["generate", "closed streams", "batch"])
def test_memory_stays_flat_over_many_requests(kind, demo_bundle):
    """In a process of its own: what other tests have left here would give and take memory meanwhile."""
    code = f"import test_python_api; print(test_python_api.growth({kind!r}, {str(demo_bundle)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout.split()[-1]) < 6e6


# ---------------------------------------------------------------- the page


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_examples_of_the_page_run_one_after_the_other(demo_bundle, monkeypatch, capsys):
    code = "\n".join(examples())
    assert len(examples()) > 6 and "artifacts/demo.plan" in code
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(code.replace("artifacts/demo.plan", os.fspath(demo_bundle)), "python.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "teal circle" in shown and "prompt: is empty; ask something" in shown and "yellow rectangle" in shown
    names["model"].close()


def test_the_page_lists_every_argument():
    import inspect

    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `")))
    )
    assert named == set(inspect.signature(cm_export.LoadedBundle.stream).parameters) - {"self"}
