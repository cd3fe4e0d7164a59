"""Compare the I/O backends: processor time, wall time and gaps of scattered reads.

Both backends read the same records of one store each, in batches like those of a decode step,
alternated in one process, with direct I/O. The processor time is that of the whole process,
kernel included, so that the pool's threads are in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvswap.bench.record import Record, describe_device
from kvswap.core.config import StorageConfig
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.storage import BlockStore, Extents, IOBackend
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.posix import PosixBackend
from kvswap.storage.uring import UringBackend, uring_error

RESULTS = Path(__file__).resolve().parents[1] / "results" / "io_engine.jsonl"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record-bytes", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=26, help="records of a read")
    parser.add_argument("--records", type=int, default=65536, help="records of a store")
    parser.add_argument("--reads", type=int, default=200, help="reads in a sample")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--threads", type=int, default=4, help="of the pool")
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy size; shows that it runs")
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.records, args.reads, args.samples = 256, 4, 2
    return args


class Side:
    """One backend with a store full of records."""

    def __init__(self, args: argparse.Namespace, directory: Path, backend: IOBackend) -> None:
        size = args.record_bytes
        geometry = KVGeometry(
            num_layers=1, num_heads=1, num_kv_heads=1, head_dim=size // 16, dtype="float16"
        )
        layout = RecordLayout(geometry=geometry, group_size=4, block_size_bytes=4096)
        storage = StorageConfig(directories=[directory], read_gap_bytes=0)
        self.store = BlockStore.create(storage, layout, backend=backend)
        self._out = aligned_empty((args.batch, size))
        self._size = size
        records = aligned_empty((min(512, args.records), size))
        records[:] = np.random.default_rng(args.seed).integers(0, 256, records.shape, np.uint8)
        for first in range(0, args.records, len(records)):
            ids = np.arange(first, first + len(records))
            self.store.write(ids, self._extents(ids), records).wait()

    def _extents(self, ids: np.ndarray) -> Extents:
        return Extents(np.zeros(len(ids), np.int16), ids * self._size)

    def read(self, ids: np.ndarray) -> None:
        """Read a batch and wait for it."""
        self.store.read(ids, self._extents(ids), self._out, np.arange(len(ids))).wait()

    def sample(self, batches: list[np.ndarray]) -> tuple[float, float]:
        """Return the processor and the wall seconds that a record takes."""
        cpu, wall = time.process_time(), time.perf_counter()
        for ids in batches:
            self.read(ids)
        count = sum(map(len, batches))
        return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def scattered(args: argparse.Namespace, generator: np.random.Generator) -> list[np.ndarray]:
    """Draw batches of records no two of which are neighbours."""
    places = args.records // 2
    return [2 * generator.choice(places, args.batch, replace=False) for _ in range(args.reads)]


def run(args: argparse.Namespace, directory: Path) -> list[Record]:
    """Measure, and return the records."""
    generator = np.random.default_rng(args.seed)
    with ExitStack() as stack:
        backends: dict[str, Any] = {"uring": UringBackend(), "posix": PosixBackend(args.threads)}
        sides = {}
        for name, backend in backends.items():
            stack.callback(backend.close)
            sides[name] = Side(args, directory, backend)
            stack.callback(sides[name].store.close)
        if not sides["uring"].store.is_direct:
            raise SystemExit("this file system has no O_DIRECT: choose another by --kv-dir")
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        wall: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.samples + 1):
            batches = scattered(args, generator)
            for name, side in sides.items():
                seconds = side.sample(batches)
                if turn:
                    cpu[name].append(seconds[0])
                    wall[name].append(seconds[1])
    common: dict[str, Any] = {
        "config": {
            "record_bytes": args.record_bytes,
            "batch": args.batch,
            "records": args.records,
            "reads_a_sample": args.reads,
            "threads": args.threads,
        },
        "seed": args.seed,
        "device": describe_device(directory),
        "cache_state": "O_DIRECT",
        "extra": {"cpu_s_per_read": cpu, "wall_s_per_read": wall},
    }
    question = "{} time a scattered read takes through io_uring over that through threads"
    return [
        Record(
            metric=f"uring_{kind}_ratio",
            unit="ratio",
            samples=[a / b for a, b in zip(times["uring"], times["posix"], strict=True)],
            question=question.format(label),
            **common,
        )
        for kind, label, times in (("cpu", "processor", cpu), ("wall", "wall", wall))
    ]


def main() -> None:
    """Run, append records and say what was seen."""
    args = parse_arguments()
    reason = uring_error()
    if reason is not None:
        raise SystemExit(f"nothing to compare: {reason}")
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        records = run(args, Path(directory))
    for record in records:
        written = record.append(args.results)
        if args.json:
            print(json.dumps(written))
            continue
        low, high = min(record.samples), max(record.samples)
        print(f"{record.metric}: {written['value']:.3f} {record.unit} [{low:.3f}, {high:.3f}]")
    if not args.json:
        for kind, times in records[0].extra.items():
            for name, seconds in times.items():
                print(f"  {kind} {name}: {np.median(seconds) * 1e6:.1f} us")


if __name__ == "__main__":
    main()
