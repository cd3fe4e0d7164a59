"""What every backend promises: bytes, errors, and nothing in flight when a ticket is done."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import (
    ConfigError,
    CorruptStoreError,
    DeviceIOError,
    SessionClosedError,
    StoreError,
    StoreFullError,
)
from kvswap.core.extension import native, warn_once
from kvswap.storage import BlockStore, IOBackend
from kvswap.storage import choose as choose_module
from kvswap.storage import paced as paced_module
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.paced import PacedBackend, PlainPacer
from kvswap.storage.posix import PosixBackend
from kvswap.storage.uring import UringBackend, uring_error
from tests.storage.helpers import fill, make_records, make_store, places, read_back

START, SIZE = 4096, 4096
INSTANT = DeviceModel(name="instant", bytes_per_s=1e13, iops=1e10)
SLOW = DeviceModel(name="slow", bytes_per_s=1e9, iops=200)  # 5 ms a request

needs_uring = pytest.mark.skipif(uring_error() is not None, reason=f"{uring_error()}")
MAKERS: dict[str, Callable[[], IOBackend]] = {
    "posix": lambda: PosixBackend(3),
    "uring": lambda: UringBackend(),
    "uring, two at a time": lambda: UringBackend(2),
    "posix, paced": lambda: PacedBackend(PosixBackend(3), INSTANT),
    "uring, paced": lambda: PacedBackend(UringBackend(), INSTANT),
}


@pytest.fixture(params=MAKERS)
def backend(request: pytest.FixtureRequest) -> Iterator[IOBackend]:
    if "uring" in request.param and uring_error() is not None:
        pytest.skip(str(uring_error()))
    made = MAKERS[request.param]()
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path, backend: IOBackend) -> Iterator[BlockStore]:
    with make_store(tmp_path, backend=backend) as made:
        yield made


@pytest.fixture
def uring(tmp_path: Path) -> Iterator[tuple[BlockStore, UringBackend]]:
    if uring_error() is not None:
        pytest.skip(str(uring_error()))
    backend = UringBackend(4)
    with make_store(tmp_path, backend=backend) as made:
        yield made, backend
    backend.close()


def begin(store: BlockStore, ids: Any, out: np.ndarray | None = None) -> tuple[Any, np.ndarray]:
    """Submit a read of some records into rows of their own."""
    ids = np.asarray(ids)
    out = aligned_empty((len(ids), SIZE)) if out is None else out
    return store.read(ids, places(ids), out, np.arange(len(ids))), out


# -- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 8192, 65536])
@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_any_records_come_back_in_any_order(
    tmp_path: Path, backend: IOBackend, gap: int, direct_io: str
) -> None:
    generator = np.random.default_rng(gap)
    with make_store(tmp_path, backend=backend, read_gap_bytes=gap, direct_io=direct_io) as store:
        records = fill(store, 200)
        for count in (1, 2, 26, 150):
            ids = generator.permutation(200)[:count]
            assert np.array_equal(read_back(store, ids), records[ids])
        newer = make_records(90, seed=9)
        ids = generator.permutation(200)[:90]
        store.write(ids, places(ids), newer).wait()
        assert np.array_equal(read_back(store, ids), newer)


def test_what_lies_in_gaps_is_counted_and_kept_from_the_rows(
    tmp_path: Path, backend: IOBackend
) -> None:
    with make_store(tmp_path, backend=backend, read_gap_bytes=8192) as store:
        records = fill(store, 20)
        before = store.table_bytes
        assert np.array_equal(read_back(store, [1, 3, 6, 15]), records[[1, 3, 6, 15]])
        assert (store.stats.reads, store.stats.bytes_read) == (2, 7 * SIZE)
        assert before >= 8192


def test_nothing_touches_a_buffer_once_its_ticket_is_done(store: BlockStore) -> None:
    fill(store, 64)
    for turn in range(20):
        ticket, out = begin(store, np.arange(turn % 2, 64, 2))
        if turn % 3:
            ticket.wait()
        while not ticket.done():
            pass
        out[:] = 7
        ticket.wait()
        assert (out == 7).all()


def test_tickets_may_be_waited_for_in_any_order_and_again(store: BlockStore) -> None:
    records = fill(store, 64)
    tickets = [begin(store, range(first, 64, 8)) for first in range(8)]
    for first in (5, 0, 7, 2, 5, 1, 3, 4, 6, 0):
        ticket, out = tickets[first]
        ticket.wait()
        assert ticket.done()
        assert np.array_equal(out, records[first::8])
    assert store.stats.reads == 64


def test_writes_nobody_waited_for_are_read_as_written(store: BlockStore) -> None:
    records = make_records(40)
    for k in range(40):
        store.write(np.array([k]), places([k]), records[k : k + 1])
    assert np.array_equal(read_back(store, range(40)), records)


def test_closing_finishes_what_is_in_flight(tmp_path: Path, backend: IOBackend) -> None:
    store = make_store(tmp_path, backend=backend)
    records = fill(store, 300)
    pairs = [begin(store, range(first, 300, 3)) for first in range(3)]
    store.close()
    for first, (ticket, out) in enumerate(pairs):
        ticket.wait()
        assert np.array_equal(out, records[first::3])
    backend.close()
    backend.close()
    with make_store(tmp_path, backend=backend) as other, pytest.raises(SessionClosedError):
        fill(other, 1)


def test_a_store_dropped_with_work_in_flight_gives_its_file_back(
    tmp_path: Path, backend: IOBackend
) -> None:
    store = make_store(tmp_path, backend=backend)
    records = fill(store, 8)
    fd = store._files[0].fd
    ticket, out = begin(store, range(8))
    del store
    ticket.wait()
    assert np.array_equal(out, records)
    del ticket
    for _ in range(100):
        try:
            os.fstat(fd)
        except OSError:
            return
        threading.Event().wait(0.02)
    pytest.fail("the file is still open")


# -- what goes wrong --------------------------------------------------------------------------


def test_a_file_cut_short_is_found_out_and_another_store_goes_on(
    tmp_path: Path, backend: IOBackend
) -> None:
    (tmp_path / "other").mkdir()
    with (
        make_store(tmp_path, keep=True, backend=backend) as store,
        make_store(tmp_path / "other", backend=backend) as other,
    ):
        records, others = fill(store, 8), fill(other, 8, seed=3)
        os.truncate(tmp_path / "kvswap-store" / "device-0.kv", START + 5 * SIZE)
        ticket, _ = begin(store, [1, 5, 6])
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match="truncated") as caught:
                ticket.wait()
        assert caught.value.record_ids == (5, 6)
        assert np.array_equal(read_back(store, [1, 3]), records[[1, 3]])
        assert np.array_equal(read_back(other, range(8)), others)


def test_a_changed_record_is_named(store: BlockStore) -> None:
    fill(store, 8)
    path = f"/proc/self/fd/{store._files[0].fd}"
    with open(path, "r+b") as file:
        file.seek(START + 6 * SIZE + 100)
        file.write(b"changed")
    with pytest.raises(CorruptStoreError, match="record 6 at offset 28672") as caught:
        read_back(store, [2, 3, 5, 6, 7])
    assert caught.value.record_ids == (6,)
    assert store.stats.bytes_read == 5 * SIZE


def test_a_closed_descriptor_is_an_error_at_wait(store: BlockStore) -> None:
    fill(store, 8)
    file = store._files[0]
    other, kept = os.open(os.devnull, os.O_RDONLY), os.dup(file.fd)
    try:
        os.dup2(other, file.fd)
        ticket = store.write(np.arange(2), places([0, 1]), make_records(2))
        with pytest.raises(DeviceIOError) as caught:
            ticket.wait()
        assert caught.value.errno == errno.EBADF
        assert (caught.value.offset_bytes, caught.value.nbytes) == (START, 2 * SIZE)
        assert caught.value.record_ids == (0, 1)
        os.dup2(kept, file.fd)
        with pytest.raises(CorruptStoreError, match="never"):
            read_back(store, [0])
        read_back(store, range(2, 8))
    finally:
        os.close(other)
        os.close(kept)


CODES = [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENODEV, errno.ETIMEDOUT]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("at", [0, 1, 4, 9])
@pytest.mark.parametrize("is_write", [False, True])
def test_a_completion_that_failed_fails_its_own_records_only(uring, code, at, is_write) -> None:
    store, backend = uring
    records, newer = fill(store, 20), make_records(10, seed=5)
    ids = np.arange(0, 20, 2)
    backend.inject(at, -code)
    if is_write:
        ticket = store.write(ids, places(ids), newer)
    else:
        ticket, out = begin(store, ids)
    with pytest.raises(StoreFullError if code == errno.ENOSPC else DeviceIOError) as caught:
        ticket.wait()
    assert caught.value.errno == code
    (failed,) = caught.value.record_ids
    if isinstance(caught.value, DeviceIOError):
        assert caught.value.offset_bytes == START + failed * SIZE
    rest = ids[ids != failed]
    if is_write:
        assert np.array_equal(read_back(store, rest), newer[rest // 2])
        with pytest.raises(CorruptStoreError, match="never"):
            read_back(store, [failed])
    else:
        assert np.array_equal(out[rest // 2], records[rest])
        assert np.array_equal(read_back(store, [failed]), records[[failed]])


@pytest.mark.parametrize("moved", [512, 4096, 5632, 40448])
@pytest.mark.parametrize("is_write", [False, True])
def test_a_short_completion_is_finished(uring, moved, is_write) -> None:
    store, backend = uring
    fill(store, 12)
    newer = make_records(12, seed=5)
    if is_write:
        backend.inject(0, moved)
        store.write(np.arange(12), places(range(12)), newer).wait()
    else:
        store.write(np.arange(12), places(range(12)), newer).wait()
        backend.inject(0, moved)
    out = aligned_empty((12, SIZE))
    rows = np.array([3, 1, 0, 2, 8, 9, 10, 11, 4, 5, 6, 7])
    store.read(np.arange(12), places(range(12)), out, rows).wait()
    assert np.array_equal(out[rows], newer)


def test_a_write_that_moves_nothing_is_an_error_and_not_a_loop(uring) -> None:
    store, backend = uring
    backend.inject(0, 0)
    with pytest.raises(DeviceIOError, match="wrote nothing"):
        fill(store, 2)
    fill(store, 2)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR, errno.ECANCELED])
def test_what_passes_is_tried_again(uring, code) -> None:
    store, backend = uring
    records = fill(store, 9)
    backend.inject(2, -code)
    assert np.array_equal(read_back(store, range(0, 9, 2)), records[::2])


def test_the_first_error_in_order_of_place_is_raised_each_time(uring) -> None:
    store, backend = uring
    fill(store, 9)
    with open(f"/proc/self/fd/{store._files[0].fd}", "r+b") as file:
        file.seek(START + 8 * SIZE)
        file.write(b"changed")
    backend.inject(0, -errno.EIO)
    ticket, _ = begin(store, [8, 0, 4])
    for _ in range(3):
        with pytest.raises(DeviceIOError):
            ticket.wait()
        assert ticket.done()
    assert (store.stats.reads, store.stats.bytes_read) == (2, 2 * SIZE)


# -- processes, threads, signals --------------------------------------------------------------


def in_child(work: Callable[[], bool]) -> None:
    """Run in a forked child; it must say yes, and end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


