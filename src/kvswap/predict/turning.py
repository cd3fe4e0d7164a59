"""Keys as they were before RoPE, where an index rebuilds them: they have less rank.

A pair of a head's elements was turned by an angle, the token's position times the pair's frequency.
Turning back and turning again are inverse to each other whatever the angles are: frequencies or
positions other than the model's own would cost rank and never change a key.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.predict.states import fill_tensors, plain_arrays


class GroupTurn:
    """Turns the keys of groups by their positions.

    Parameters
    ----------
    head_dim, group_size : int

    Attributes
    ----------
    frequencies : Tensor [head_dim // 2], float32
        Of element i and the one half a head further; zeros, which turn nothing, until `take`.
    positions : Tensor [num_groups], int32
        Place of each group in its sequence, by id.
    """

    def __init__(self, head_dim: int, group_size: int) -> None:
        self._head_dim, self._group_size = head_dim, group_size
        self.frequencies = torch.zeros(head_dim // 2)
        self.positions = torch.zeros(0, dtype=torch.int32)
        self._is_settled = False

    @staticmethod
    def plan_bytes(head_dim: int, num_groups: int) -> int:
        """Return the bytes of frequencies and positions."""
        return 4 * (head_dim // 2) + 4 * num_groups

    @property
    def nbytes(self) -> int:
        """Bytes of frequencies and positions."""
        return self.frequencies.nbytes + self.positions.nbytes

    def reserve(self, num_groups: int) -> None:
        """Make room for ids below ``num_groups``."""
        self.positions = torch.zeros(num_groups, dtype=torch.int32)

    def take(self, frequencies: Tensor | None) -> None:
        """Use a model's frequencies, once, where it has one for each pair of elements."""
        if self._is_settled or frequencies is None or frequencies.shape != self.frequencies.shape:
            return
        self.frequencies.copy_(frequencies)
        self._is_settled = True

    def place(self, groups: np.ndarray, first: int) -> None:
        """Remember that groups follow each other in a sequence, the first at a place."""
        places = torch.arange(first, first + len(groups), dtype=torch.int32)
        self.positions[torch.from_numpy(groups)] = places

    def back(self, groups: np.ndarray, keys: Tensor) -> Tensor:
        """Return keys [n * group_size, num_kv_heads * head_dim] before RoPE, float32."""
        return self._turned(groups, keys, -1.0)

    def on(self, groups: np.ndarray, keys: Tensor) -> Tensor:
        """Return keys after RoPE that `back` gave, float32."""
        return self._turned(groups, keys, 1.0)

    def _turned(self, groups: np.ndarray, keys: Tensor, sign: float) -> Tensor:
        starts = self.positions[torch.from_numpy(groups)] * self._group_size
        tokens = (starts[:, None] + torch.arange(self._group_size)).flatten()
        angles = tokens[:, None].double() * self.frequencies
        cos, sin = angles.cos().float()[:, None], (sign * angles.sin()).float()[:, None]
        half = len(self.frequencies)
        heads = keys.unflatten(1, (-1, self._head_dim))
        turned = heads.float() if heads.dtype != torch.float32 else heads.clone()
        first, second = heads[..., :half], heads[..., half : 2 * half]
        turned[..., :half].mul_(cos).addcmul_(second, sin, value=-1)
        turned[..., half : 2 * half].mul_(cos).addcmul_(first, sin)
        return turned.flatten(1)

    def state(self) -> dict[str, np.ndarray]:
        """Return the frequencies; positions are those of the sequences."""
        return plain_arrays({"frequencies": self.frequencies})

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave: what is kept was turned by it."""
        fill_tensors({"frequencies": self.frequencies}, state)
        self._is_settled = True
