"""Jobs beside other work: each once, all of them before `wait` returns, and an error is never lost."""

import threading
import time

import pytest

from cm_export.base.jobs import Jobs


def test_every_job_is_done_once_and_before_wait_returns():
    for threads in (1, 3):
        jobs, done, lock = Jobs(threads), [], threading.Lock()

        def job(number, done=done, lock=lock):
            time.sleep(0.001)
            with lock:
                done.append(number)

        for number in (*range(40), *range(40)):
            jobs.put(number, lambda number=number: job(number))
        jobs.wait()
        assert sorted(done) == list(range(40)) and 7 in jobs and 40 not in jobs
        jobs.put("later", lambda: job("later"))
        jobs.wait()
        assert done[-1] == "later"


def test_several_are_done_at_once():
    """Each waits until the other has begun."""
    jobs, both = Jobs(2), threading.Barrier(2, timeout=10)
    for name in "ab":
        jobs.put(name, both.wait)
    jobs.wait()


def test_whoever_waits_works_where_no_thread_can_be_started(monkeypatch):
    jobs, done = Jobs(1), []

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for number in range(3):
        jobs.put(number, lambda number=number: done.append(number))
    jobs.wait()
    assert done == [0, 1, 2]


def test_an_error_is_raised_by_every_wait_and_ends_what_has_not_begun():
    jobs, done, go_on = Jobs(1), [], threading.Event()

    def fail():
        assert go_on.wait(10)
        raise ValueError("first")

    def put(name):
        jobs.put(name, lambda: done.append(name))

    jobs.put("fail", fail)
    while jobs._waiting:
        time.sleep(0.001)
    put("before")  # the one thread is busy
    go_on.set()
    time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            jobs.wait()
    put("after")
    with pytest.raises(ValueError, match="first"):
        jobs.wait()
    assert done == []


def test_wait_waits_for_a_job_that_another_thread_is_at():
    jobs, started, done = Jobs(1), threading.Event(), []

    def slow():
        started.set()
        time.sleep(0.05)
        done.append("slow")

    jobs.put("slow", slow)
    assert started.wait(10)
    jobs.wait()
    assert done == ["slow"]
