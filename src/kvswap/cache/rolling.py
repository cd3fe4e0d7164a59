"""Rolling buffer: each layer's newest tokens, not yet a group on disk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import RecordLayout
from kvswap.kernels.records import DTYPES
from kvswap.kernels.slots import Rolling


class RollingBuffer:
    """Newest keys and values of every layer and sequence.

    Parameters
    ----------
    layout : RecordLayout
        Shape of a group.
    batch_size : int
        Sequences.
    device : torch.device, optional
        Where tokens lie; default: the host.

    Notes
    -----
    It has room for two groups: one that waits for its layer's turn to flush, and one that
    fills meanwhile.
    """

    def __init__(
        self, layout: RecordLayout, batch_size: int, device: torch.device | None = None
    ) -> None:
        geometry = layout.geometry
        self._shape = (2, geometry.num_kv_heads, 2 * layout.group_size, geometry.head_dim)
        self._tokens = torch.zeros(
            (geometry.num_layers, batch_size, *self._shape),
            dtype=DTYPES[geometry.dtype],
            device=device,
        )
        self.lengths = np.zeros((geometry.num_layers, batch_size), np.int64)

    @classmethod
    def plan_bytes(cls, layout: RecordLayout, batch_size: int) -> int:
        """Return the bytes that a buffer of so many sequences takes."""
        geometry = layout.geometry
        return batch_size * (2 * layout.group_size * geometry.token_bytes + 8 * geometry.num_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._tokens.nbytes + self.lengths.nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of it that lie where the tokens do."""
        return self._tokens.nbytes

    def get(self, layer_idx: int, row: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_kv_heads, length, head_dim] of one sequence, as views."""
        length = int(self.lengths[layer_idx, row])
        both = self._tokens[layer_idx, row, :, :, :length]
        return both[0], both[1]

    def place(self, layer_idx: int, row: int) -> Rolling:
        """Return where the tokens of one sequence lie."""
        room = self._shape[2]
        row_bytes = self._tokens.stride(1) * self._tokens.element_size()
        place = layer_idx * self._tokens.shape[1] + row
        address = self._tokens.data_ptr() + place * row_bytes
        return Rolling(address, room, int(self.lengths[layer_idx, row]))

    def copy_of(self, layer_idx: int, row: int) -> tuple[Tensor, Tensor]:
        """Return what `get` does, as copies."""
        length = int(self.lengths[layer_idx, row])
        keys, values = self._tokens[layer_idx, row, :, :, :length].clone()
        return keys, values

    def put(self, layer_idx: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Replace what is held of one sequence; the tokens are no views of this buffer."""
        length = keys.shape[1]
        if length:
            both = self._tokens[layer_idx, row, :, :, :length]
            both[0].copy_(keys)
            both[1].copy_(values)
        self.lengths[layer_idx, row] = length

    def append(self, layer_idx: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens behind those held; there must be room."""
        start = int(self.lengths[layer_idx, row])
        both = self._tokens[layer_idx, row, :, :, start : start + keys.shape[1]]
        both[0].copy_(keys)
        both[1].copy_(values)
        self.lengths[layer_idx, row] = start + keys.shape[1]

    def truncate(self, layer_idx: int, row: int, length: int) -> None:
        """Forget the newest tokens beyond ``length``."""
        self.lengths[layer_idx, row] = length

    def select(self, rows: np.ndarray) -> RollingBuffer:
        """Return a buffer of its own whose row i is a copy of row ``rows[i]``."""
        twin = object.__new__(RollingBuffer)
        twin._shape = self._shape
        twin._tokens = self._tokens[:, torch.from_numpy(rows)]
        twin.lengths = self.lengths[:, rows].copy()
        return twin

    def copy(self) -> RollingBuffer:
        """Return a buffer of its own with the same tokens."""
        return self.select(np.arange(self.lengths.shape[1]))

    def state(self) -> dict[str, np.ndarray]:
        """Return the buffer as plain arrays."""
        return {"tokens": self._tokens.view(torch.uint8).cpu().numpy(), "lengths": self.lengths}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        self._tokens.view(torch.uint8).copy_(torch.from_numpy(state["tokens"].copy()))
        self.lengths[...] = state["lengths"]
