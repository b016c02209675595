"""`cm-export serve`: the official client gets what `cm-export run` gives; all else is refused, and nothing is left behind."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from conftest import ONE_THREAD, cm_export
from test_serving_wire import BODIES, REFUSED, asking, png, uri

import cm_export as package
from cm_export.base.errors import InputError
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO
from cm_export.serving import http_server, reply
from cm_export.serving.app import Service, Settings, application
from cm_export.serving.messages import Bounds
from cm_export.serving.metrics import Measured, Prometheus
from cm_export.serving.scheduler import Scheduler
from cm_export.serving.wire import IGNORED, NEUTRAL, OPENAI, OURS, read

IMAGES = sorted((DEMO.parent / "images").glob("*.png"))
QUESTION = "describe : what shape is in the image?"
LONG = {"max_tokens": 1000, "extra_body": {"min_tokens": 1000}}  # its answer does not end by itself
DENSE = {"dense": True}
# What a client asks for, and the same in Python.
BUDGETS = (
    ({}, {}),
    ({"extra_body": {"neuron_share": 0.3}}, {"neuron_share": 0.3}),
    ({"extra_body": {"token_share": 0.2}, "max_tokens": 5}, {"token_share": 0.2, "max_new_tokens": 5}),
    ({"extra_body": DENSE}, DENSE),
    ({"temperature": 1.0, "seed": 7}, {"sampling": Sampling(temperature=1.0, seed=7), "seed": 7}),
    ({"extra_body": {"guard": 4}}, {"guard": 4}),
    ({"stop": "is"}, {"sampling": Sampling(stop="is")}),
    ({"temperature": 0, "top_p": 1}, {"sampling": Sampling(temperature=0)}),
)


def said(question=QUESTION, image=IMAGES[0]):
    return [{"role": "user", "content": [{"type": "text", "text": question}, uri(image.read_bytes())]}]


@pytest.fixture(scope="module")
def model(whole_bundle):
    with package.load(whole_bundle, threads=1) as model:
        yield model


@contextmanager
def serving(model, at_once=4, ready=True, **settings):
    """A server in this process, once it is ready (or is there, at least): its URL, and its service.

    It does not warm up unless a test is about that: the largest picture takes seconds.
    """
    figures, listening = Prometheus(), http_server.bound("127.0.0.1", 0)
    with Scheduler(model, at_once, observer=Measured(figures)) as scheduler:
        service = Service(model, scheduler, figures, Settings("demo", **{"warm_up": False} | settings))
        running = http_server.server(application(service), 5)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: running.started and (service.is_ready or not ready))
            yield http_server.url(listening), service
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def client(server):
    return client_of(server[0])


def client_of(url, key="unused"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)


def sent(url, body=b"", method="POST", path="/v1/chat/completions", **headers):
    """(status, JSON or text) of a plain request."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
    kind = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if "json" in answer.headers.get("content-type", "") else text.decode()


# ---------------------------------------------------------------- answers


