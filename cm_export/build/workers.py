"""Processes that work beside the build and never outlive it, whether it fails, is interrupted or is killed.

Nothing heavy is imported here: a worker imports this file first, and from then on ends with its parent.
"""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol


class Work(Protocol):
    """What was submitted, such as a Future."""

    def result(self) -> Any:
        """Waits for it; what it raises is raised here."""


class _Here:
    """Work that this process does when its result is asked for."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._work = functools.partial(function, *arguments)

    def result(self) -> Any:
        return self._work()


@contextlib.contextmanager
def workers(count: int, folder: Path) -> Iterator[Callable[..., Work]]:
    """`submit(function, *arguments)` to `count` processes that write into `folder`, which vanishes with them.

    count 0: nothing runs beside the caller; the work is done when its result is asked for, once.
    """
    folder.mkdir()
    try:
        if count:
            with _processes(count) as submit:
                yield submit
        else:
            yield _Here
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Callable[..., Work]]:
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent) as pool:

        def submit(*work: Any) -> Future:
            # Processes inherit the mask: Ctrl-C reaches the build alone, which then ends them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(*work)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield submit
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()  # leaving the block would wait for what they are doing
            raise


def _end_with_parent() -> None:
    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
