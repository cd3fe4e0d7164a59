"""Policies that give every group a number: the lowest goes first, which is chosen natively."""

from __future__ import annotations

import numpy as np

from kvswap.cache.reuse.base import ReusePolicy


class PriorityPolicy(ReusePolicy):
    """Of the groups with the lowest priority, those unused for longest go first.

    A subclass says what a use adds (`weight`), and whether there are priorities at all. `asked`
    and `choose` are not for it to change: where the extension is there, the native table does
    the same in their place.

    Attributes
    ----------
    priority : ndarray [num_layers, num_groups], float32, or None
        At least 0; None where all groups are alike, so that their last use alone decides.
    """

    has_priorities = True

    def __init__(self) -> None:
        self.priority: np.ndarray | None = None

    def plan_bytes(self, num_layers: int, num_groups: int) -> int:
        """Return the bytes of the priorities."""
        return 4 * num_layers * num_groups if self.has_priorities else 0

    def begin(self, num_layers: int, num_groups: int) -> None:
        """Make the priorities, all 0."""
        if self.has_priorities:
            self.priority = np.zeros((num_layers, num_groups), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the priorities."""
        return 0 if self.priority is None else self.priority.nbytes

    def weight(self, layer_idx: int) -> float:
        """Return what being asked for now adds to a group's priority; called once for each take."""
        return 0.0

    def asked(self, layer_idx: int, groups: np.ndarray, is_held: np.ndarray) -> None:
        """Add the weight of a use."""
        weight = self.weight(layer_idx)
        if self.priority is not None:
            self.priority[layer_idx, groups] += np.float32(weight)

    def choose(
        self, layer_idx: int, groups: np.ndarray, last_used: np.ndarray, count: int
    ) -> np.ndarray:
        """Choose the lowest; see `ReusePolicy.choose`."""
        keys = [last_used]
        if self.priority is not None:
            keys.append(self.priority[layer_idx, groups])
        return np.lexsort(keys)[:count]

    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Let their priorities be 0."""
        if self.priority is not None:
            self.priority[layer_idx, groups] = 0

    def clear(self) -> None:
        """Let all priorities be 0."""
        if self.priority is not None:
            self.priority.fill(0)
