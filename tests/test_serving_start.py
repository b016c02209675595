"""How a server starts: how it divides its cores, and that it is ready only when it has answered a question of its own."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from test_serve import model, sent, serving  # noqa: F401  # a fixture

from cm_export.base import environment
from cm_export.recipe.recipe import TINY
from cm_export.serving import app
from cm_export.serving.cores import divided
from cm_export.serving.triton import opened
from cm_export.serving.triton_settings import Settings
from cm_export.serving.warm_up import largest, warm


def bundle(weights=TINY - 1, backend="onnxruntime"):
    return SimpleNamespace(recipe=SimpleNamespace(backend=backend), shape=SimpleNamespace(weights=weights))


@pytest.mark.parametrize(
    ("weights", "threads", "lanes", "found"),
    [
        (TINY - 1, 0, 0, (1, 8)),  # a tiny model: a lane for each core
        (TINY, 0, 0, (0, 1)),  # any other: all cores for one lane
        (TINY, 0, 2, (4, 2)),
        (TINY - 1, 0, 1, (0, 1)),
        (TINY - 1, 2, 0, (2, 1)),
        (TINY - 1, 3, 5, (3, 5)),
        (TINY, 0, 99, (1, 99)),
    ],
)
def test_cores_become_lanes_for_a_tiny_model_and_threads_of_one_lane_for_any_other(
    weights, threads, lanes, found, monkeypatch
):
    monkeypatch.setattr(environment, "default_threads", lambda: 8)
    assert divided(bundle(weights), None, threads, lanes, 64) == found


def test_lanes_are_no_more_than_requests_and_one_where_a_backend_takes_one_call_at_a_time(monkeypatch):
    monkeypatch.setattr(environment, "default_threads", lambda: 8)
    assert divided(bundle(), None, 0, 0, 3) == (1, 3)
    assert divided(bundle(), "tensorrt", 0, 0, 8) == divided(bundle(backend="tensorrt"), None, 0, 0, 8) == (0, 1)
    assert divided(bundle(backend="tensorrt"), "onnxruntime", 0, 0, 8) == (1, 8)


def test_a_server_is_ready_when_it_has_answered_about_the_largest_picture_and_not_before(model, monkeypatch):  # noqa: F811
    asked, go = [], threading.Event()

    def late(of, side):
        asked.append(side)
        assert go.wait(20)
        warm(of, side)

    monkeypatch.setattr(app, "warm", late)
    timer = threading.Timer(0.2, go.set)
    seen = []

    def watch(url):
        seen.append(sent(url, method="GET", path="/readyz")[0])
        return seen[-1]

    with serving(model, ready=False, warm_up=True) as (url, _):
        assert watch(url) == 503 and sent(url, method="GET", path="/healthz")[0] == 200
        timer.start()
        while watch(url) == 503:
            time.sleep(0.02)
        assert seen[-1] == 200 and go.is_set()
    assert asked == [largest(model, model.recipe.engine)[0]]


def test_a_server_that_could_not_warm_up_lives_and_never_says_that_it_is_ready(model, monkeypatch, capfd):  # noqa: F811
    failed = threading.Event()

    def fails(of, side):
        failed.set()
        raise MemoryError("of this picture")

    monkeypatch.setattr(app, "warm", fails)
    with serving(model, ready=False, warm_up=True) as (url, _):
        assert failed.wait(20)
        assert [sent(url, method="GET", path=path)[0] for path in ("/healthz", "/readyz")] == [200, 503]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"not ready"' in line]
    assert [line["message"] for line in lines] == ["of this picture"]


def test_a_server_that_shall_not_warm_up_asks_nothing(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(app, "warm", lambda *_: pytest.fail("it warmed up"))
    with serving(model, warm_up=False) as (_, service):
        assert service.is_ready


def test_lanes_reach_the_model_of_triton_as_a_setting(whole_bundle):
    parameters = {k: {"string_value": v} for k, v in Settings(lanes=3).texts().items()}
    assert Settings.of(parameters).lanes == 3
    loaded, lanes = opened(whole_bundle, Settings(lanes=3, threads=1), None)
    with loaded:
        assert lanes == 3
