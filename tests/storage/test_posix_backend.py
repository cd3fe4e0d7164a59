"""Every byte moves or the ticket says what went wrong, and nothing is in flight after it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.core.errors import (
    CorruptStoreError,
    DeviceIOError,
    SessionClosedError,
    StoreFullError,
)
from kvswap.storage import Transfer
from kvswap.storage.posix import IOV_MAX, PosixBackend
from tests.storage.helpers import Counted, Gated, failing, failing_write, short

NBYTES = 64 * 1024


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8).tobytes()


@pytest.fixture
def target(tmp_path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    yield fd, str(path)
    os.close(fd)


def reading(target: tuple[int, str], offset: int, sizes: list[int]) -> tuple[Transfer, list]:
    arrays = [bytearray(size) for size in sizes]
    views = [memoryview(array) for array in arrays]
    return Transfer(*target, offset, views, sum(sizes), is_write=False), arrays


def writing(target: tuple[int, str], offset: int, parts: list[bytes]) -> Transfer:
    views = [memoryview(part) for part in parts]
    return Transfer(*target, offset, views, sum(map(len, parts)), is_write=True)


def run(transfers: list[Transfer], num_threads: int = 2, **calls: Callable[..., int]) -> None:
    backend = PosixBackend(num_threads, **calls)
    try:
        backend.submit(transfers).wait()
    finally:
        backend.close()


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    step=st.integers(1, 4000),
)
def test_short_reads_and_writes_are_finished(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], step: int
) -> None:
    path = tmp_path_factory.mktemp("short") / "file"
    whole = np.random.default_rng(1).integers(0, 256, 30000, np.uint8).tobytes()
    path.write_bytes(bytes(len(whole)))
    fd = os.open(path, os.O_RDWR)
    try:
        parts, place = [], 100
        for size in sizes:
            parts.append(whole[place : place + size])
            place += size
        target = fd, str(path)
        run([writing(target, 100, parts)], pwritev=short(os.pwritev, step))
        transfer, arrays = reading(target, 100, sizes)
        run([transfer], preadv=short(os.preadv, step))
        assert arrays == parts
        assert path.read_bytes()[100:place] == whole[100:place]
    finally:
        os.close(fd)


def test_more_buffers_than_a_call_may_have_are_moved_in_turn(
    target: tuple[int, str], content: bytes
) -> None:
    transfer, arrays = reading(target, 0, [16] * (IOV_MAX + 10))
    run([transfer])
    assert b"".join(arrays) == content[: 16 * (IOV_MAX + 10)]


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.EBADF, errno.ENOSPC])
def test_a_failed_read_names_path_place_and_errno(target: tuple[int, str], code: int) -> None:
    transfer, _ = reading(target, 4096, [512, 512])
    with pytest.raises(OSError, match=r"\(?1024 bytes") as caught:
        run([transfer], preadv=failing(code))
    if code != errno.ENOSPC:
        assert isinstance(caught.value, DeviceIOError)
        assert (caught.value.offset_bytes, caught.value.nbytes) == (4096, 1024)
    assert caught.value.errno == code
    assert caught.value.filename == target[1]


def test_a_failure_after_part_of_a_transfer_names_the_part(target: tuple[int, str]) -> None:
    first = short(os.preadv, 512)

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 1024:
            raise OSError(errno.EIO, "gone")
        return first(fd, buffers, offset)

    transfer, _ = reading(target, 0, [4096])
    with pytest.raises(DeviceIOError) as caught:
        run([transfer], preadv=call)
    assert (caught.value.offset_bytes, caught.value.nbytes) == (1024, 3072)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_without_room_says_so(target: tuple[int, str], code: int) -> None:
    with pytest.raises(StoreFullError) as caught:
        run([writing(target, 0, [b"x" * 100])], pwritev=failing(code))
    assert caught.value.need_bytes == 100
    assert caught.value.errno == errno.ENOSPC


def test_a_write_that_moves_nothing_is_an_error_and_not_a_loop(target: tuple[int, str]) -> None:
    with pytest.raises(DeviceIOError, match="wrote nothing"):
        run([writing(target, 0, [b"x" * 100])], pwritev=lambda *_: 0)


@pytest.mark.parametrize("start", [0, NBYTES - 4096, NBYTES - 100, NBYTES, NBYTES + 4096])
def test_a_read_past_the_end_is_truncation(target: tuple[int, str], start: int) -> None:
    transfer, _ = reading(target, start, [NBYTES, 1])
    with pytest.raises(CorruptStoreError, match="truncated") as caught:
        run([transfer])
    assert caught.value.path == target[1]
    assert caught.value.found == f"{NBYTES} bytes"


def test_a_file_that_ends_within_a_block_is_truncation_and_no_bad_request(
    target: tuple[int, str],
) -> None:
    def direct(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset % 512:
            raise OSError(errno.EINVAL, "O_DIRECT goes on at blocks only")
        return os.preadv(fd, buffers, offset)

    os.truncate(target[0], NBYTES - 100)
    transfer, _ = reading(target, 0, [NBYTES])
    with pytest.raises(CorruptStoreError, match="truncated"):
        run([transfer], preadv=direct)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_first_error_by_place_in_the_submit_is_raised_each_time(
    target: tuple[int, str], num_threads: int
) -> None:
    transfers = [reading(target, 4096 * k, [4096])[0] for k in range(10)]
    backend = PosixBackend(num_threads, preadv=_failing_from(4096 * 7))
    ticket = backend.submit(transfers)
    for _ in range(3):
        with pytest.raises(DeviceIOError) as caught:
            ticket.wait()
        assert caught.value.offset_bytes == 4096 * 7
        assert ticket.done()
    backend.close()


def _failing_from(first: int) -> Callable[..., int]:
    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= first:
            raise OSError(errno.EIO, "gone")
        return os.preadv(fd, buffers, offset)

    return call


def test_the_error_of_a_callback_is_its_transfers(target: tuple[int, str]) -> None:
    transfers = [reading(target, 4096 * k, [4096])[0] for k in range(4)]
    seen = []

    def on_done(index: int) -> None:
        seen.append(index)
        if index == 2:
            raise CorruptStoreError("file", "a check", expected=1, found=2)

    backend = PosixBackend(1)
    with pytest.raises(CorruptStoreError, match="a check"):
        backend.submit(transfers, on_done).wait()
    backend.close()
    assert seen == [0, 1, 2]


def test_a_callback_is_told_only_of_transfers_that_ended_well(target: tuple[int, str]) -> None:
    transfers = [writing(target, 4096 * k, [b"x" * 4096]) for k in range(4)]
    seen = []
    backend = PosixBackend(4, pwritev=failing_write(errno.EIO, at=8192))
    with pytest.raises(DeviceIOError):
        backend.submit(transfers, seen.append).wait()
    backend.close()
    assert sorted(seen) == [0, 1, 3]


def test_one_call_a_transfer(target: tuple[int, str]) -> None:
    counted = Counted(os.preadv)
    run([reading(target, 4096 * k, [2048, 2048])[0] for k in range(9)], 3, preadv=counted)
    assert counted.calls == 9


def test_no_more_tasks_than_threads(
    target: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = PosixBackend(3)
    submitted = []
    real = backend._pool.submit
    monkeypatch.setattr(
        backend._pool, "submit", lambda *args: submitted.append(args) or real(*args)
    )
    backend.submit([reading(target, 512 * k, [512])[0] for k in range(50)]).wait()
    backend.submit([reading(target, 512 * k, [512])[0] for k in range(2)]).wait()
    backend.close()
    assert len(submitted) == 3 + 2


def test_waiting_ends_after_the_last_transfer_even_where_another_failed(
    target: tuple[int, str],
) -> None:
    gated = Gated()

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0:
            raise OSError(errno.EIO, "gone")
        return gated(fd, buffers, offset)

    failed, _ = reading(target, 0, [512])
    slow, arrays = reading(target, 512, [512])
    backend = PosixBackend(2, preadv=call)
    ticket = backend.submit([failed, slow])
    assert gated.entered.wait(30)
    assert not ticket.done()
    waiter = _Waiter(ticket.wait)
    assert not waiter.ended.wait(0.05)
    gated.gate.set()
    assert waiter.ended.wait(30)
    assert isinstance(waiter.error, DeviceIOError)
    assert any(arrays[0])
    backend.close()


class _Waiter:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.ended, self.error = threading.Event(), None
        self._wait = wait
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._wait()
        except (OSError, ValueError) as error:
            self.error = error
        self.ended.set()


def test_an_interrupted_wait_still_outlives_the_transfers(target: tuple[int, str]) -> None:
    gated = Gated()
    backend = PosixBackend(1, preadv=gated)
    transfer, arrays = reading(target, 0, [512])
    ticket = backend.submit([transfer])
    real = ticket._futures[0].exception

    def interrupted() -> None:
        ticket._futures[0].exception = real
        threading.Timer(0.02, gated.gate.set).start()
        raise KeyboardInterrupt

    ticket._futures[0].exception = interrupted
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    assert ticket.done()
    assert any(arrays[0])
    ticket.wait()
    backend.close()


def test_closing_finishes_what_is_queued(target: tuple[int, str]) -> None:
    backend = PosixBackend(1)
    pairs = [reading(target, 512 * k, [512]) for k in range(40)]
    tickets = [backend.submit([transfer]) for transfer, _ in pairs]
    backend.close()
    backend.close()
    assert all(ticket.done() for ticket in tickets)
    assert all(any(arrays[0]) for _, arrays in pairs)
    with pytest.raises(SessionClosedError):
        backend.submit([pairs[0][0]])


def test_nothing_to_move_is_done_at_once() -> None:
    backend = PosixBackend(1)
    ticket = backend.submit([])
    assert ticket.done()
    ticket.wait()
    backend.close()
