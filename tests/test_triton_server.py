"""A real Triton server loads what `deploy triton` writes, answers as `cm-export run` does, and survives what clients do.

`make test-triton` sets the server up under artifacts/triton and runs these; everything here runs on a CPU. Graphs as models
(`onnxruntime`, `tensorrt_plan`) are run by tests/triton_stand_in.py, the model that answers by nothing but itself.
"""

import base64
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import _triton
import pytest
from conftest import cm_export

from cm_export import load
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO

pytestmark = pytest.mark.triton
ROOT = Path(__file__).parent.parent
HOME = Path(os.environ.get("TRITON_HOME", ROOT / "artifacts" / "triton")).absolute()
PATHS = sorted((DEMO.parent / "images").glob("*.png"))
IMAGES = [p.read_bytes() for p in PATHS]
BASE64 = [base64.b64encode(image).decode() for image in IMAGES]
QUESTION = "describe : what shape is in the image?"
LONG = {"text_input": "hello", "max_tokens": 1024, "min_tokens": 1024, "stream": True}


class Server(_triton.Server):
    """One server process, with what the tests ask it."""

    def __init__(self, repository, *models, log):
        super().__init__(HOME, repository, *models, log=log)

    def start(self):
        return super().start(OMP_NUM_THREADS="1")

    def call(self, method, path, body=None, timeout=60):
        """(status, body) of one call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

    def generate(self, **fields):
        status, body = self.call("POST", "/v2/models/vlm/generate", fields)
        return status, json.loads(body)

    def stream(self, **fields):
        """The events of a stream."""
        status, body = self.call("POST", "/v2/models/vlm/generate_stream", fields | {"stream": True})
        assert status == 200, body
        return [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]

    def rows(self):
        return self.metrics()['cm_export_requests_running{model="vlm",version="1"}']

    def stub(self):
        return next(p for p in self.processes() if "triton_python_backend_stub" in " ".join(p.cmdline()))


def deployed(bundle, out, *options):
    assert (HOME / "bin" / "tritonserver").is_file(), "there is no server: make test-triton sets one up"
    done = cm_export("deploy", "triton", bundle, "--out", out, "--quiet", *options)
    assert done.returncode == 0, done.stderr
    return out


@contextlib.contextmanager
def running(repository, *models):
    server = Server(repository, *models, log=repository.with_suffix(".log"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def repository(whole_bundle, tmp_path_factory):
    return deployed(whole_bundle, tmp_path_factory.mktemp("real") / "models")


@pytest.fixture(scope="module")
def server(repository):
    with running(repository) as server:
        yield server


@pytest.fixture(scope="module")
def alone(whole_bundle):
    with load(whole_bundle, threads=1) as model:
        yield model


UNEQUAL = (
    ({"images": [BASE64[0]]}, {"images": IMAGES[:1]}),
    ({"images": [BASE64[1]], "neuron_share": 0.3}, {"images": IMAGES[1:2], "neuron_share": 0.3}),
    ({"images": [BASE64[0]], "token_share": 0.2, "max_tokens": 5},
     {"images": IMAGES[:1], "token_share": 0.2, "max_new_tokens": 5}),
    ({"images": [BASE64[1]], "dense": True}, {"images": IMAGES[1:2], "dense": True}),
    ({"images": BASE64[:2]}, {"images": IMAGES[:2]}),
    ({"max_tokens": 9}, {"max_new_tokens": 9}),
    ({"images": [BASE64[2]], "temperature": 0.7, "top_p": 0.9, "seed": 7},
     {"images": IMAGES[2:3], "sampling": Sampling(temperature=0.7, top_p=0.9, seed=7)}),
    ({"images": [BASE64[1]], "guard": 4}, {"images": IMAGES[1:2], "guard": 4}),
)  # fmt: skip


def ids(answer):
    """Its tokens; Triton writes a list of one as a number."""
    found = answer["token_ids"]
    return found if isinstance(found, list) else [found]


def same(events, expected):
    """Whether a stream brought that answer, token for token."""
    return (
        "".join(event["text_output"] for event in events) == expected.text
        and ids(events[-1]) == expected.token_ids
        and events[-1]["image_tokens_kept"] == expected.stats["image_tokens_kept"]
    )


@pytest.fixture(scope="module")
def expected(alone):
    return [alone.generate(QUESTION, **arguments) for _, arguments in UNEQUAL]


def test_it_loads_is_ready_and_says_what_it_takes(server):
    assert server.ready() and server.ready("/v2/models/vlm/ready")
    status, body = server.call("GET", "/v2/models/vlm")
    assert status == 200 and {"text_input", "images"} <= {i["name"] for i in json.loads(body)["inputs"]}


@pytest.mark.parametrize("number", range(len(UNEQUAL)))
def test_a_stream_is_what_run_answers_token_for_token(server, expected, number):
    events = server.stream(text_input=QUESTION, **UNEQUAL[number][0])
    assert same(events, expected[number])
    assert len(events) > 1 and all("token_ids" not in event for event in events[:-1])
    status, whole = server.generate(text_input=QUESTION, **UNEQUAL[number][0])
    assert status == 200 and whole["text_output"] == expected[number].text


def test_a_stream_is_what_the_command_line_prints(server, whole_bundle):
    done = cm_export("run", whole_bundle, "--image", PATHS[0], "--prompt", QUESTION, "--threads", "1", "--json")
    events = server.stream(text_input=QUESTION, images=BASE64[:1])
    assert events[-1]["token_ids"] == json.loads(done.stdout)["token_ids"]


def test_eight_clients_with_different_pictures_and_budgets_get_what_each_gets_alone(server, expected):
    found = {}

    def client(number):
        for turn in range(2):
            found[number, turn] = server.stream(text_input=QUESTION, client=str(number), **UNEQUAL[number][0])

    beside = [threading.Thread(target=server.generate, kwargs=LONG | {"stream": False}) for _ in range(2)]
    for thread in beside:  # one in each lane, so that everyone else's steps have several rows
        thread.start()
    until(lambda: server.rows() == 2)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in [*threads, *beside]:
        thread.join(120)
    assert all(same(found[n, turn], expected[n]) for n in range(8) for turn in range(2))
    until(lambda: server.rows() == 0)
    assert (
        server.metrics()['cm_export_batch_rows_bucket{model="vlm",version="1",le="1"}']
        < server.metrics()['cm_export_batch_rows_count{model="vlm",version="1"}']
    ), "no step had several rows"


def client_script(server, *words):
    command = [
        HOME / "venv" / "bin" / "python",
        ROOT / "tests" / "triton_client.py",
        words[0],
        f"127.0.0.1:{server.grpc}",
    ]
    done = subprocess.run([*command, *words[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.02)


def test_streaming_costs_at_most_two_milliseconds_a_token(server, alone):
    """The best of several: beside an answer in this process, everything that a server adds."""
    how, many = Sampling(min_new_tokens=200), 200
    inside, through = [], []
    for _ in range(5):
        stats = alone.generate("hello", max_new_tokens=many, sampling=how).stats
        inside.append(stats["decode_s"] / (stats["new_tokens"] - 1))
        connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=60)
        fields = {"text_input": "hello", "max_tokens": many, "min_tokens": many, "stream": True}
        connection.request("POST", "/v2/models/vlm/generate_stream", json.dumps(fields))
        times = [time.perf_counter() for line in connection.getresponse() if line.startswith(b"data: ")]
        through.append((times[-1] - times[0]) / (many - 1))
    print(f"ms a token: {min(inside) * 1e3:.2f} inside, {min(through) * 1e3:.2f} through the server")
    assert min(through) - min(inside) < 0.002


def tokens_a_second(server, clients, many=200):
    fields = {"text_input": "hello", "max_tokens": many, "min_tokens": many}
    threads = [threading.Thread(target=server.generate, kwargs=fields | {"client": str(n)}) for n in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * many / (time.perf_counter() - started)


def gain_of_the_machine():
    """How much more two busy processes get done than one, now."""

    def done(count):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(count)]
        return sum(float(process.communicate()[0]) for process in busy)

    return done(2) / done(1)


BUSY = """
import time
end, count = time.perf_counter() + 0.5, 0
while time.perf_counter() < end: count += 1
print(count)
"""


def test_four_clients_get_at_least_one_and_a_half_times_the_tokens_of_one(server):
    """The best of a few rounds each; on a machine on which others compute it may fail, which its message then says."""
    best = dict.fromkeys((1, 4, 8), 0.0)
    for turn in range(8):
        best = {n: max(speed, tokens_a_second(server, n)) for n, speed in best.items()}
        if turn >= 2 and best[4] >= 1.5 * best[1]:
            break
    print("tokens a second:", {n: round(speed) for n, speed in best.items()})
    assert best[4] >= 1.5 * best[1], f"two processes get {gain_of_the_machine():.1f} times the work of one done here"


def test_the_client_of_the_command_line_gets_what_run_prints_and_one_line_for_what_is_wrong(server, expected):
    asked = ["client", "--url", server.url, "--image", PATHS[0], "--prompt", QUESTION]
    done = cm_export(*asked)
    assert done.returncode == 0 and done.stdout == expected[0].text + "\n", done.stderr
    assert f"{expected[0].stats['image_tokens_kept']} of 64 image tokens" in done.stderr
    found = json.loads(cm_export(*asked, "--token-share", "0.2", "--max-tokens", "5", "--json").stdout)
    assert (found["text"], found["image_tokens_kept"]) == (expected[2].text, expected[2].stats["image_tokens_kept"])
    for more, words in (
        (("--max-tokens", "99999"), "refused (400): max_tokens: is 99999"),
        (("--model", "nobody"), "refused"),
        (("--image", ROOT / "README.md"), "refused (400): images[1]: "),
    ):
        done = cm_export(*asked, *more)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_tritonclient_streams_pictures_as_bytes(server, expected):
    told = client_script(server, "ask", PATHS[0], QUESTION)
    assert "".join(told["pieces"]) == expected[0].text and told["token_ids"] == expected[0].token_ids
    assert told["id"] == "mine"


def test_fifty_closed_streams_free_their_rows(server):
    before = server.metrics()
    assert client_script(server, "cancel", "50") == {"ended": 50}
    until(lambda: server.rows() == 0)
    key = 'cm_export_requests_total{model="vlm",outcome="cancelled",version="1"}'
    assert server.metrics()[key] - before.get(key, 0) == 50


def malformed(rng):
    """A request that cannot be answered, other ones each time."""
    wrong = [None, -1, 0, 10**12, 1.5, "x", "", [], {}, [[]], True, "\ud800", "\0", "x" * 70_000, [1, "a"], {"a": 1}]
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "token_share",
        "neuron_share",
        "guard",
        "deadline",
        "min_tokens",
    ]
    kind = rng.randrange(8)
    fields = {"text_input": QUESTION}
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return json.dumps(fields)[: rng.randrange(1, 40)].encode()
    if kind == 2:
        fields[rng.choice(names)] = rng.choice(["x", [], {"a": 1}, "\0", [1, 2], -7])
    if kind == 3:
        fields["images"] = [
            rng.choice(["/etc/passwd", "https://example.org/a.png", "file:///x", "QUJD", "x" * 999, ""])
        ]
    if kind == 4:
        image = bytearray(rng.choice(IMAGES))[: rng.randrange(1, 90)]
        fields["images"] = [base64.b64encode(bytes(image)).decode()]
    if kind == 5:
        fields = {"messages": json.dumps(rng.choice(wrong))}
    if kind == 6:
        said = [
            {"role": rng.choice(["user", "tool", 3]), "content": rng.choice(wrong)},
            {"role": "assistant", "content": "a"},
        ]
        fields = {"messages": json.dumps(said)}
    if kind == 7:
        fields = {"text_input": rng.choice(["", "  "]), "images": BASE64[:1] * rng.choice([1, 9])}
    return json.dumps(fields).encode()


def test_300_malformed_requests_are_refused_at_once_and_the_server_goes_on(server, expected):
    rng, statuses, slowest = random.Random(0), {}, 0.0
    for number in range(300):
        if number == 100:
            memory = server.memory()
        body, started = malformed(rng), time.monotonic()
        status, answer = server.call("POST", f"/v2/models/vlm/{rng.choice(['generate', 'generate_stream'])}", body)
        slowest = max(slowest, time.monotonic() - started)
        of_triton = b"parse" in answer  # what is no JSON never reaches us, and is a 500
        assert b"error" in answer and (400 <= status < 500 or of_triton), (
            body[:200],
            status,
            answer,
        )
        assert b"Traceback" not in answer and len(answer) < 3000
        statuses[status] = statuses.get(status, 0) + 1
    assert slowest < 1 and server.rows() == 0
    assert server.memory() < memory * 1.1 + 20e6
    assert same(server.stream(text_input=QUESTION, **UNEQUAL[0][0]), expected[0])


def test_a_field_that_is_no_input_is_refused_with_the_nearest_one(server):
    status, answer = server.generate(text_input="x", tempurature=0.5)
    assert status == 400 and "did you mean 'temperature'" in answer["error"]


def test_a_giant_body_and_a_picture_of_too_many_pixels_are_refused(server):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    status, answer = server.generate(text_input="x", images=[base64.b64encode(bomb).decode()])
    assert status == 400 and "too many pixels" in answer["error"]
    status, answer = server.generate(text_input="x" * 300_000)
    assert status == 400 and "characters" in answer["error"]
    status, answer = server.generate(text_input="x", images=["A" * 45_000_000])
    assert status == 400 and "MiB" in answer["error"]


def test_unloading_answers_those_who_are_there_and_loading_again_answers_the_same(server, expected):
    stop, wrong, right = threading.Event(), [], []

    def client(number):
        while not stop.is_set():
            status, answer = server.generate(text_input=QUESTION, **UNEQUAL[number][0])
            if status == 200 and "token_ids" in answer:
                (right if ids(answer) == expected[number].token_ids else wrong).append(answer)
            elif status == 200:
                wrong.append(answer)
            else:
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.5)
        assert server.call("POST", "/v2/repository/models/vlm/unload", {})[0] == 200
        until(lambda: not server.ready("/v2/models/vlm/ready"), 30)
        assert server.call("POST", "/v2/repository/models/vlm/load", {})[0] == 200
        until(lambda: server.ready("/v2/models/vlm/ready"), 30)
    count = len(right)
    until(lambda: len(right) > count + 8, 30)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and len(right) > 10


def alive(repository, server):
    command = [sys.executable, repository / "alive.py", f"http://127.0.0.1:{server.http}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=90).returncode == 0


def test_a_killed_stub_is_seen_fails_requests_clearly_and_loading_the_model_again_mends_it(repository, expected):
    with running(repository) as server:
        ended = []

        def client():
            try:
                ended.append(server.call("POST", "/v2/models/vlm/generate_stream", LONG, timeout=15)[1])
            except (OSError, http.client.HTTPException) as error:
                ended.append(repr(error).encode())

        waiting = threading.Thread(target=client)
        waiting.start()
        until(lambda: server.rows() == 1)
        assert alive(repository, server)
        server.stub().kill()
        with contextlib.suppress(OSError, http.client.HTTPException):  # now and then the server ends by it, too
            status, answer = server.generate(text_input=QUESTION)
            assert status >= 400 and "not healthy" in answer["error"]
        assert not alive(repository, server)
        waiting.join(60)
        assert len(ended) == 1 and b"stop_reason" not in ended[0]  # its client's own time-out ends it
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.call("POST", "/v2/repository/models/vlm/unload", {}, timeout=120)
            until(lambda: not server.ready("/v2/models/vlm/ready"), 60)
            server.call("POST", "/v2/repository/models/vlm/load", {})
        if server.process.poll() is not None:
            server.start()
        until(lambda: server.ready("/v2/models/vlm/ready"), 60)
        assert alive(repository, server)
        assert same(server.stream(text_input=QUESTION, **UNEQUAL[0][0]), expected[0])


def test_a_killed_server_ends_its_clients_and_answers_again_when_it_is_started(repository, expected):
    with running(repository) as server:
        ended = []

        def client():
            try:
                body = server.call("POST", "/v2/models/vlm/generate_stream", LONG)[1]
                ended.append("stop_reason" in body.decode())
            except (OSError, http.client.HTTPException) as error:
                ended.append(type(error).__name__)

        waiting = threading.Thread(target=client)
        waiting.start()
        until(lambda: server.rows() == 1)
        server.stop(signal.SIGKILL)
        waiting.join(30)
        assert ended and ended[0] is not True
        server.start()
        assert same(server.stream(text_input=QUESTION, **UNEQUAL[0][0]), expected[0])


def test_graphs_as_models_of_the_server_answer_the_same(whole_bundle, tmp_path, expected):
    out = deployed(whole_bundle, tmp_path / "models", "--execution", "bls", "--threads", "1")
    models = ["vision", "prefill", "prefill_dense", "decode", "decode_dense", "vlm"]
    with running(out, *models) as server:
        for number in (0, 1, 2, 3, 4, 5):
            events = server.stream(text_input=QUESTION, **UNEQUAL[number][0])
            assert same(events, expected[number]), number


def test_a_repository_of_tensorrt_plans_answers_as_its_bundle_does(on_machine, tmp_path, monkeypatch):
    machine = on_machine("10.13.3.9", engine__precision="fp32").sit_at(monkeypatch)
    with load(machine.bundle, threads=1, backend="tensorrt") as model:
        expected = [model.generate(QUESTION, **UNEQUAL[n][1]) for n in (0, 2, 3)]
    out = deployed(machine.bundle, tmp_path / "models", "--execution", "bls", "--threads", "1")
    text = (out / "prefill" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in text and (out / "prefill" / "1" / "model.plan").is_file()
    with running(out, "vision", "prefill", "prefill_dense", "decode", "decode_dense", "vlm") as server:
        for number, answer in zip((0, 2, 3), expected, strict=True):
            assert same(server.stream(text_input=QUESTION, **UNEQUAL[number][0]), answer), number


def test_the_commands_of_the_page_bring_a_streamed_answer(whole_bundle, tmp_path):
    page = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    commands = re.search(r"```console\n(\$ cm-export deploy triton.*?)```", page, re.S)[1]
    deploy, serve, question = re.findall(r"^\$ (.*(?:\n  .*)*)", commands, re.M)
    http_port, grpc_port, metrics = _triton.free_ports(3)
    ports = f" --http-port={http_port} --grpc-port={grpc_port} --metrics-port={metrics}"
    paths = f"{HOME / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "demo.plan").symlink_to(whole_bundle)
    (tmp_path / "cm_export").symlink_to(ROOT / "cm_export")
    env = os.environ | {"PATH": paths, "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run(["bash", "-c", deploy], cwd=tmp_path, env=env, capture_output=True, timeout=120).returncode == 0
    )
    with open(tmp_path / "log", "wb") as log:
        serving = subprocess.Popen(
            ["bash", "-c", f"exec {serve} {ports}"],
            cwd=tmp_path,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in itertools.repeat(0, 600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", http_port), 1).close()
                break
            time.sleep(0.1)
        asked = question.replace("localhost:8000", f"localhost:{http_port}")
        done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        events = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: ")]
        assert len(events) > 3 and "stop_reason" in events[-1], done.stdout + done.stderr
    finally:
        serving.terminate()
        serving.wait(60)


@pytest.mark.wide
def test_two_minutes_of_mixed_load_leave_memory_flat(repository, expected):
    seconds = float(os.environ.get("SOAK_SECONDS", "120"))
    with running(repository) as server:
        stop, wrong, count = threading.Event(), [], itertools.count()

        def client(number):
            rng = random.Random(number)
            while not stop.is_set():
                which = rng.randrange(len(UNEQUAL))
                if rng.random() < 0.2:
                    server.call("POST", "/v2/models/vlm/generate", malformed(rng))
                elif not same(server.stream(text_input=QUESTION, **UNEQUAL[which][0]), expected[which]):
                    wrong.append(which)
                next(count)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        samples, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(seconds / 24)
            samples.append(server.memory())
        stop.set()
        for thread in threads:
            thread.join(60)
        print(f"{next(count)} requests in {seconds:g} s; MB: {[round(s / 1e6) for s in samples]}")
        print(f"of these the model's process: {server.stub().memory_info().rss / 1e6:.0f} MB")
        assert wrong == []
        until(lambda: server.rows() == 0)
        assert max(samples[-6:]) < 1.05 * max(samples[6:12]) + 10e6