def test_eight_clients_at_once_each_get_what_the_same_request_gets_alone(client, model):
    def ask(i, stream):
        how = dict(messages=said(image=IMAGES[i % len(IMAGES)]), model="demo", **BUDGETS[i][0])
        if not stream:
            answer = client.chat.completions.create(**how)
            return answer.choices[0].message.content, answer.usage.completion_tokens
        chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return text, chunks[-1].usage.completion_tokens

    alone = [model.generate(QUESTION, IMAGES[i % len(IMAGES)], **BUDGETS[i][1]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for stream in (True, False):
            answers = list(pool.map(ask, range(8), [stream] * 8))
            assert answers == [(one.text, len(one.token_ids)) for one in alone]


def test_a_stream_comes_in_pieces_and_ends_as_openai_says(client, model):
    how = {"messages": said(), "model": "demo", "extra_body": {"kept": True}}
    chunks = list(client.chat.completions.create(**how, stream=True))
    alone = model.generate(QUESTION, IMAGES[0])
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 4
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    found = chunks[-1].model_extra["cm_export"]
    assert found["image_tokens_kept"] == alone.stats["image_tokens_kept"] and found["stopped"] == "stop token"
    cells = "".join("01"[int(cell)] for cell in alone.kept[0].ravel())
    assert found["kept"] == [{"rows": 8, "columns": 8, "cells": cells}]
    assert client.chat.completions.create(**how, max_tokens=2).choices[0].finish_reason == "length"


def test_a_conversation_sends_the_answer_back_and_asks_again(client, model):
    turns = said()
    answer = client.chat.completions.create(messages=turns, model="demo").choices[0].message
    turns += [answer.model_dump(), {"role": "user", "content": "what color is it ?"}]
    blocks = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": QUESTION}]
    spoken = [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer.content}, turns[-1]]
    again = client.chat.completions.create(messages=turns, model="demo").choices[0].message.content
    assert again == model.generate(spoken).text


def test_the_client_gets_its_own_errors_for_what_cannot_be_done(client, server):
    for kind, how in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"messages": [*said(), {"role": "assistant", "content": "x"}, *said()]}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "a " * 5000}]}),  # the model holds less
        (openai.NotFoundError, {"model": "gpt-9"}),
    ):
        for stream in (False, True):
            with pytest.raises(kind) as refused:
                client.chat.completions.create(**({"model": "demo", "messages": said()} | how), stream=stream)
            assert refused.value.body["message"] and refused.value.request_id
            assert str(server[1].model.bundle.path.parent) not in json.dumps(refused.value.body)
    assert [m.id for m in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    assert sent(server[0], method="GET", path="/v1/chat/completions")[0] == 405


def test_a_full_queue_and_a_deadline_are_errors_of_their_own(model):
    with serving(model, at_once=1) as (url, service):
        service.scheduler._most_queued = 1
        client = client_of(url)
        first = client.chat.completions.create(messages=said(), model="demo", stream=True, **LONG)
        next(iter(first))
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(
                client.chat.completions.create, messages=said(), model="demo", extra_body={"deadline": 0.5}
            )
            until(lambda: service.scheduler.load().queued == 1)
            status, body = sent(url, {"messages": said()})
            assert (status, body["error"]["code"]) == (429, "server_busy")
            with pytest.raises(openai.InternalServerError, match=r"within its 0\.5 s"):
                late.result()
        first.close()


# ---------------------------------------------------------------- clients that go, clients that send anything


def test_fifty_cancelled_requests_leave_nothing_behind(client, server):
    url, service = server
    for i in range(50):
        stream = client.chat.completions.create(messages=said(image=IMAGES[i % 2]), model="demo", stream=True, **LONG)
        if i % 2:
            next(iter(stream))
        stream.close()
    until(lambda: service.scheduler.load().running == service.scheduler.load().queued == 0)
    assert service.room._left == service.room._size
    assert 'cm_export_requests_total{outcome="cancelled"}' in sent(url, method="GET", path="/metrics")[1]
    assert client.chat.completions.create(messages=said(), model="demo").choices[0].message.content


def test_a_client_that_does_not_read_counts_as_gone(model, monkeypatch):
    """Without a network, whose buffers would take a long answer."""
    monkeypatch.setattr(reply, "WRITE_SECONDS", 0.2)
    body, sent_, gone = json.dumps(asking(max_tokens=1000, min_tokens=1000, stream=True)).encode(), [], []

    async def ask(app):
        async def receive():
            if gone:
                await asyncio.sleep(60)  # it stays connected
            gone.append(1)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent_.append(message)
            if len(sent_) > 4:
                await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
                 "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "scheme": "http",
                 "http_version": "1.1", "server": ("127.0.0.1", 2)}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)

    with Scheduler(model, 1) as scheduler:
        service = Service(model, scheduler, Prometheus(), Settings("demo", warm_up=False))
        asyncio.run(ask(application(service)))
        until(lambda: scheduler.load().running == 0, 5)
        assert len(sent_) == 5 and service.room._left == service.room._size


