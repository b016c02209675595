"""Fixtures that are dear: one export per random configuration, one demo bundle built by the real command."""

import contextlib
import functools
import gc
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path

import psutil
import pytest
import shared
from _pytest import runner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
PROCESSORS = (
    os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
)  # before each test process takes one
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


# From half a minute up, the longest first. The first three need no bundle in common, for which one would wait for the other.
LONGEST = [
    "cli_e2e",
    "types",
    "outside_family",
    "tensorrt_rtx",
    "kill",
    "clips",
    "plugins_kernels",
    "tune",
    "generation",
    "llava_families",
    "turns",
    "plugins_library",
    "eval",
    "tensorrt_batches",
    "text_only",
    "active",
    "tile_families",
    "plugins_planted_bugs",
    "pack",
    "lowered",
    "stages",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; last, one would keep a process busy while the others have no work left.

    pytest-xdist would begin with the files of most tests instead, hence --no-loadscope-reorder in the Makefile.
    """
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again while graphs are traced.

    Nor need transformers write out every configuration that it reads, into log lines that nobody sees.
    """
    if "transformers" in sys.modules:
        sys.modules["transformers"].PreTrainedConfig.__repr__ = object.__repr__
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    _hash_what_lies_once()


def _hash_what_lies_once() -> None:
    """In this process a file that has been lying for a while is hashed once as it is: hundreds of tests open the same bundles.

    One that was just written is hashed each time, since its time of change could not tell it from what is written next.
    """
    from cm_export.base import hashes
    from cm_export.bundle import checks, weights

    real, known = hashes.file_part_sha256, dict[tuple[int, ...], str]()

    def once(file: FileIO, start: int, length: int) -> str:
        about = os.fstat(file.fileno())
        if time.time_ns() - about.st_ctime_ns < 10**8:
            return real(file, start, length)
        key = (about.st_dev, about.st_ino, about.st_ctime_ns, about.st_size, start, length)
        if key not in known:
            known[key] = real(file, start, length)
        return known[key]

    for module in (hashes, checks, weights):
        module.file_part_sha256 = once


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """As pytest does it, with room for frames: how deep a test is called says nothing about how long it takes."""
    from cm_export.base.frames import with_room

    return with_room(runner.pytest_runtest_protocol, item, nextitem)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(tmp_path_factory) -> None:
    shared.settle(tmp_path_factory)


@pytest.fixture(scope="session")
def exported():
    """seed -> Exported of a random configuration, made once."""
    from random_models import random_config, shared_export

    return functools.cache(lambda seed: shared_export(f"model{seed}", random_config(seed), seed))


def cm_export(*args: object, timeout: float = 600, **kwargs) -> subprocess.CompletedProcess:
    """The real command in a process of its own."""
    command = [str(Path(sys.executable).parent / "cm-export"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)


def wide(*values: object, id: str | None = None):
    """Parameters of a test that `make test-wide` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.wide)


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
def bare310() -> str:
    """A Python 3.10 as it is."""
    from old_pythons import find_python310

    python = find_python310()
    if python is None:
        pytest.skip("no Python 3.10 here: install one (apt install python3.10-venv, or pyenv install 3.10)")
    return python


@pytest.fixture(scope="session")
def python310(bare310) -> str:
    """A virtual environment of it with what running engines needs; neither ONNX Runtime nor torch."""
    from old_pythons import make_python310

    folder = shared.once("python310", lambda folder: make_python310(bare310, folder))
    return str(folder / "venv" / "bin" / "python")


@pytest.fixture(scope="session")
def bare_checkpoint() -> Path:
    """A random checkpoint of two layers and nothing besides: no tokenizer, no chat template, no picture rules."""

    def make(folder: Path) -> None:
        from random_models import random_checkpoint, random_config

        config = random_config(0)
        assert config["text_config"]["num_hidden_layers"] == 2
        random_checkpoint(config, folder / "model")

    return shared.once("bare_checkpoint", make) / "model"


def here(*args: object, threads: int | None = None, places: int = 64) -> subprocess.CompletedProcess:
    """The same in this process, which has imported what takes seconds: where its words and its answer are the point.

    threads: of torch; a build on one is repeatable to the byte. places: at so many a build compares the drift, instead of
    256, which would take most of what is left when nothing is traced.
    """
    import torch
    from traces import traced_once

    from cm_export.cli import main

    words, out, err = [*map(str, args)], io.StringIO(), io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    with contextlib.ExitStack() as around:
        if words[0] == "build":
            around.enter_context(traced_once())
            around.enter_context(_drift_of(places))
        around.enter_context(contextlib.redirect_stdout(out))
        around.enter_context(contextlib.redirect_stderr(err))
        code = main(words)
    torch.set_num_threads(before)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _drift_of(places: int) -> Iterator[None]:
    from cm_export.build import drift

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "PLACES", min(places, drift.PLACES))
        yield


def built(out: Path, *options: object, **how: int) -> Path:
    """The bundle that `cm-export build` makes there, in this process."""
    done = here("build", "--out", out, "--quiet", *options, **how)
    assert done.returncode == 0, done.stderr
    return out


def take_stages(bundle: Path, out: Path) -> None:
    """A build to `out` goes on from what `bundle` was built of; the stages that its choices concern are made anew."""
    shutil.copytree(bundle.with_name(f".{bundle.name}.stages"), out.with_name(f".{out.name}.stages"))


def bundles_of(make_checkpoint: Callable[[str, Path], object], *first_options: object) -> Callable[..., tuple]:
    """(name, *options) -> a family's checkpoint and its bundle, by the real command; further ones are made of the same traces."""

    def bundle_of(name: str, *options: str) -> tuple[Path, Path]:
        def first(folder: Path) -> None:
            make_checkpoint(name, folder / "model")
            built(folder / "x.plan", "--model", folder / "model", "--neurons", "griffin", *first_options)

        def another(folder: Path) -> None:
            take_stages(whole / "x.plan", folder / "x.plan")
            with few_answers():
                built(folder / "x.plan", "--model", whole / "model", *options)

        whole = shared.once(name, first)
        key = "_".join((name, *options)).replace("-", "")
        return whole / "model", (shared.once(key, another) if options else whole) / "x.plan"

    return bundle_of


@pytest.fixture(scope="session")
def bare_bundle(bare_checkpoint) -> Path:
    """That checkpoint built on one thread: repeatable to the byte. Its stages lie beside it."""
    options = ["--model", bare_checkpoint, "--neurons", "griffin", "--prune-layer", "1"]
    return shared.once("bare", lambda here: built(here / "x.plan", *options, threads=1, places=256)) / "x.plan"


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The demo model built by `cm-export build --recipe demo`. Its stages lie beside it."""
    return shared.once("demo", lambda here: built(here / "demo.plan", "--recipe", "demo", places=256)) / "demo.plan"


@pytest.fixture(scope="session")
def first_look(demo_bundle) -> Path:
    """The bundle of `make demo`; traced and loaded once for both."""

    def make(folder: Path) -> None:
        take_stages(demo_bundle, folder / "demo.plan")
        built(folder / "demo.plan", "--recipe", "first-look")

    return shared.once("first_look", make) / "demo.plan"


@pytest.fixture(scope="session")
def whole_bundle(demo_bundle) -> Path:
    """The same with a cache that stays whole, for the guard and for later questions; traced and loaded once for both."""

    def make(folder: Path) -> None:
        take_stages(demo_bundle, folder / "demo.plan")
        built(folder / "demo.plan", "--recipe", "demo", "--token-cache", "index")

    return shared.once("whole", make) / "demo.plan"


@pytest.fixture(scope="session")
def on_machine(demo_bundle, whole_bundle):
    """(version, cache, recipe overrides) -> the demo bundle with engines of a fake TensorRT of that version, built once."""
    from fake_engines import add_engines, machine

    made = {}

    def build(version: str, cache: str = "cut", measured=None, **recipe):
        key = (version, cache, *sorted(recipe.items()))
        if key not in made:
            source = demo_bundle if cache == "cut" else whole_bundle

            def make(folder: Path) -> None:
                with pytest.MonkeyPatch.context() as patch:
                    add_engines(patch, source, folder / "demo.plan", machine(version), measured, **recipe)

            name = "_".join(str(word) for pair in (("engines", version, cache), *key[2:]) for word in pair)
            made[key] = replace(machine(version), bundle=shared.once(name, make) / "demo.plan", made_of=source)
        return made[key]

    return build


@pytest.fixture
def sit(monkeypatch, on_machine):
    """(version, ...) -> the machine of `on_machine`, whose libraries are now imported."""
    return lambda *args, **kwargs: on_machine(*args, **kwargs).sit_at(monkeypatch)


@contextlib.contextmanager
def few_answers(watched: int = 8, kept: int = 56) -> Iterator[None]:
    """Inside, a build watches what products read in fewer answers than it usually takes, and keeps few more."""
    from cm_export.build.steps import measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "PROMPTS", watched)
        patch.setattr(measured, "PHRASES", kept)
        yield


def low_bits(demo_bundle: Path, precision: str) -> Path:
    """The demo model with every neuron, in int8 with the float32 numbers beside, or in int4 alone with a refined head."""
    from cm_export.surgery import packable

    def make(folder: Path) -> None:
        take_stages(demo_bundle if precision == "int8" else low_bits(demo_bundle, "int8"), folder / "low.plan")
        beside = ["--keep-floats"] if precision == "int8" else []
        with few_answers(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(packable, "WORTH_REFINING", 0)  # the head of a demo model is small
            built(folder / "low.plan", "--model", "demo", "--neurons", "dense", "--weights", precision, *beside)

    return shared.once(f"low_{precision}", make) / "low.plan"


def active_bundle(demo_bundle: Path, precision: str) -> Path:
    """The demo model under `active` thresholds, its weights stored in float32 or in int8."""

    def make(folder: Path) -> None:
        take_stages(demo_bundle, folder / "active.plan")
        options = ["--model", "demo", "--neurons", "active", "--neuron-share", "0.6", "--tokens", "dense"]
        with few_answers(watched=24):
            built(folder / "active.plan", *options, "--weights", precision)

    return shared.once(f"active_{precision}", make) / "active.plan"
