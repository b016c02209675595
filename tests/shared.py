"""What is dear and the same for every test process of a run: the first that needs it makes it, the others take it.

once("demo", build)   ->   folder of the run / demo, filled by build(folder) in one process, read by all
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_root: Path | None = None
_own: Path | None = None


def settle(factory: pytest.TempPathFactory) -> None:
    """Called when a test process starts: where the run keeps what its processes share, and what is this one's."""
    global _root, _own
    _own = factory.mktemp("own")
    base = factory.getbasetemp()
    _root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    _root.mkdir(exist_ok=True)


def own(name: str) -> Path:
    """A new folder of this process alone."""
    assert _own is not None, "shared.settle comes first"
    (folder := _own / name).mkdir()
    return folder


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name; where it is not there yet, `make` fills it while the other processes wait.

    Nobody may change it afterwards. What a failure has left there is cleared by the next process, which tries again.
    """
    assert _root is not None, "shared.settle comes first"
    folder, done = _root / name, _root / f"{name}.done"
    if done.exists():
        return folder
    with open(_root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