def is_refused(work: Callable[[], object]) -> bool:
    try:
        work()
    except SessionClosedError:
        return True
    return False


def test_a_forked_child_is_refused_and_the_parent_goes_on(
    tmp_path: Path, backend: IOBackend
) -> None:
    store = make_store(tmp_path, backend=backend)
    records = fill(store, 64)
    ticket, out = begin(store, range(64))

    def child() -> bool:
        refused = [
            is_refused(lambda: begin(store, range(4))),
            is_refused(lambda: fill(store, 4)),
            is_refused(lambda: fill_with(backend, tmp_path)),
        ]
        if not ticket.done():
            refused.append(is_refused(ticket.wait))
        store.close()  # closes nothing of the parent's
        backend.close()
        return all(refused)

    in_child(child)
    ticket.wait()
    assert np.array_equal(out, records)
    assert np.array_equal(read_back(store, range(64)), records)
    store.close()


def fill_with(backend: IOBackend, directory: Path) -> None:
    (directory / str(os.getpid())).mkdir()
    with make_store(directory / str(os.getpid()), backend=backend) as store:
        fill(store, 1)


def test_a_forked_child_can_make_a_store_of_its_own(tmp_path: Path, store: BlockStore) -> None:
    fill(store, 8)
    (tmp_path / "child").mkdir()

    def child() -> bool:
        with make_store(tmp_path / "child") as own:
            return np.array_equal(fill(own, 4), read_back(own, range(4)))

    in_child(child)


