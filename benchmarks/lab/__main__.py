"""Run a command on throttled drives and within a memory limit, kept by the kernel; needs root.

The command finds its drives as {dir0}, {dir1} ... in its own words, or in KVSWAP_LAB_DIRS. All is
taken down when it ends, and what killed runs have left when the next one begins:

    python -m benchmarks.lab --device emmc --device 50MB/s:1250 --memory 512MiB -- \
        python benchmarks/system/io_engine.py --kv-dir {dir0}
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from kvswap.bench.lab import FAST_DIR, check_possible, clean, lab
from kvswap.bench.lab_command import parse_device, run_within
from kvswap.bench.leftovers import ended_by_signals
from kvswap.core.errors import KVSwapError
from kvswap.core.units import parse_bytes


def parse_arguments() -> argparse.Namespace:
    """Return what is to be run, and on what."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", action="append", default=[], metavar="MODEL",
        help="a drive: a preset's name, 50MB/s:1250 (bandwidth, requests a second), or raw;"
        " once for each",
    )  # fmt: skip
    parser.add_argument("--size", default="1GiB", help="of each drive")
    parser.add_argument("--memory", help="limit of the command, page cache included (512MiB)")
    parser.add_argument(
        "--kv-dir", type=Path, default=Path(tempfile.gettempdir()), help="drives are files in it"
    )
    parser.add_argument(
        "--fast-dir", type=Path, default=FAST_DIR, help="for devices faster than the local disk"
    )
    parser.add_argument("--clean", action="store_true", help="only remove what killed runs left")
    parser.add_argument("command", nargs="*", help="what to run, after --")
    args = parser.parse_args()
    if not args.clean and not args.command:
        parser.error("what is to be run must follow after --")
    return args


def run(args: argparse.Namespace) -> int:
    """Clean, or run the command; return its exit code."""
    if args.clean:
        check_possible()
        for name in clean({args.kv_dir, args.fast_dir}):
            print(f"removed {name}")
        return 0
    models = [parse_device(device) for device in args.device]
    made = lab(
        models,
        size_bytes=parse_bytes(args.size, field="--size"),
        memory_bytes=parse_bytes(args.memory, field="--memory") if args.memory else None,
        directory=args.kv_dir,
        fast_dir=args.fast_dir,
    )
    with made as drives:
        return run_within(drives, args.command)


def main() -> int:
    """Run; an error is one line."""
    args = parse_arguments()
    try:
        with ended_by_signals():
            return run(args)
    except KVSwapError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
