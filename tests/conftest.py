"""Fixtures that are dear: one export per random configuration, one demo bundle built by the real command."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def _take_one_processor() -> None:
    """Of several test processes each gets a processor of its own, as do the commands that it starts.

    Otherwise the threads of all of them wait for each other on all processors, which costs more than it gains.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if not hasattr(os, "sched_setaffinity") or count < 2:
        return
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {available[int(worker.removeprefix("gw")) % len(available)]})


_take_one_processor()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first; last, it would keep one process busy while the others have no work left."""
    items.sort(key=lambda item: item.path.name != "test_kill.py")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """seed -> Exported of a random configuration, made once."""
    from random_models import Exported, random_checkpoint, random_config

    made = {}

    def export(seed: int) -> Exported:
        if seed not in made:
            folder = tmp_path_factory.mktemp(f"model{seed}")
            (folder / "out").mkdir()
            made[seed] = Exported(random_checkpoint(random_config(seed), folder / "checkpoint", seed), folder / "out")
        return made[seed]

    return export


def cm_export(*args: object, timeout: float = 600, **kwargs) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    command = [str(Path(sys.executable).parent / "cm-export"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)


def session(leader: int) -> list[int]:
    """Processes of the session that `leader` started (Popen(start_new_session=True)), those that are not yet dead."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue  # it has just ended
    return found


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint of two layers and nothing besides: no tokenizer, no chat template, no picture rules."""
    from random_models import random_checkpoint, random_config

    config = random_config(0)
    assert config["text_config"]["num_hidden_layers"] == 2
    return random_checkpoint(config, tmp_path_factory.mktemp("bare") / "model")


def built(out: Path, *options: object, **how) -> Path:
    """The bundle that the real command builds there."""
    done = cm_export("build", "--out", out, "--quiet", *options, **how)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def bare_bundle(bare_checkpoint, tmp_path_factory) -> Path:
    """That checkpoint built on one thread: repeatable to the byte. Its stages lie beside it."""
    options = ["--model", bare_checkpoint, "--neurons", "griffin", "--prune-layer", "1"]
    return built(tmp_path_factory.mktemp("bare") / "x.plan", *options, env=ONE_THREAD)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory) -> Path:
    """The demo model built by `cm-export build --recipe demo`."""
    return built(tmp_path_factory.mktemp("demo") / "demo.plan", "--recipe", "demo")


@pytest.fixture(scope="session")
def first_look(tmp_path_factory) -> Path:
    """The bundle of `make demo`."""
    return built(tmp_path_factory.mktemp("first") / "demo.plan", "--recipe", "first-look")


@pytest.fixture(scope="session")
def whole_bundle(demo_bundle, tmp_path_factory) -> Path:
    """The same with a cache that stays whole, for the guard and for later questions; traced and loaded once for both."""
    work = demo_bundle.with_name(f".{demo_bundle.name}.stages")
    out = tmp_path_factory.mktemp("whole") / "demo.plan"
    return built(out, "--recipe", "demo", "--token-cache", "index", "--work-dir", work)


@pytest.fixture(scope="session")
def on_machine(demo_bundle, whole_bundle, tmp_path_factory):
    """(version, cache, recipe overrides) -> the demo bundle with engines of a fake TensorRT of that version, built once."""
    from fake_engines import add_engines, machine

    made = {}

    def build(version: str, cache: str = "cut", measured=None, **recipe):
        key = (version, cache, *sorted(recipe.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                out = tmp_path_factory.mktemp("engines") / "demo.plan"
                source = demo_bundle if cache == "cut" else whole_bundle
                made[key] = add_engines(patch, source, out, machine(version), measured, **recipe)
        return made[key]

    return build


@pytest.fixture
def sit(monkeypatch, on_machine):
    """(version, ...) -> the machine of `on_machine`, whose libraries are now imported."""
    return lambda *args, **kwargs: on_machine(*args, **kwargs).sit_at(monkeypatch)