def test_threads_may_wait_for_each_others_tickets(store: BlockStore) -> None:
    records = fill(store, 128)
    errors: list[BaseException] = []
    shared: list[tuple[Any, np.ndarray, np.ndarray]] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(30):
                ids = generator.permutation(128)[:20]
                ticket, out = begin(store, ids)
                shared.append((ticket, out, ids))
                other = shared[generator.integers(len(shared))]
                other[0].wait()
                assert np.array_equal(other[1], records[other[2]])
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for ticket, out, ids in shared:
        ticket.wait()
        assert np.array_equal(out, records[ids])


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_a_thread_may_end_before_what_it_submitted(
    tmp_path: Path, backend: IOBackend, direct_io: str
) -> None:
    with make_store(tmp_path, backend=backend, direct_io=direct_io) as store:
        records = make_records(300)
        tickets: list[Any] = []

        def work() -> None:
            for first in range(3):
                ids = np.arange(first, 300, 3)
                mine = aligned_empty((100, SIZE))
                mine[:] = records[ids]
                tickets.append(store.write(ids, places(ids), mine))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        for ticket in tickets:
            ticket.wait()
        assert np.array_equal(read_back(store, range(300)), records)


class Interrupted(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def ticking() -> Iterator[Callable[[bool], list[int]]]:
    """Begin a signal a millisecond, whose handler counts, or raises the first time."""

    def begin_ticking(raises: bool) -> list[int]:
        ticks: list[int] = []

        def handler(number: int, _: object) -> None:
            ticks.append(number)
            if raises and len(ticks) == 1:
                raise Interrupted

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        return ticks

    before = signal.getsignal(signal.SIGALRM)
    yield begin_ticking
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_signals_during_a_wait_are_handled_and_it_goes_on(store: BlockStore, ticking) -> None:
    records = fill(store, 256)
    ticks = ticking(False)
    while len(ticks) < 30:
        assert np.array_equal(read_back(store, range(0, 256, 3)), records[::3])


@pytest.mark.parametrize("name", ["posix", "uring"])
def test_an_interrupted_wait_outlives_its_io(name: str, tmp_path: Path, ticking) -> None:
    if name == "uring" and uring_error() is not None:
        pytest.skip(str(uring_error()))
    backend = PacedBackend(MAKERS[name](), SLOW)
    with make_store(tmp_path, backend=backend) as store:
        records = fill(store, 64)
        ticket, out = begin(store, range(0, 64, 2))
        ticking(True)
        with pytest.raises(Interrupted):
            ticket.wait()
        assert np.array_equal(out, records[::2])
        ticket.wait()
        assert ticket.done()
    backend.close()


@needs_uring
def test_a_wait_interrupted_in_the_kernel_ends_when_the_read_has(ticking) -> None:
    engine = native.Engine(4)
    reader, writer = os.pipe()  # a read that lasts until somebody writes
    out = aligned_empty((1, SIZE))
    plan = native.plan(
        *(np.zeros(1, np.int64), np.zeros(1, np.int16), np.zeros(1, np.int64)),
        *(np.zeros(1, np.int64), np.ones(1, np.uint32), out, aligned_empty(0)),
        *(((reader, 0, SIZE),), SIZE, SIZE, 0, SIZE, False),
    )
    ticket = engine.submit(plan)
    assert not ticket.done()
    timer = threading.Timer(0.1, os.write, (writer, b"x" * SIZE))
    timer.start()
    ticking(True)
    with pytest.raises(Interrupted):
        ticket.wait()
    assert (out == ord("x")).all()
    assert ticket.done()
    timer.join()
    engine.close()
    os.close(reader)
    os.close(writer)


# -- pacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["posix", "uring"])
@pytest.mark.parametrize("is_native", [True, False])
def test_completions_are_held_until_the_model_would_be_done(
    name: str, is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name == "uring" and uring_error() is not None) or (is_native and native is None):
        pytest.skip("not here")
    if not is_native:
        monkeypatch.setattr(paced_module, "native", None)
    backend = PacedBackend(MAKERS[name](), SLOW)
    with make_store(tmp_path, backend=backend) as store:
        begun = time.monotonic()
        fill(store, 12)  # one request
        assert time.monotonic() - begun >= 0.005
        begun = time.monotonic()
        first, _ = begin(store, range(0, 12, 2))
        second, _ = begin(store, [0])
        assert not first.done()
        second.wait()
        assert time.monotonic() - begun >= 7 * 0.005
        assert first.done()
        first.wait()
    backend.close()


class _Plan:
    """A plan of requests of some lengths on one device."""

    def __init__(self, *lengths: int) -> None:
        self._lengths = lengths

    def transfers(self) -> list[tuple[int, int, int, int, int]]:
        return [(0, 0, nbytes, 0, 0) for nbytes in self._lengths]


def test_a_request_costs_what_the_larger_limit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10**9]
    monkeypatch.setattr(paced_module.time, "monotonic_ns", lambda: now[0])
    pacer = PlainPacer(bytes_per_s=1e9, iops=1000)
    assert pacer.charge(_Plan(4096)) == 10**9 + 10**6
    assert pacer.charge(_Plan(3 * 10**6, 1)) == 10**9 + 5 * 10**6  # after the one before
    now[0] += 10**10
    assert pacer.charge(_Plan(4096)) == now[0] + 10**6  # an idle device saves nothing up