def test_a_stream_that_waits_shows_that_it_lives_and_clients_of_other_addresses_take_turns(model, monkeypatch):
    monkeypatch.setattr(reply, "TICK_SECONDS", 0.05)
    answered = []

    def ask(address, number):
        connection = HTTPConnection(urlsplit(url).netloc, timeout=60, source_address=(address, 0))
        asked = json.dumps(asking(max_tokens=3, stream=True)).encode()
        connection.request("POST", "/v1/chat/completions", asked, {"content-type": "application/json"})
        lines = connection.getresponse().read().decode().splitlines()
        answered.append((number, lines.count(": still working") > 0))
        connection.close()

    with serving(model, at_once=1) as (url, service), ThreadPoolExecutor(3) as pool:
        first = client_of(url).chat.completions.create(messages=said(), model="demo", stream=True, **LONG)
        next(iter(first))
        for count, address in enumerate(("127.0.0.2", "127.0.0.2", "127.0.0.3"), 1):
            pool.submit(ask, address, count)
            until(lambda count=count: service.scheduler.load().queued == count)
        time.sleep(0.2)
        first.close()
    assert answered == [(1, True), (3, True), (2, True)]


def malformed(count):
    """Bodies of which none can be answered: fields with values that are not theirs, broken JSON, hostile pictures."""
    rng, bodies = random.Random(0), [json.dumps(request).encode() for request, _ in REFUSED if _ascii(request)]
    bodies += [body for body, _ in BODIES]
    bodies += [json.dumps(asking(uri(png(w, w, bytes(n))))).encode() for w in (1, 9000, 65000) for n in (0, 9, 10**6)]
    values = [-1, 0, 2.5, 10**40, "x", "", [], {}, [[]], {"a": 1}, True, "\u0000", ["x"] * 99, {"url": "file:///"}]
    fields = [*OURS, *OPENAI, *NEUTRAL, "prompt", "images", "path", "__proto__"]
    while len(bodies) < count:
        request = asking({"type": "text", "text": "hello"}, **{rng.choice(fields): rng.choice(values)})
        if rng.random() < 0.3:
            whole = json.dumps(request).encode()
            bodies.append(whole[: rng.randrange(len(whole))])
            continue
        try:
            read(request, Bounds())
        except InputError:
            bodies.append(json.dumps(request).encode())
    return bodies[:count]


def _ascii(request):
    return len(json.dumps(request)) < 10**6


def test_three_hundred_malformed_requests_are_each_refused_within_a_second(server, client):
    url, service = server
    bodies, slowest, memory = malformed(300), 0.0, []
    assert not set(IGNORED) & set(NEUTRAL) and len(set(bodies)) > 200
    for i, body in enumerate(bodies):
        started = time.monotonic()
        status, answer = sent(url, body)
        slowest = max(slowest, time.monotonic() - started)
        assert 400 <= status < 500 and answer["error"]["message"], (status, body[:300])
        assert answer["error"]["type"] == "invalid_request_error"
        if i in (99, 299):
            memory.append(psutil.Process().memory_info().rss)
    assert slowest < 1 and memory[1] - memory[0] < 64 * 2**20
    assert service.room._left == service.room._size
    assert client.chat.completions.create(messages=said(), model="demo").choices[0].message.content


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
RAW = (
    b"", b"\r\n\r\n", b"hello\r\n\r\n", b"GET /\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", GET + b"Host: b\r\n\r\n",
    POST + b"Content-Length: -5\r\n\r\n", POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n", GET.replace(b"/ ", b"/../../etc/passwd ", 1) + b"\r\n",
    GET.replace(b"/ ", b"/%2e%2e%2fapp.py ", 1) + b"\r\n", GET.replace(b"/ ", b"/page/..%2fapp.py ", 1) + b"\r\n",
)  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_what_is_no_request_ends_with_the_connection_or_a_refusal(data, server):
    with socket.create_connection(urlsplit(server[0])[1].split(":"), timeout=5) as raw:
        answer = b""
        with suppress(OSError):  # it may close before all of it was sent
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            answer = raw.recv(100)
    assert re.match(rb"HTTP/1.1 4\d\d |\Z", answer), answer
    assert sent(server[0], method="GET", path="/healthz") == (200, {"status": "alive"})


