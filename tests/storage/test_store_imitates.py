"""A store may be as slow as one device after the other; its bytes stay the same."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.errors import SessionClosedError
from kvswap.storage import paced
from kvswap.storage.buffers import aligned_empty
from tests.storage.helpers import fill, make_store, places, read_back

COUNT = 8
MODELS = {
    "slow": DeviceModel(name="slow", bytes_per_s=4096 / 0.002, iops=1e9),
    "of few requests": DeviceModel(name="of few requests", bytes_per_s=1e12, iops=250),
}
CHARGE_S = {"slow": COUNT * 0.002, "of few requests": COUNT * 0.004}


def charged(store: Any) -> tuple[float, float]:
    """Return between what seconds the charge of reading all records lies, far from each other."""
    ids, out = np.arange(0, 2 * COUNT, 2), aligned_empty((COUNT, 4096))
    before = time.monotonic_ns()
    ticket = store.read(ids, places(ids), out, np.arange(COUNT))
    after = time.monotonic_ns()
    moment_ns = getattr(ticket, "_moment_ns", 0)
    ticket.wait()
    return (moment_ns - after) / 1e9, (moment_ns - before) / 1e9


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("made_as", [None, "nvme"])
def test_reads_are_charged_by_the_model_at_hand(made_as, is_native, tmp_path, monkeypatch):
    if not is_native:
        monkeypatch.setattr(paced, "native", None)
    with make_store(tmp_path, device_model=made_as) as store:
        records = fill(store, 2 * COUNT)
        plain = store.backend_name.partition(",")[0]
        for name in (*MODELS, *MODELS):
            store.imitate(MODELS[name])
            assert store.backend_name == f"{plain}, paced as {name}"
            least, most = charged(store)
            assert least - 1e-4 <= CHARGE_S[name] <= most + 1e-4
            assert np.array_equal(read_back(store, range(2 * COUNT)), records)
        store.imitate(None)
        assert store.backend_name == plain
        assert np.array_equal(read_back(store, range(2 * COUNT)), records)


def test_gaps_are_read_through_as_the_model_asks_for(tmp_path):
    with make_store(tmp_path, read_gap_bytes=None) as store:
        fill(store, 2 * COUNT)
        ids, requests = range(0, 2 * COUNT, 2), []
        seeks = DeviceModel(name="seeks", bytes_per_s=8192 * 1000, iops=1000)
        streams = DeviceModel(name="streams", bytes_per_s=1e9, iops=1e6)
        for model in (streams, seeks, None, streams):
            store.imitate(model)
            before, held = store.stats.reads, store.table_bytes
            read_back(store, ids)
            requests.append(store.stats.reads - before)
            assert store.table_bytes == held
        assert requests == [COUNT, 1, 1, COUNT]


def test_what_is_in_flight_ends_before(tmp_path):
    with make_store(tmp_path, device_model=MODELS["slow"]) as store:
        records = fill(store, COUNT)
        out = aligned_empty((COUNT, 4096))
        ticket = store.read(np.arange(COUNT), places(range(COUNT)), out, np.arange(COUNT))
        store.imitate(PRESETS["ufs31"])
        assert ticket.done()
        assert np.array_equal(out, records)


def test_a_closed_store_imitates_nothing(tmp_path):
    store = make_store(tmp_path)
    store.close()
    with pytest.raises(SessionClosedError):
        store.imitate(None)
