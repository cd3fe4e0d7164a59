"""Warming: where a prefill ends, its last queries say what to read before a step asks for it.

Paper: SnapKV, https://arxiv.org/abs/2404.14469: the prompt's last queries vote for what will be
attended to after it.

Reproduced: the vote of a window at the prompt's end, a layer at a time.
Deviates: nothing is evicted by it: the groups it names are read into slots, and every step
still selects from all groups, so that what is attended to does not depend on it. The vote goes
through the key index and the selector, as a step's of several tokens does: groups of tokens,
not tokens; the highest share of any query and head, not the sum; no pooling over neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.window import QueryWindow

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


class Warmer:
    """Uses the last queries of a prefill once it has ended, and then lets go of them.

    Parameters
    ----------
    session : CacheSession

    Attributes
    ----------
    window : QueryWindow
        Those queries; nothing where the config asks for none, or every group is in memory.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session = session
        tokens = session.config.warm_window if session.plan.rank else 0
        self.window = QueryWindow(tokens, session.plan.batch_size)

    def prefill_ended(self, batch: SequenceBatch) -> None:
        """Fill slots; once a prefill.

        Raises
        ------
        StoreError
            If a read or an earlier write failed. A read only into slots raises nothing: its
            slots are given back, and the step that needs its groups reads them again.
        """
        if not self.window.is_of(batch):
            return
        session = self._session
        for layer_idx in range(session.geometry.num_layers):
            self._submit(batch, layer_idx)
        session.step.finish()
        self.window.forget()

    def _submit(self, batch: SequenceBatch, layer_idx: int) -> None:
        """Read what the window selects, all layers' reads in flight together."""
        held = self.window.queries(batch, layer_idx)
        if held is None:
            return
        session, (queries, params) = self._session, held
        groups = session.selection.select(
            batch, layer_idx, queries, scaling=params.scaling, is_final=False
        )
        session.counters.groups_warmed += session.step.read_ahead(layer_idx, groups)
        if session.arranger is not None:
            self._remember(batch, layer_idx, queries, params.scaling)

    def _remember(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], scaling: float
    ) -> None:
        """Let each query count as a step to what lays groups out by selections."""
        session = self._session
        assert session.arranger is not None
        for token in range(max(query.shape[1] for query in queries)):
            of_token = [query[:, token : token + 1] for query in queries]
            groups = session.selection.select(
                batch, layer_idx, of_token, scaling=scaling, is_final=False
            )
            session.arranger.note(layer_idx, list(groups))