def test_bodies_that_are_too_large_or_too_slow_are_refused(model, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)
    with serving(model, body_bytes=10_000, body_seconds=0.3) as (url, service):
        assert sent(url, b" " * 20_000)[0] == 413
        address = tuple(urlsplit(url).netloc.split(":"))
        with socket.create_connection(address, timeout=5) as slow:  # says that more will come
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for begin, answered in ((b"", False), (whole[:30], False), (whole, True)):
            with socket.create_connection(address, timeout=5) as silent:  # never ends the head of a request
                silent.sendall(begin)
                if answered:
                    assert silent.recv(1000).startswith(b"HTTP/1.1 200")
                    silent.sendall(whole[:30])
                while silent.recv(1000):
                    pass
        stream = client_of(url)
        held = stream.chat.completions.create(
            messages=[{"role": "user", "content": "hello"}], model="demo", stream=True,
            max_tokens=300, extra_body={"min_tokens": 300},
        )  # fmt: skip
        time.sleep(0.5)  # longer than silent connections live
        assert len(list(held)) > 100
        assert service.room._left == service.room._size


def test_a_page_from_elsewhere_cannot_ask_a_server_on_loopback(model):
    with serving(model, hosts=frozenset({"127.0.0.1", "localhost"})) as (url, _):
        asked = {"messages": [{"role": "user", "content": "hello"}]}
        assert sent(url, asked)[0] == 200
        assert sent(url, asked, host="evil.example:80")[0] == 403  # its name was given this machine's address
        assert sent(url, asked, content_type="text/plain")[0] == 415  # what a form can send without being allowed
        assert sent(url, method="OPTIONS")[0] == 405


def test_without_the_key_nothing_but_health_and_the_page_is_shown(model):
    with serving(model, api_key="s3cret") as (url, _):
        asked = {"messages": [{"role": "user", "content": "hello"}]}
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            assert sent(url, asked, **headers)[0] == 401
            assert sent(url, method="GET", path="/metrics", **headers)[0] == 401
        assert sent(url, b"x" * 100, path="/v1/models")[0] == 401
        assert sent(url, asked, authorization="Bearer s3cret")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "wrong").models.list()
        assert [sent(url, method="GET", path=path)[0] for path in ("/healthz", "/readyz", "/")] == [200] * 3


def test_the_log_names_requests_and_holds_no_text_of_clients(model, capfd):
    secret = "my secret words"
    with serving(model) as (url, _):
        assert sent(url, asking({"type": "text", "text": secret}), x_request_id="abc-1")[0] == 200
        assert sent(url, asking({"type": "text", "text": secret}, stop=[secret] * 99, seed=secret))[0] == 400
        assert sent(url, asking({"type": "text", "text": secret}), x_request_id="a b\x7f")[0] == 200
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert [r["status"] for r in requests] == [200, 400, 200] and requests[0]["request_id"] == "abc-1"
    assert re.fullmatch(r"[0-9a-f]{32}", requests[2]["request_id"])
    assert requests[0]["outcome"] == "answered" and requests[0]["total_s"] > 0 and requests[1]["param"] == "stop"
    assert "secret" not in json.dumps(lines)


def test_a_fault_of_the_server_says_its_id_and_nothing_else(model, capfd, monkeypatch):
    monkeypatch.setattr(Service, "models", lambda self: 1 / 0)
    with serving(model) as (url, _):
        status, body = sent(url, method="GET", path="/v1/models")
    assert status == 500 and "ZeroDivision" not in json.dumps(body)
    assert "ZeroDivisionError" in capfd.readouterr().err


# ---------------------------------------------------------------- processes


