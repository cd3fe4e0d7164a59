"""Kernels and I/O engine; reached through kvswap.kernels and kvswap.storage."""

import numpy as np
from numpy.typing import NDArray

# -- kernels (csrc/kernels) -------------------------------------------------------------------

def kernel_names() -> list[str]: ...
def kernel_name() -> str: ...
def use_kernels(name: str) -> bool: ...
def num_threads() -> int: ...
def top(
    scores: int, num_scores: int, pinned: NDArray[np.int64], out: NDArray[np.int64]
) -> None: ...

class Scanner:
    def __init__(
        self,
        code: int,
        codes: int,
        scales: int,
        basis: int,
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
        out: int,
    ) -> None: ...
    def encode(self, tokens: int, dtype: int, ids: NDArray[np.int64]) -> None: ...

class Attender:
    def __init__(
        self,
        pool: int,
        num_slots: int,
        record_bytes: int,
        group_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: int,
    ) -> None: ...
    def attend(
        self,
        query: tuple[int, int, int, int, int],
        rows: NDArray[np.int64],
        rolling: tuple[int, int, int, int, int, int, int],
        newest: tuple[int, int, int, int, int, int, int],
        scaling: float,
        softcap: float,
        out: int,
        lse: int,
    ) -> None: ...

# -- cache (csrc/cache) -----------------------------------------------------------------------

class SlotTable:
    def __init__(
        self,
        row_of: NDArray[np.int32],
        group_in: NDArray[np.int64],
        last_used: NDArray[np.int64],
    ) -> None: ...
    def take(
        self,
        layer_idx: int,
        wanted: NDArray[np.int64],
        step: int,
        missing: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> int: ...
