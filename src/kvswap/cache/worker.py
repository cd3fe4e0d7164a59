"""A thread that works beside the steps, and no more than a stated part of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

Job = Callable[[], Any]


class _Done(NamedTuple):
    found: Any
    began_s: float
    ended_s: float


class RestingWorker:
    """Does one job after the other in a thread, and rests after each.

    Steps and jobs share processors and an interpreter's lock; what rests leaves both to the steps.

    Parameters
    ----------
    name : str
        Of the thread.
    rest : float
        It rests so many times as long as it worked.
    """

    def __init__(self, name: str, *, rest: float) -> None:
        self._rest = rest
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._job: Future[_Done] | None = None

    @property
    def has_job(self) -> bool:
        """Whether a job was given and what it found not yet taken."""
        return self._job is not None

    @property
    def is_ready(self) -> bool:
        """Whether there is a job that has ended, and the rest after it too; none after an error."""
        if self._job is None or not self._job.done():
            return False
        if self._job.exception() is not None:
            return True
        _, began_s, ended_s = self._job.result()
        return time.perf_counter() >= ended_s + self._rest * (ended_s - began_s)

    def give(self, job: Job) -> None:
        """Begin a job; what the one before found must have been taken."""
        self._job = self._threads.submit(_timed, job)

    def take(self) -> Any:
        """Wait for the job, not for the rest, and return what it found, or raise its error."""
        assert self._job is not None, "a job was given"
        job, self._job = self._job, None
        return job.result().found

    def close(self) -> None:
        """End the thread once its job has ended; safe to call again."""
        self._threads.shutdown(cancel_futures=True)


def _timed(job: Job) -> _Done:
    began_s = time.perf_counter()
    return _Done(job(), began_s, time.perf_counter())
