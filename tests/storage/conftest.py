"""A directory and a store of small records."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvswap.storage import BlockStore
from tests.storage.helpers import make_store

MIB = 2**20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with make_store(tmp_path) as made:
        yield made


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    target = tmp_path / "tiny"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", str(target)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip(f"this system does not let root mount: {mounted.stderr.decode().strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)