@contextmanager
def process(bundle, *options, port=0):
    """The real command: its process and its URL."""
    command = [sys.executable, "-m", "cm_export", "serve", bundle, "--port", port, "--threads", 1, "--quiet", *options]
    # A log that nobody reads would fill its pipe, and the server would wait.
    with tempfile.NamedTemporaryFile("w") as log, open(log.name, encoding="utf-8") as said_there:
        started = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=log, text=True, env=ONE_THREAD)
        started.stderr = said_there
        try:
            url = started.stdout.readline().strip()
            assert url, started.stderr.read()
            until(lambda: sent(url, method="GET", path="/readyz")[0] == 200)
            yield started, url
        finally:
            started.kill()
            started.wait()


def test_sigterm_lets_requests_end_and_takes_no_more(demo_bundle):
    with process(demo_bundle, "--name", "x") as (server, url):
        client = client_of(url)
        stream = client.chat.completions.create(messages=said(), model="x", stream=True, max_tokens=150,
                                                extra_body={"min_tokens": 150})  # fmt: skip
        first = next(iter(stream))
        server.send_signal(signal.SIGTERM)
        until(lambda: _refuses(url))
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant" and rest[-1].choices[0].finish_reason == "length"
        assert server.wait(20) == 0
        assert json.loads(server.stderr.read().splitlines()[-1])["event"] == "stopped"


def _refuses(url):
    try:
        socket.create_connection(tuple(urlsplit(url).netloc.split(":")), timeout=5).close()
    except OSError:
        return True
    return False


def test_what_the_command_cannot_do_is_said_before_anything_is_loaded(demo_bundle):
    with http_server.bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (("--host", "0.0.0.0"), "a public address needs an API key"),
            (("--port", port), "cannot be listened on"),
            (("--host", "no.such.host.invalid"), "a public address"),
            (("--host", "192.0.2.1", "--open"), "cannot be listened on"),
            (("--api-key", "a\nb"), "has characters that no header holds"),
        ):
            done = cm_export("serve", demo_bundle, *options)
            assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.wide
def test_a_server_that_was_killed_leaves_clients_an_error_and_comes_back_at_the_same_place(demo_bundle):
    alone = cm_export("run", demo_bundle, "--image", IMAGES[0], "--prompt", QUESTION, "--json", env=ONE_THREAD)
    with process(demo_bundle) as (server, url):
        stream = client_of(url).chat.completions.create(messages=said(), model="demo", stream=True, **LONG)
        next(iter(stream))
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError) as stopped:
            list(stream)
        why = f"{stopped.value} {stopped.value.__cause__}"  # some versions of the client say it in the cause alone
        assert re.search(r"closed|reset|incomplete|disconnected", why), why
        with process(demo_bundle, port=urlsplit(url).port) as (_, again):
            answer = client_of(again).chat.completions.create(messages=said(), model="demo")
            assert answer.choices[0].message.content == json.loads(alone.stdout)["text"]


@pytest.mark.wide
def test_two_minutes_of_load_lose_nothing_and_let_no_memory_grow(demo_bundle):
    wrong, counted, end = [], [], time.monotonic() + 120

    def clients(url, i):
        client, expected = client_of(url), None
        while time.monotonic() < end:
            answer = client.chat.completions.create(messages=said(image=IMAGES[i % len(IMAGES)]), model="demo")
            expected = expected or answer.choices[0].message.content
            counted.append(1)
            if answer.choices[0].message.content != expected:
                wrong.append(i)
            gone = client.chat.completions.create(messages=said(), model="demo", stream=True, **LONG)
            next(iter(gone))
            gone.close()

    with process(demo_bundle) as (server, url):
        memory = []
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(clients, url, i) for i in range(8)]
            for _ in range(4):
                time.sleep(28)
                memory.append(psutil.Process(server.pid).memory_info().rss)
            for one in running:
                one.result()
    assert not wrong and len(counted) > 50
    assert memory[-1] - memory[0] < 64 * 2**20, memory
