"""What csrc/ shows to Python, in sections by the folder that it comes from."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# -- csrc/io ------------------------------------------------------------------------------

class ForkedError(Exception): ...
class ClosedError(Exception): ...

class Plan:
    def __len__(self) -> int: ...
    def transfers(self) -> list[tuple[int, int, int, int, int]]: ...
    def column(self, name: str) -> list[int]: ...
    def check(self, transfer: int) -> tuple[int, int] | None: ...

class Ticket:
    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def outcome(self) -> tuple[int, int, list[tuple[int, str, int, int, int]]]: ...
    def checksums(self) -> bytes: ...

class Engine:
    def __init__(self, depth: int) -> None: ...
    def submit(self, plan: Plan) -> Ticket: ...
    def close(self) -> None: ...
    def inject(self, countdown: int, result: int) -> None: ...

class Pacer:
    def __init__(self, bytes_per_s: float, iops: float) -> None: ...
    def charge(self, plan: Plan) -> int: ...

def plan(
    ids: np.ndarray,
    devices: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray | None,
    checksums: np.ndarray | None,
    memory: np.ndarray,
    scratch: np.ndarray,
    files: tuple[tuple[int, int, int], ...],
    record_bytes: int,
    block_bytes: int,
    gap_bytes: int,
    most_bytes: int,
    is_write: bool,
) -> Plan | None: ...
def hold_until(moment_ns: int) -> None: ...
def now_ns() -> int: ...
def crc32c(data: Any, crc: int = 0) -> int: ...
def has_crc32c_instruction() -> bool: ...

# -- csrc/kernels -------------------------------------------------------------------------

def kernel_names() -> list[str]: ...
def kernel_name() -> str: ...
def use_kernels(name: str) -> bool: ...
def num_threads() -> int: ...
def top(
    scores: int, num_scores: int, pinned: NDArray[np.int64], out: NDArray[np.int64]
) -> None: ...
def discourage(scores: int, num_scores: int, kept: NDArray[np.int32], least: float) -> None: ...
def pack(
    tokens: tuple[int, int, int, int, int, int, int],
    records: int,
    stride_bytes: int,
    count: int,
    shape: tuple[int, int, int, int, int, int, int],
    centre: int,
) -> None: ...
def unpack(
    records: int,
    stride_bytes: int,
    count: int,
    shape: tuple[int, int, int, int, int, int, int],
    centre: int,
    keys: int,
    values: int,
) -> None: ...
def merge(out: int, lse: int, part: int, part_lse: int, rows: int, head_dim: int) -> None: ...
def rotate(
    query: int,
    cos: int,
    sin: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    dtype: int,
    out: int,
) -> None: ...

class Scanner:
    def __init__(
        self,
        code: int,
        codes: int,
        scales: int,
        basis: int,
        query_basis: int,
        offsets: int,
        steps: int,
        counts: tuple[int, int, int],
        width: int,
        rank: int,
        group_size: int,
        num_groups: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None: ...
    def scan(
        self,
        query: int,
        dtype: int,
        num_heads: int,
        q_len: int,
        head_stride: int,
        token_stride: int,
        scaling: float,
        ids: NDArray[np.int64],
        wanted: int,
        out: int,
    ) -> None: ...
    def encode(self, tokens: int, dtype: int, ids: NDArray[np.int64]) -> None: ...
    def hold_spans(self, codes: int, scales: int, radii: int) -> None: ...
    def bound(self, ids: NDArray[np.int64]) -> None: ...
    def best(
        self,
        query: tuple[int, int, int, int, int, int],
        scaling: float,
        ids: NDArray[np.int64],
        wanted: int,
        kept: NDArray[np.int32],
        by_spans: bool,
        out: int,
    ) -> float: ...

class Attender:
    def __init__(
        self,
        pool: int,
        num_slots: int,
        record_bytes: int,
        shape: tuple[int, int, int, int, int, int, int],
    ) -> None: ...
    def attend(
        self,
        query: tuple[int, int, int, int, int],
        rows: NDArray[np.int64],
        rolling: tuple[int, int, int, int, int, int, int],
        newest: tuple[int, int, int, int, int, int, int],
        centre: int,
        scaling: float,
        softcap: float,
        out: int,
        lse: int,
    ) -> None: ...
    def decode(
        self,
        query: int,
        num_heads: int,
        query_stride: int,
        groups: NDArray[np.int64],
        row_of: NDArray[np.int32],
        rolling: int,
        room: int,
        length: int,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        centre: int,
        scaling: float,
        softcap: float,
        out: int,
    ) -> None: ...

# -- csrc/cache ---------------------------------------------------------------------------

class CopyChooser:
    def __init__(
        self,
        bytes_per_s: NDArray[np.float64],
        iops: NDArray[np.float64],
        gap_bytes: NDArray[np.int64],
        record_bytes: int,
        most_bytes: int,
    ) -> None: ...
    def choose(
        self, drives: NDArray[np.int16], places: NDArray[np.int64], picked: NDArray[np.int64]
    ) -> None: ...

class SlotTable:
    def __init__(
        self,
        row_of: NDArray[np.int32],
        group_in: NDArray[np.int64],
        last_used: NDArray[np.int64],
        priority: NDArray[np.float32] | None,
    ) -> None: ...
    def take(
        self,
        layer_idx: int,
        rows: NDArray[np.int32],
        wanted: NDArray[np.int64],
        step: int,
        weight: float,
        missing: NDArray[np.int64],
        given: NDArray[np.int64],
    ) -> int: ...
