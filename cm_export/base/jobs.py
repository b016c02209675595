"""Jobs that are done beside whatever else goes on, by threads that end when there is nothing left to do.

jobs.put("a", job)   jobs.put("b", other)   ...   jobs.wait()     an error of any job is raised there, and again ever after
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable

from . import environment


class Jobs:
    """Done in the order in which they were put in, several at once; none of them twice. After an error no other begins."""

    def __init__(self, threads: int = 0):
        """`threads`: 0 takes one for each processor."""
        self._most = threads or environment.processors()
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._put: set[Hashable] = set()
        self._threads = self._busy = 0
        self._failure: BaseException | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether it was put in, done or not."""
        return key in self._put

    def put(self, key: Hashable, job: Callable[[], None]) -> None:
        """Do `job` soon, unless one of this key was put in before, or another has failed."""
        with self._changed:
            if key in self._put or self._failure:
                return
            self._put.add(key)
            self._waiting.append(job)
            if self._threads >= self._most:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, args=(True,), daemon=True).start()
        except RuntimeError:  # no thread is to be had: whoever waits does the job
            with self._changed:
                self._threads -= 1

    def wait(self) -> None:
        """Return once everything that was put in is done; whoever waits helps. Raises the first error of a job."""
        self._work()
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy))
            if self._failure:
                raise self._failure

    def _work(self, own_thread: bool = False) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= own_thread
                    return
                job = self._waiting.popleft()
                self._busy += 1
            failure: BaseException | None = None
            try:
                job()
            except BaseException as e:  # whatever stopped it, it is not done
                failure = e
            with self._changed:
                self._busy -= 1
                if failure:
                    self._failure = self._failure or failure
                    self._waiting.clear()
                self._changed.notify_all()
