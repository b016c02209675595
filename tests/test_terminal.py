"""How the command is started and what a shell or a terminal gets from it: completion, `python -m`, escape codes."""

import os
import pty
import subprocess
import sys

import pytest
from conftest import cm_export

from cm_export import __version__
from cm_export.cli import verb_names

VERBS = verb_names()
PLAIN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS")}
PLAIN["TERM"] = "xterm-256color"


def completed(words: str, **env: str) -> list[str]:
    """What bash is offered for the last of these words."""
    number = str(len(words.split(" ")) - 1)
    asked = {"_CM_EXPORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
    done = cm_export(env=os.environ | asked | env)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_the_completion_that_the_shell_sources(shell):
    done = cm_export(env=os.environ | {"_CM_EXPORT_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0 and f"_CM_EXPORT_COMPLETE={shell}_complete" in done.stdout


def test_bash_accepts_the_completion():
    script = cm_export(env=os.environ | {"_CM_EXPORT_COMPLETE": "bash_source"}).stdout
    done = subprocess.run(["bash", "-c", f"{script}\ncomplete -p cm-export"], capture_output=True, text=True)
    assert done.returncode == 0 and "_cm_export_completion" in done.stdout


def test_verbs_options_and_values_are_completed():
    assert completed("cm-export ") == VERBS
    assert completed("cm-export ru") == ["run"]
    assert "--max-new-tokens" in completed("cm-export run x.plan --m")
    assert completed("cm-export run x.plan --backend tensorrt") == ["tensorrt", "tensorrt-rtx"]


def test_an_empty_request_for_completion_is_none():
    done = cm_export("--version", env=os.environ | {"_CM_EXPORT_COMPLETE": ""})
    assert done.returncode == 0 and done.stdout.strip().endswith(__version__)
    done = cm_export("nope", env=os.environ | {"_CM_EXPORT_COMPLETE": ""})
    assert done.returncode == 2 and done.stderr.startswith("cm-export: error: unknown verb 'nope'")


def test_python_dash_m_is_the_same_command():
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "cm_export", *words], capture_output=True, text=True)

    for words in (("--version",), ("--help",), ("run", "--help"), ("nope",), ("run", "none.plan", "--prompt", "x")):
        here, there = run(*words), cm_export(*words)
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
    assert run("--version").stdout.strip().endswith(__version__) and run("nope").returncode == 2


def on_a_terminal(*args: str, **env: str) -> str:
    """Everything that a terminal gets, stdout and stderr."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "cm_export", *args]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=PLAIN | env)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux says so when nobody holds the other end any more
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait() == 0, shown
    return shown.decode()


ASKED = ("--prompt", "what color is the shape?")


@pytest.mark.parametrize("verb", ["doctor", "run"])
def test_a_terminal_gets_escape_codes_unless_it_asks_for_none(verb, demo_bundle):
    words = (verb, str(demo_bundle), *ASKED) if verb == "run" else (verb,)
    assert "\x1b[" in on_a_terminal(*words), "tables and spinners are drawn with escape codes"
    for wish in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        shown = on_a_terminal(*words, **wish)
        assert "\x1b" not in shown and len(shown) > 40


@pytest.mark.parametrize("verb", ["doctor", "run", "inspect"])
def test_a_pipe_gets_no_escape_codes(verb, demo_bundle):
    words = {"doctor": (), "run": (demo_bundle, *ASKED), "inspect": (demo_bundle,)}[verb]
    done = cm_export(verb, *words, env=PLAIN)
    assert done.returncode == 0 and done.stdout and "\x1b" not in done.stdout + done.stderr
