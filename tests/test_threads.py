"""Several threads on one loaded bundle: every answer is the one that the request gets alone, whatever runs beside it."""

import sys
import threading
import time
import warnings

import pytest
from PIL import Image
from test_tensorrt_sessions import IMAGES, QUESTION, SOME, engines_of, wide

from cm_export.base import environment
from cm_export.host import images as pictures
from cm_export.host.loaded import load

THREADS = 4
QUESTIONS = (QUESTION, "describe : what color is the shape?", "describe : is there a red shape?")


@pytest.fixture(autouse=True)
def eager():
    """Threads change places a thousand times as often as they usually do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def asked(i: int) -> dict:
    """Requests that differ in picture, question, length and budget."""
    budgets = {}, {"neuron_share": 0.3}, {"dense": True}, {"token_share": 0.2}
    return {
        "prompt": QUESTIONS[i % len(QUESTIONS)],
        "images": IMAGES[i % len(IMAGES) : i % len(IMAGES) + i % 3],
        "max_new_tokens": 3 + i % 9,
        **budgets[i % len(budgets)],
    }


def together(work, threads=THREADS):
    """work(thread) in as many threads at the same time; what they raised."""
    failed, start = [], threading.Barrier(threads)

    def one(k):
        try:
            start.wait()
            work(k)
        except Exception as e:
            failed.append(e)

    running = [threading.Thread(target=one, args=(k,)) for k in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failed


def wrong_answers(model, kinds: int, each: int) -> list:
    """Answers of `each` requests per thread that are not those of the same requests alone, and errors."""
    alone = [model.generate(**asked(i)).token_ids for i in range(kinds)]
    assert len({tuple(ids) for ids in alone}) > 5, "requests that answer the same could hide a mix-up"
    wrong = []

    def work(k):
        for j in range(each):
            i = (k * 5 + j) % kinds
            found = model.generate(**asked(i)).token_ids
            if found != alone[i]:
                wrong.append((i, found, alone[i]))

    return together(work) + wrong


@pytest.mark.parametrize(("kinds", "each"), [(12, 10), wide(24, 25)])
def test_many_requests_on_four_threads_get_their_own_answers(demo_bundle, kinds, each):
    assert wrong_answers(load(demo_bundle, threads=1), kinds, each) == []


@pytest.mark.parametrize("version", SOME)
def test_threads_that_share_an_engine_get_their_own_answers(sit, version):
    assert wrong_answers(engines_of(sit(version)), kinds=9, each=4) == []


def test_threads_that_come_at_once_make_each_session_once(demo_bundle, monkeypatch):
    model = load(demo_bundle, threads=1)
    made, make = [], model.backend._load
    monkeypatch.setattr(model.backend, "_load", lambda graph, key: made.append(key) or make(graph, key))
    answers = []
    assert together(lambda k: answers.append(model.generate(**asked(1)).token_ids)) == []
    assert sorted(made) == sorted(set(made)) and len(made) == 3
    assert answers == [load(demo_bundle, threads=1).generate(**asked(1)).token_ids] * THREADS


def test_opening_pictures_in_several_threads_leaves_the_warnings_of_the_process_alone(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    before = list(warnings.filters)
    assert together(lambda k: [pictures.open_image(tmp_path / "x.png") for _ in range(60)]) == []
    assert warnings.filters == before


def test_threads_that_read_one_stream_share_its_pieces(demo_bundle):
    model = load(demo_bundle, threads=1)
    expected = model.generate(QUESTION, IMAGES[:1])
    stream, found = model.stream(QUESTION, IMAGES[:1]), []
    assert together(lambda k: found.extend(stream)) == []
    assert sorted(found) == sorted(model.stream(QUESTION, IMAGES[:1])) and stream.answer.text == expected.text


def closed_under_threads(model) -> list:
    """What requests end with that are made or under way while another thread closes the bundle."""
    asked_once, closed = threading.Barrier(THREADS), threading.Event()

    def work(k):
        model.generate(**asked(k))
        asked_once.wait()
        if k == 0:
            model.close()
            closed.set()
        while not closed.is_set():
            model.generate(**asked(k))
        model.generate(**asked(k))

    return together(work)


def test_closing_a_bundle_ends_the_requests_of_other_threads_in_words(demo_bundle):
    failed = closed_under_threads(load(demo_bundle, threads=1))
    assert len(failed) == THREADS and all("was closed; load it again" in str(e) for e in failed), failed


@pytest.mark.parametrize("version", ["10.16.1.11"])
def test_closing_engines_ends_the_requests_of_other_threads_in_words(sit, version):
    failed = closed_under_threads(engines_of(sit(version)))
    assert len(failed) == THREADS and all("was closed; load it again" in str(e) for e in failed), failed


def test_threads_rest_as_soon_as_a_session_is_done(demo_bundle, monkeypatch):
    """The session that comes next needs their processors; looking for work they would keep them for 50 ms."""
    monkeypatch.setattr(environment, "processors", lambda: 2)  # a test process may have one
    model = load(demo_bundle, threads=2)
    spent = []
    for _ in range(5):
        model.generate(QUESTION, images=IMAGES[:1], max_new_tokens=3)
        before = time.process_time()
        time.sleep(0.06)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.01, spent
