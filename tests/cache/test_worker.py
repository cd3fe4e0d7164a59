"""What works beside the steps rests between its jobs."""

from __future__ import annotations

import threading

import pytest

from kvswap.cache import worker as worker_module
from kvswap.cache.worker import RestingWorker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(worker_module, "time", made)
    return made


@pytest.fixture
def worker():
    made = RestingWorker("test", rest=9.0)
    yield made
    made.close()


def test_a_rest_follows_that_is_so_many_times_as_long(clock, worker):
    may_end = threading.Event()

    def job() -> str:
        may_end.wait(10)
        clock.now += 2.0
        return "found"

    assert not worker.has_job
    assert not worker.is_ready
    worker.give(job)
    assert worker.has_job
    assert not worker.is_ready, "it is at work"
    may_end.set()
    while clock.now < 2.0:
        pass
    clock.now = 19.9
    assert not worker.is_ready, "it rests"
    clock.now = 20.0
    while not worker.is_ready:
        pass
    assert worker.take() == "found"
    assert not worker.has_job


def test_who_is_in_a_hurry_does_not_wait_for_the_rest(clock, worker):
    worker.give(lambda: setattr(clock, "now", 5.0))
    assert worker.take() is None
    assert clock.now == 5.0


def test_an_error_is_told_of_at_once_and_the_next_job_is_done(clock, worker):
    def fail() -> None:
        clock.now += 3.0
        raise OSError("gone")

    worker.give(fail)
    while not worker.is_ready:
        pass
    with pytest.raises(OSError, match="gone"):
        worker.take()
    worker.give(lambda: 4)
    assert worker.take() == 4
    worker.close()
