"""What each layer's last steps selected: what layouts are fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswap.core.errors import CorruptStoreError
from kvswap.placement.fit import Recording
from kvswap.placement.selections import Selections

STEPS = 128
"""Of each layer, that are remembered."""
COUNT_BYTES = 4 * 2**20
"""What counts of one layer's pairs may take, while it is fitted."""


class StepMemory:
    """The last selections of each layer.

    Parameters
    ----------
    num_layers, num_rows, num_groups : int
        Layers, rows of a batch, and groups that a row selects in a layer, at most: what comes
        beyond that is not remembered.
    """

    def __init__(self, num_layers: int, num_rows: int, num_groups: int) -> None:
        self._groups = np.full((num_layers, STEPS, num_rows, num_groups), -1, np.int32)
        self._seen = np.zeros(num_layers, np.int64)

    @classmethod
    def plan_bytes(cls, num_layers: int, num_rows: int, num_groups: int) -> int:
        """Return what it takes."""
        return num_layers * (STEPS * num_rows * num_groups * 4 + 8)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._groups.nbytes + self._seen.nbytes

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self._groups)

    @property
    def num_rows(self) -> int:
        """Rows of a step."""
        return self._groups.shape[2]

    @property
    def most_steps(self) -> int:
        """Steps that are remembered, at most."""
        return self._groups.shape[1]

    @property
    def seen(self) -> int:
        """Steps so far."""
        return int(self._seen.min())

    def note(self, layer_idx: int, groups: Sequence[np.ndarray]) -> None:
        """Remember what the rows of one step selected in place of the oldest."""
        step = self._groups[layer_idx, self._seen[layer_idx] % STEPS]
        step[...] = -1
        for row, mine in zip(step, groups, strict=False):
            row[: len(mine)] = mine[: len(row)]
        self._seen[layer_idx] += 1

    def recording(self, layer_idx: int, groups: np.ndarray) -> Recording:
        """Return what a layer's steps selected and read, the oldest first.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            Ascending. The recording names them by their places among these; others are left out.
        """
        steps = np.roll(self._groups[layer_idx], -int(self._seen[layer_idx] % STEPS), axis=0)
        rows = steps[-int(min(STEPS, self._seen[layer_idx])) :].reshape(-1, steps.shape[2])
        places = np.searchsorted(groups, rows)
        places[places == len(groups)] = 0
        is_there = groups[places] == rows if len(groups) else np.zeros(rows.shape, bool)
        selections = Selections.of(
            [mine[there] for mine, there in zip(places, is_there, strict=True)], len(groups)
        )
        return Recording.of(selections, len(groups), rows=self.num_rows, most_bytes=COUNT_BYTES)

    def state(self) -> dict[str, np.ndarray]:
        """Return what is needed to go on."""
        return {"groups": self._groups, "seen": self._seen}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave; nothing where the batch or the budget is another now.

        Raises
        ------
        CorruptStoreError
            If it is of other layers.
        """
        groups, seen = state["groups"], state["seen"]
        if {len(groups), len(seen)} != {self.num_layers}:
            found = f"{len(groups)} and {len(seen)}"
            raise CorruptStoreError(
                "tables", "layers of remembered steps", expected=self.num_layers, found=found
            )
        if groups.shape == self._groups.shape:
            self._groups[...], self._seen[...] = groups, seen
