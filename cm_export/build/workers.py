"""Processes that work beside the build and never outlive it, whether it fails, is interrupted or is killed.

Nothing heavy is imported here: a worker imports this file first, and from then on ends with its parent.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def workers(count: int, folder: Path) -> Iterator[Callable[..., Future]]:
    """`submit(function, *arguments)` to `count` processes that write into `folder`, which vanishes with them."""
    others = set(multiprocessing.active_children())
    folder.mkdir()
    try:
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