# -- which one --------------------------------------------------------------------------------


def backend_of(directory: Path, **settings: Any) -> IOBackend:
    with make_store(directory, **settings) as store:
        return store._drives.backends[0]


@needs_uring
def test_a_backend_can_be_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("posix", PosixBackend), ("uring", UringBackend)):
        monkeypatch.setenv("KVSWAP_IO", name)
        plain = backend_of(tmp_path)
        assert isinstance(plain, kind)
        assert plain.name == name
        paced = backend_of(tmp_path, device_model="nvme")
        assert isinstance(paced, PacedBackend)
        assert isinstance(paced._inner, kind)
        assert paced.name == f"{name}, paced as nvme"


def test_one_that_is_not_there_is_an_error_where_forced_and_said_once_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_module, "uring_error", lambda: "io_uring is refused: no")
    monkeypatch.setenv("KVSWAP_IO", "uring")
    with pytest.raises(ConfigError, match=r"name a backend that is there.*refused"):
        backend_of(tmp_path)
    monkeypatch.delenv("KVSWAP_IO")
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"go through threads.*refused: no"):
        assert isinstance(backend_of(tmp_path), PosixBackend)
    assert isinstance(backend_of(tmp_path), PosixBackend)
    monkeypatch.setenv("KVSWAP_IO", "aio")
    with pytest.raises(ConfigError, match="one of auto, posix, uring, got 'aio'"):
        backend_of(tmp_path)


def test_a_failure_leaves_the_process_able_to_go_on(uring, tmp_path: Path) -> None:
    store, backend = uring
    fill(store, 4)
    backend.inject(0, -errno.EIO)
    with pytest.raises(StoreError):
        read_back(store, [0, 2])
    (tmp_path / "next").mkdir()
    with make_store(tmp_path / "next") as other:
        assert np.array_equal(fill(other, 9), read_back(other, range(9)))
