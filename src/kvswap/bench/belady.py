"""Bélády's bound: the most groups that any choice of what stays in memory could have found there.

Paper: A study of replacement algorithms for a virtual-storage computer,
https://doi.org/10.1147/sj.52.0078: what is used again farthest in the future goes first.

Reproduced: the choice with the whole trace known, which finds the most.
Deviates: a step asks for many groups at once, and all of them are in memory together; what a layer
flushes comes into memory without a read. It bounds what is found where nothing is read but what is
asked for: groups that were foreseen in vain may be found later, beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswap.cache.pending import Use
from kvswap.cache.session import CacheSession


def most_hits(uses: Sequence[Use], num_slots: int) -> int:
    """Compute the most hits that slots of one layer allow.

    Parameters
    ----------
    uses : sequence of Use
        Of one layer, in order.
    num_slots : int
        A selection that is larger is attended to in parts, and may leave any of its groups.

    Notes
    -----
    Time grows with the steps and the number of different groups, memory with the uses.
    """
    if not uses:
        return 0
    groups, flat = np.unique(np.concatenate([use.groups for use in uses]), return_inverse=True)
    ends = np.cumsum([len(use.groups) for use in uses])
    places = np.split(flat, ends[:-1])
    held = np.zeros(len(groups), bool)
    next_use = np.full(len(groups), len(uses))
    hits = 0
    for use, mine, coming in zip(uses, places, _next_uses(uses, places, len(groups)), strict=True):
        if use.is_asked:
            hits += int(np.count_nonzero(held[mine]))
        held[mine], next_use[mine] = True, coming
        over = int(np.count_nonzero(held)) - num_slots
        if over > 0:
            may_go = held.copy()
            may_go[mine] = len(mine) > num_slots
            candidates = np.flatnonzero(may_go)
            farthest = np.argpartition(-next_use[candidates], over - 1)[:over]
            held[candidates[farthest]] = False
    return hits


def _next_uses(
    uses: Sequence[Use], places: Sequence[np.ndarray], num_groups: int
) -> list[np.ndarray]:
    """Return for each use of a group when it is asked for next; what is put anew is not kept."""
    never = len(uses)
    after = np.full(num_groups, never)
    found = []
    for step in range(len(uses) - 1, -1, -1):
        found.append(after[places[step]])
        after[places[step]] = step if uses[step].is_asked else never
    return found[::-1]


def most_hits_shared(uses: Sequence[tuple[int, Use]], num_slots: int) -> int:
    """Compute the most hits that slots allow which all layers share; see `most_hits`.

    Parameters
    ----------
    uses : sequence of (int, Use)
        Each with its layer, in the order of time.
    num_slots : int
        Of all layers together.
    """
    apart = 1 + max((int(use.groups.max(initial=0)) for _, use in uses), default=0)
    return most_hits([use._replace(groups=use.groups + at * apart) for at, use in uses], num_slots)


def most_hits_by_layer(
    uses: Sequence[tuple[int, Use]], *, num_layers: int, num_slots: int, is_shared: bool
) -> int:
    """Compute the most hits of several layers that have so many slots each.

    Parameters
    ----------
    uses : sequence of (int, Use)
        Each with its layer, in the order of time.
    num_layers, num_slots : int
    is_shared : bool
        Slots move between layers.
    """
    if is_shared:
        return most_hits_shared(uses, num_slots * num_layers)
    return sum(most_hits(mine, num_slots) for mine in _by_layer(uses, num_layers))


def _by_layer(uses: Sequence[tuple[int, Use]], num_layers: int) -> list[list[Use]]:
    layers: list[list[Use]] = [[] for _ in range(num_layers)]
    for layer_idx, use in uses:
        layers[layer_idx].append(use)
    return layers


class UseLog:
    """Notes which groups the layers of a session ask for.

    Parameters
    ----------
    session : CacheSession
        Noted from now on, until its memory is taken anew.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session = session
        self._uses: list[tuple[int, Use]] = []
        session.prefetcher.noted = self._uses

    def by_layer(self) -> list[list[Use]]:
        """Return what each layer asked for, in order."""
        return _by_layer(self._uses, len(self._session.layers))

    @property
    def bound(self) -> float:
        """Most that the hit rate could be since it was noted; 1 where nothing was asked for."""
        asked = sum(len(use.groups) for _, use in self._uses if use.is_asked)
        if not asked:
            return 1.0
        session = self._session
        hits = most_hits_by_layer(
            self._uses,
            num_layers=len(session.layers),
            num_slots=session.plan.num_slots,
            is_shared=session.config.share_slots,
        )
        return hits / asked
