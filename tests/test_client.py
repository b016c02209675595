"""`cm-export client`: the same answer from both kinds of server, and one line where there is none."""

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_serve import IMAGES, QUESTION, model, serving  # noqa: F401  # a fixture

from cm_export.cli import main

STATS = {"neurons": 8, "neurons_kept": 4, "new_tokens": 2, "image_tokens": 0, "ttft_s": 0.5, "tokens_per_s": 4.0,
         "sampling": {"rule": "greedy"}, "stopped": "stop token"}  # fmt: skip


class Triton(BaseHTTPRequestHandler):
    """Answers as Triton's generate_stream does for the model `vlm`."""

    seen: list = []  # noqa: RUF012
    ends, refuses = True, False

    def do_GET(self):
        self.send_error(400)

    def do_POST(self):
        Triton.seen.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
        if self.refuses:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'data: {"error":"max_tokens: is 9"}\n\n')
            return
        self.send_response(200)
        self.end_headers()
        for event in ({"text_output": "A "}, {"text_output": "circle", "stats": json.dumps(STATS)})[
            : 2 if self.ends else 1
        ]:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def triton():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Triton)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_answer_streams_from_our_server_and_its_figures_follow(model, capsys):  # noqa: F811
    alone = model.generate(QUESTION, IMAGES[0], token_share=0.2, guard=16)
    asked = ["--image", str(IMAGES[0]), "--prompt", QUESTION, "--token-share", "0.2", "--guard"]
    with serving(model, api_key="k") as (url, _):
        assert main(["client", "--url", f"{url}/v1/", "--api-key", "k", *asked]) == 0
        out, err = capsys.readouterr()
        assert out == alone.text + "\n" and f"{alone.stats['image_tokens_kept']} of 64 image tokens" in err
        assert main(["client", "--url", url, "--api-key", "k", *asked, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["text"] == alone.text and found["guard"]["drafted"] and found["client"]["answer_s"] > 0
        for more, words in (
            (["--api-key", "x"], "refused (401)"),
            (["--api-key", "k", "--max-tokens", "9999"], "max_tokens: is 9999"),
        ):
            assert main(["client", "--url", url, *asked, *more]) == 2
            assert words in capsys.readouterr().err


def test_the_answer_streams_from_triton_in_the_same_words(triton, capsys):
    assert (
        main(
            ["client", "--url", triton, "--image", str(IMAGES[0]), "--prompt", "what?", "--seed", "3", "--system", "be"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "A circle\n" and "4 of 8 neurons per layer, 2 tokens, first token after 0.50 s" in err
    path, body = Triton.seen[-1]
    assert (
        path == "/v2/models/vlm/generate_stream" and base64.b64decode(body.pop("images")[0]) == IMAGES[0].read_bytes()
    )
    assert body == {"text_input": "what?", "stream": True, "seed": 3, "system": "be"}


def test_what_triton_refuses_is_said_in_its_words(triton, capsys, monkeypatch):
    monkeypatch.setattr(Triton, "refuses", True)
    assert main(["client", "--url", triton, "--prompt", "what?"]) == 2
    assert "refused (400): max_tokens: is 9\n" in capsys.readouterr().err


def test_a_server_that_ends_before_its_answer_is_an_error_and_not_an_answer(triton, capsys, monkeypatch):
    monkeypatch.setattr(Triton, "ends", False)
    assert main(["client", "--url", triton, "--prompt", "what?", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "ended before its answer was complete" in err and "error" in json.loads(out)


def test_a_server_that_is_starting_is_waited_for(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    made = []

    def late():
        made.append(ThreadingHTTPServer(("127.0.0.1", port), Triton))
        made[0].serve_forever()

    asked = ["client", "--url", f"http://127.0.0.1:{port}", "--prompt", "what?", "--wait"]
    assert main([*asked, "0.1"]) == 1
    assert "wait for one that is starting" in capsys.readouterr().err
    threading.Timer(0.5, late).start()
    assert main([*asked, "20"]) == 0 and capsys.readouterr().out == "A circle\n"
    made[0].shutdown()
    made[0].server_close()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--url", "http://127.0.0.1:1", "--prompt", "x"], 1, "cannot be asked (Connection refused)"),
        (["--url", "ftp://x", "--prompt", "x"], 2, "is no URL of a server"),
        (["--url", "http://a:b", "--prompt", "x"], 2, "is no URL"),
        (["--prompt", "x", "--image", "/nowhere.png"], 2, "no such file"),
        (["--prompt", " "], 2, "the prompt is empty"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options, code, words, capsys):
    assert main(["client", *options]) == code
    assert words in capsys.readouterr().err
