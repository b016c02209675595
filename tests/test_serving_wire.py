"""One request from the wire: what is taken, what is refused in the client's own words, and what may not grow."""

import base64
import json
import struct
import time
import zlib

import pytest

from cm_export.base.errors import InputError
from cm_export.recipe.aliases import DEMO
from cm_export.serving import wire
from cm_export.serving.messages import Bounds
from cm_export.serving.metrics import FIGURES, Measured, Prometheus
from cm_export.serving.plain import parse
from cm_export.serving.wire import read

IMAGE = (DEMO.parent / "images" / "teal-circle.png").read_bytes()
URI = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
PICTURE = {"type": "image_url", "image_url": {"url": URI}}
TEXT = {"type": "text", "text": "What is this?"}


def asking(*parts, **fields):
    return {"messages": [{"role": "user", "content": list(parts) or "What is this?"}], **fields}


def png(width, height, data=b""):
    """A PNG of that size whose pixels are missing, or are `data`."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def uri(data, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def test_a_request_says_everything_that_the_command_line_can():
    fields = {
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "stop": ["\n", "."],
        "stream": True,
    }
    ours = {"token_share": 0.25, "neuron_share": 0.5, "guard": 8, "deadline": 2, "kept": True, "min_tokens": 2}
    wanted = read(asking(TEXT, PICTURE, **fields, **ours, stream_options={"include_usage": True}, user="me", n=1))
    asked = wanted.asked
    assert asked.prompts == ["What is this?"] and [p.image.size for p in asked.images] == [(64, 64)]
    assert (asked.budget.token_share, asked.budget.neuron_share, asked.budget.seed) == (0.25, 0.5, 3)
    assert (asked.limits.max_new_tokens, asked.limits.guard) == (9, 8)
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.7, 0.9, 5, 3)
    assert sampling.stop == ("\n", ".") and sampling.min_new_tokens == 2
    assert (wanted.stream, wanted.usage, wanted.kept, wanted.deadline) == (True, True, True, 2.0)
    assert not asked.control_tokens


def test_several_turns_keep_their_order_and_an_answer_that_a_client_sends_back_is_taken():
    back = {"role": "assistant", "content": "A circle.", "refusal": None, "annotations": [], "tool_calls": None}
    first = {"role": "user", "content": [TEXT, PICTURE]}
    said = [{"role": "developer", "content": "Be brief."}, first, back, {"role": "user", "content": "Sure?"}]
    asked = read({"messages": said}).asked
    assert (asked.system, asked.prompts, asked.answers) == ("Be brief.", ["What is this?", "Sure?"], ["A circle."])
    assert len(asked.images) == 1


def test_pictures_may_come_beside_the_messages_as_bytes():
    assert [p.image.size for p in read(asking(), pictures=[IMAGE, memoryview(IMAGE)]).asked.images] == [(64, 64)] * 2
    with pytest.raises(InputError, match="some stand among the messages"):
        read(asking(TEXT, PICTURE), pictures=[IMAGE])


def test_what_a_client_leaves_open_is_decided_as_the_command_line_does():
    wanted = read(asking(temperature=0, top_p=0.9, seed=None))
    assert wanted.asked.sampling.temperature == 0 and wanted.asked.sampling.top_p is None  # greedy has no use for it
    assert read(asking()).asked.limits.max_new_tokens == Bounds().tokens
    assert read(asking()).asked.limits.guard is None and not wanted.stream


REFUSED = [
    (asking(tempurature=1), "body: unknown field 'tempurature'; did you mean 'temperature'"),
    (asking(n=2), "n: 2 is not supported"),
    (asking(n=True), "n: True"),
    (asking(logprobs=True), "logprobs"),
    (asking(tools=[{"type": "function"}]), "tools: a list of 1"),
    (asking(max_tokens=0), "max_tokens: is 0"),
    (asking(max_tokens=10**9), "max_tokens: is 1000000000; give 1 to 1024"),
    (asking(max_tokens=1.5), "max_tokens: 1.5"),
    (asking(max_tokens=1, max_completion_tokens=2), "max_tokens: differs"),
    (asking(min_tokens=5, max_tokens=2), "min_tokens: at least 5 tokens are asked for"),
    (asking(temperature="hot"), "temperature: 'hot'"),
    (asking(temperature=-1), "temperature: -1"),
    (asking(temperature=True), "temperature: True"),
    (asking(top_p=2), "top_p: 2"),
    (asking(seed=-1), "seed"),
    (asking(stop=[""]), "stop"),
    (asking(stop=["a"] * 17), "stop"),
    (asking(stop=["\ud800"]), "stop: is not valid text"),
    (asking(token_share=7), "token_share: 7 is not above 0 and up to 1"),
    (asking(dense=1), "dense: is 1"),
    (asking(dense=True, neuron_share=0.5), "dense: means all neurons"),
    (asking(guard=1), "guard: is 1"),
    (asking(stream="yes"), "stream: is 'yes'"),
    (asking(stream_options={"include_usage": True}), "stream_options: is for streams only"),
    (asking(deadline=0), "deadline: is 0"),
    (asking(model=3), "model: is a number"),
    ([], "body: is a list"),
    ({}, "messages: is missing"),
    ({"messages": "hello"}, "messages: is a text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "its role is 'tool'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "its role is a list of 1"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "has a field 'name'"),
    ({"messages": [{"role": "user"}]}, "its content is a null"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "the roles are assistant"),
    ({"messages": [{"role": "user", "content": ""}]}, "has no text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not valid text"),
    (asking({"type": "text", "text": 3}), r"messages\[0\].content\[0\]: is a number"),
    (asking({"type": "input_audio", "input_audio": {}}), "type 'input_audio'"),
    (asking(TEXT, {"type": "image", "image": "/etc/passwd"}), "type 'image'"),
    (asking(TEXT, {"type": "image_url", "image_url": URI}), "is no image_url that can be read"),
    (asking(TEXT, {"type": "image_url", "image_url": {"url": URI, "detail": "much"}}), "detail 'much'"),
    (asking(TEXT, uri(b"")), "is empty"),
    (asking(TEXT, uri(b"<svg></svg>")), "an SVG drawing"),
    (asking(TEXT, uri(b"II*\0" + bytes(50))), "send PNG, JPEG"),
    (asking(TEXT, uri(IMAGE[:60])), "damaged|truncated"),
    (asking(*[PICTURE] * 9), "more than 8 pictures"),
    ({"messages": [*[{"role": r, "content": [TEXT, PICTURE]} for r in ("user", "assistant")], *asking()["messages"]]}, "picture"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_cannot_be_answered_is_refused_in_the_clients_words(request_, words):
    with pytest.raises(InputError, match=words) as refused:
        read(request_)
    assert refused.value.where and len(str(refused.value)) < 1200


@pytest.mark.parametrize(
    "url",
    ["https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "a.png", "http://169.254.169.254/", "ftp://x/y.png",
     "data:text/html;base64,PGI+", "data:image/png,abc", "data:image/png;base64,%%%", "", "DATA:", "\u212a:x"],
)  # fmt: skip
def test_nothing_but_the_picture_itself_is_taken(url, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(InputError, match=r"URLs and paths are not opened|no base64"):
        read(asking(TEXT, {"type": "image_url", "image_url": {"url": url}}))


def test_a_picture_is_measured_before_it_is_decoded():
    bomb = png(8000, 8000, bytes(8000 * 3))  # 64 million pixels in some hundred bytes
    assert len(bomb) < 500
    started = time.monotonic()
    with pytest.raises(InputError, match="has 64 million pixels, 50 million are left"):
        read(asking(TEXT, uri(bomb)))
    with pytest.raises(InputError, match="far too many pixels"):
        read(asking(TEXT, uri(png(60000, 60000))))
    small = Bounds(pixels=64 * 64 * 2)
    assert len(read(asking(TEXT, PICTURE, PICTURE), small).asked.images) == 2
    with pytest.raises(InputError, match="0 million are left for this request"):
        read(asking(TEXT, PICTURE, PICTURE, PICTURE), small)
    with pytest.raises(InputError, match=r"more than .* MiB"):
        read(asking(TEXT, PICTURE), Bounds(picture_bytes=100))
    assert time.monotonic() - started < 1


BODIES = [
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b"[[]," + b"[]," * 200_000, "more than 250000 values"),
    (b'{"n": ' + b"1" * 100_000 + b"}", "a number that is too long"),
    (b'{"temperature": NaN}', "NaN is no number of JSON"),
    (b'{"temperature": 1e999}', None),
    (b'{"a": 1, "a": 2}', "twice"),
    (b"\xff\xfe", "UTF-8"),
    (b"{", "is no JSON"),
    (b"", "is no JSON"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[str(words) for _, words in BODIES])
def test_a_body_that_is_no_request_is_refused_quickly(body, words):
    started = time.monotonic()
    with pytest.raises(InputError, match=words):
        read(parse(body))
    assert time.monotonic() - started < 1


def test_no_value_of_a_client_comes_back_longer_than_a_line():
    long = "x" * 1_000_000
    for request in (asking(**{long: 1}), asking(temperature=long), asking(guard=long), asking(model=long),
                    {"messages": [{"role": long, "content": "x"}]}, asking(dense=[long] * 9)):  # fmt: skip
        with pytest.raises(InputError) as refused:
            read(request)
        assert len(str(refused.value)) < 1500
    with pytest.raises(InputError, match="at most 200000 are taken"):
        read(asking({"type": "text", "text": long}))


def test_every_field_is_of_one_kind():
    fields = [*wire.OURS, *wire.OPENAI, *wire.IGNORED, *wire.NEUTRAL]
    assert len(fields) == len(set(fields))
    assert parse(json.dumps(asking(TEXT)).encode()) == asking(TEXT)


def test_an_answer_is_counted_once_in_each_of_its_figures():
    stats = {
        "queue_s": 0.5, "ttft_s": 0.25, "prompt_tokens": 90, "new_tokens": 10, "neurons": 8, "neurons_kept": 4,
        "image_tokens": 64, "image_tokens_kept": 16, "tokens_per_s": 40.0,
        "guard": {"drafted": 9, "kept": 6, "actions": ["more neurons"]},
    }  # fmt: skip
    sink = Prometheus()
    measured = Measured(sink)
    measured.waiting(2, 1)
    measured.step(3, 0.01)
    measured.ended("answered", type("Answer", (), {"stats": stats}), 1.5)
    measured.ended("refused", None, 0.0)
    lines = sink.text()[0].decode().splitlines()
    assert {
        "cm_export_requests_waiting 2.0", "cm_export_requests_running 1.0", 'cm_export_requests_total{outcome="answered"} 1.0',
        'cm_export_requests_total{outcome="refused"} 1.0', "cm_export_queue_seconds_sum 0.5",
        "cm_export_time_to_first_token_seconds_sum 0.75", "cm_export_request_seconds_sum 1.5", "cm_export_batch_rows_sum 3.0",
        'cm_export_tokens_total{kind="prompt"} 90.0', 'cm_export_tokens_total{kind="answer"} 10.0',
        "cm_export_image_tokens_kept_share_sum 0.25", "cm_export_neurons_kept_share_sum 0.5",
        'cm_export_guard_tokens_total{kind="drafted"} 9.0', 'cm_export_guard_interventions_total{action="more neurons"} 1.0',
    } <= set(lines)  # fmt: skip
    for figure in FIGURES:
        assert any(
            line.startswith((f"{figure.name} ", f"{figure.name}{{", f"{figure.name}_count")) for line in lines
        ), figure.name
