"""Contracts of key indexes and selectors, and their registries."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.core.registry import Registry
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.codes import CODES
from kvswap.kernels.scores import average_heads, reduce_heads
from kvswap.predict.turning import GroupTurn

_MAX_RANK, _COARSE, _FINE_RANK, _MIN_RANK = 128, 32, 64, 8


class KeyIndex(ABC):
    """What stays in memory for every group of one layer, only to estimate attention.

    Codes are kept by group id, so sequences that share groups share their codes. The life
    of an index: `observe_queries` as they come in a prefill, `fit_to` some keys, `encode` every
    group, then `score`.

    Parameters
    ----------
    geometry : KVGeometry
        Shape of the cache, each head group of a model's layer being a layer.
    group_size : int
        Tokens of a group.
    num_groups : int
        Group ids are below this.
    rank : int
        Coefficients of a token (or of a group, where it keeps one vector a group), over all
        KV heads.
    code : str
        How they are stored.

    Attributes
    ----------
    codes : tuple of str
        Those it can be combined with, the default first.
    scores_tokens : bool
        Whether every token is scored, so that with all coefficients scores follow the exact
        ones; else a few vectors stand for a group.
    takes_basis : bool
        Whether `set_basis` can take the place of a fit; `takes_basis_with` says it of a code.
    looks_twice : bool
        Whether its fit wants to see the keys a second time (`observe_again`).
    wants_queries : bool
        Whether its fit looks at queries too (`observe_queries`).
    rebuilds_keys : bool
        Whether steps take the keys they attend to from it (`rebuild`), and read values alone.
    serves_device : bool
        Whether it can lie on an accelerator (`move`); else it stays on the host.
        `serves_device_with` says it of a code.
    device : torch.device
        Where it lies: keys and queries are brought there, scores are given there.
    """

    codes: ClassVar[tuple[str, ...]] = ("rot4", "int8", "bf16")
    scores_tokens: ClassVar[bool] = True
    takes_basis: ClassVar[bool] = False
    wants_queries: ClassVar[bool] = False
    rebuilds_keys: ClassVar[bool] = False
    serves_device: ClassVar[bool] = False
    device = torch.device("cpu")

    @abstractmethod
    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None: ...

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return the ranks that a plan tries, best first; the last is the least that works.

        By default half of the key's length, at most 128, then each multiple of 32 below it, and
        from 64 on of 8, which waste no byte of a code.
        """
        rank = max(min(_MIN_RANK, geometry.key_dim), min(_MAX_RANK, geometry.key_dim // 2))
        ranks = [max(1, rank // 2 * 2)]
        while ranks[-1] > _MIN_RANK:
            step = _COARSE if ranks[-1] > _FINE_RANK else _MIN_RANK
            ranks.append(max(_MIN_RANK, (ranks[-1] - 1) // step * step))
        return tuple(ranks)

    @classmethod
    def default_code(cls, rank: int, *, takes_basis: bool = False, on_device: bool = False) -> str:
        """Return the code for a rank where none is named: by default the first.

        Parameters
        ----------
        rank : int
        takes_basis : bool
            The index is given a projection, `set_basis`.
        on_device : bool
            It is to lie on an accelerator, where it can.
        """
        return cls.codes[0]

    @classmethod
    def takes_basis_with(cls, code: str) -> bool:
        """Whether `set_basis` can take the place of a fit with this code."""
        return cls.takes_basis

    @classmethod
    def serves_device_with(cls, code: str) -> bool:
        """Whether it can lie on an accelerator with this code."""
        return cls.serves_device

    @classmethod
    def check(cls, geometry: KVGeometry, *, rank: int, code: str) -> None:
        """Raise `ConfigError` where an index of this kind cannot have this rank and code."""
        if not 1 <= rank <= geometry.key_dim:
            raise ConfigError(f"rank must be in [1, {geometry.key_dim}], got {rank}")
        if code not in cls.codes:
            known = ", ".join(cls.codes)
            raise ConfigError(f"code must be one of {known} for this index, got {code!r}")
        if code in CODES:  # others are an index's own
            CODES[code](rank)

    @classmethod
    @abstractmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Return the bytes that one layer's index will take."""

    @classmethod
    @abstractmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Return the most bytes that fitting or scoring takes for a while."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that this index takes."""

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether `encode` and `score` can be called."""

    def move(self, accelerator: Accelerator) -> None:
        """Move to an accelerator, where ``serves_device``; called before anything else."""
        raise NotImplementedError("an index whose serves_device is True defines it")

    @abstractmethod
    def observe(self, keys: Tensor) -> None:
        """Take keys [num_tokens, num_kv_heads * head_dim] into the fit."""

    def forget_keys(self) -> None:  # noqa: B027  (most sums can be added to as they are)
        """Forget keys that were observed and not fitted to: a fit that was broken off."""

    def observe_again(self, keys: Tensor) -> None:
        """Take keys that were observed into the fit once more, all having been observed.

        Where ``looks_twice`` a fit is better for it, and possible without.
        """
        raise NotImplementedError("an index whose looks_twice is True defines it")

    def observe_queries(self, query: Tensor) -> None:
        """Take queries [num_heads, q_len, head_dim], after RoPE, into the fit.

        Called in a prefill, where ``wants_queries``. They are kept for every later fit, until
        `forget_queries`.
        """
        raise NotImplementedError("an index whose wants_queries is True defines it")

    def forget_queries(self) -> None:
        """Forget the queries observed, where ``wants_queries``: what they were of is gone."""
        if self.wants_queries:
            raise NotImplementedError("an index whose wants_queries is True defines it")

    @property
    def looks_twice(self) -> bool:
        """Whether `observe_again` is to be called before `fit`; by default not."""
        return False

    @abstractmethod
    def fit(self) -> None:
        """Fit to all keys observed since the last fit."""

    def fit_to(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        """Fit to some keys and nothing else, looking at them as often as it serves.

        Parameters
        ----------
        parts : callable
            Gives the keys anew at every call, in parts of [num_tokens, num_kv_heads * head_dim].
        """
        self.forget_keys()
        for look in (self.observe, self.observe_again)[: 1 + self.looks_twice]:
            for keys in parts():
                look(keys)
        self.fit()

    def set_basis(self, basis: Tensor) -> None:
        """Use a projection [num_kv_heads * head_dim, rank] made elsewhere instead of a fit.

        Raises
        ------
        ConfigError
            If this index takes none, or one of another shape.
        """
        raise ConfigError("projection must be left out for this index, which takes none")

    @abstractmethod
    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Store codes of whole groups.

        Parameters
        ----------
        groups : ndarray [n], int64
            Their ids.
        keys : Tensor [n * group_size, num_kv_heads * head_dim]
            Post-RoPE, in the order of the groups.
        """

    def turn_by(self, turn: GroupTurn) -> None:
        """Keep keys as they were before RoPE, where ``rebuilds_keys``; called before a fit."""
        raise NotImplementedError("an index whose rebuilds_keys is True defines it")

    def seen_in_fit(self, groups: np.ndarray, keys: Tensor) -> Iterable[Tensor]:
        """Return the keys of groups, as `encode` is given them, as a fit is to see them."""
        return (keys,)

    def release_keys(self, groups: np.ndarray) -> None:
        """Let keys of groups be rebuilt from now on, where ``rebuilds_keys``.

        Parameters
        ----------
        groups : ndarray [n], int64
            All that were encoded since the fit. What is encoded later is not rebuilt before the
            next call.
        """
        raise NotImplementedError("an index whose rebuilds_keys is True defines it")

    def is_rebuilt(self, groups: np.ndarray) -> np.ndarray:
        """Return which groups' keys are to be rebuilt, ndarray [n], bool; see `release_keys`."""
        raise NotImplementedError("an index whose rebuilds_keys is True defines it")

    def rebuild(self, groups: np.ndarray) -> Tensor:
        """Return keys of groups as far as it kept them, where ``rebuilds_keys``.

        Parameters
        ----------
        groups : ndarray [n], int64
            Their ids; encoded before.

        Returns
        -------
        Tensor [n * group_size, num_kv_heads * head_dim]
            As `encode` was given them; in any dtype of floating point.
        """
        raise NotImplementedError("an index whose rebuilds_keys is True defines it")

    @abstractmethod
    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Estimate each query head's best dot product with a key of each group.

        Parameters
        ----------
        query : Tensor [num_heads, 1, head_dim]
            One token, after RoPE.
        groups : ndarray [n], int64
            Group ids of one sequence, in order.
        scaling : float
            Factor on the dot products.

        Returns
        -------
        Tensor [n, num_heads], float32
        """

    def score(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: int | None = None
    ) -> Tensor:
        """Estimate how much attention each group will receive.

        Parameters
        ----------
        query : Tensor [num_heads, q_len, head_dim]
            After RoPE. Several query tokens share one score, reduced by maximum.
        groups : ndarray [n], int64
            Group ids of one sequence, in order.
        scaling : float
            Factor on the dot products.
        wanted : int, optional
            How many will be selected. A head that is expected to attend to more groups has
            less say; see `reduce_heads`. Default: all, and every head has the same.

        Returns
        -------
        Tensor [n], float32
            Logarithm of the largest share of a query head's attention that a group is expected
            to receive, less what it has less to say: higher matters more.
        """
        reduce = functools.partial(reduce_heads, wanted=wanted)
        best = self.score_tokens(query, groups, scaling=scaling, reduce=reduce)
        marked = self.always_read(groups)
        if marked is not None:
            best[marked] = 0.0
        return best

    def score_averaged(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Estimate how much attention each group gets from the average of all query heads.

        Parameters
        ----------
        query : Tensor [num_heads, q_len, head_dim]
            After RoPE. Several query tokens share one score, reduced by maximum.
        groups : ndarray [n], int64
            Group ids of one sequence, in order.
        scaling : float
            Factor on the dot products.

        Returns
        -------
        Tensor [n], float32
            Logarithm of the share that the averaged head is expected to give a group.
        """
        return self.score_tokens(query, groups, scaling=scaling, reduce=average_heads)

    def score_tokens(
        self,
        query: Tensor,
        groups: np.ndarray,
        *,
        scaling: float,
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Score query tokens one by one, which bounds the memory; the largest score counts.

        Parameters
        ----------
        query : Tensor [num_heads, q_len, head_dim]
        groups : ndarray [n], int64
        scaling : float
        reduce : callable
            From [n, num_heads] to [n], as `reduce_heads`.

        Returns
        -------
        Tensor [n], float32
        """
        by_token = (
            reduce(self.score_heads(token, groups, scaling=scaling))
            for token in query.split(1, dim=1)
        )
        return functools.reduce(torch.maximum, by_token)

    def always_read(self, groups: np.ndarray) -> Tensor | None:
        """Return which groups are to be read whatever the query is.

        `score` gives them the highest score there is, as if one head gave them all of its
        attention. In `score_heads` they have what is estimated of them.

        Parameters
        ----------
        groups : ndarray [n], int64
            Group ids of one sequence, in order.

        Returns
        -------
        Tensor [n], bool, or None
            None where none is; so it is unless a class says otherwise.
        """
        return None

    def score_best(
        self,
        query: Tensor,
        groups: np.ndarray,
        *,
        scaling: float,
        wanted: int,
        kept: np.ndarray,
    ) -> Tensor:
        """Score groups as `score` does, where only the best of them will be looked at.

        Parameters
        ----------
        query, groups, scaling, wanted
            See `score`.
        kept : ndarray [k], int32
            Positions whose scores will be looked at too; what is none is skipped.

        Returns
        -------
        Tensor [n], float32
            That of `score`, but a group that ``wanted`` others surpass, and that is not among
            those kept, may have less.
        """
        return self.score(query, groups, scaling=scaling, wanted=wanted)

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Return everything needed to score again, by name."""

    @abstractmethod
    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""


class Selector(ABC):
    """Turns scores into the groups to read.

    Attributes
    ----------
    needs_only_best : bool
        Whether no score but the ``budget_groups`` highest is looked at; the others may then be
        lower than they are. False unless a class says otherwise.
    serves_device : bool
        Whether scores may lie on an accelerator; else they are brought to the host before.
    fills_budget : bool
        Whether it always returns as many groups as the budget has. True unless a class says
        otherwise.
    needs_mass : bool
        Whether scores must be logarithms of shares of attention that sum to one
        (``CacheConfig(reduce="mass")``).
    """

    needs_only_best: bool = False
    serves_device: bool = False
    fills_budget: bool = True
    needs_mass: bool = False

    @classmethod
    def from_text(cls, parameter: str | None) -> Selector:
        """Make one from what stands behind its name and a colon in `CacheConfig.selector`.

        A class that takes a parameter defines it; by default there is none.

        Raises
        ------
        ConfigError
            If the parameter cannot be used, or is missing where there must be one.
        """
        if parameter is not None:
            raise ConfigError(f"selector must be a name alone for this one, got :{parameter}")
        return cls()

    def most_groups(self, num_groups: int) -> int | None:
        """Return the most groups that it chooses of so many; None where the budget says it."""
        return None

    @abstractmethod
    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Choose groups.

        Parameters
        ----------
        scores : Tensor [num_groups], float32
        layer_idx : int
            Among the layers on disk; each head group of a layer counts as one.
        budget_groups : int
            Most groups to return, pinned ones included; fewer than ``num_groups``.
        pinned : ndarray, int64
            Positions that must be chosen: sink and recent tokens.

        Returns
        -------
        ndarray, int64
            Positions, ascending, without repeats: as many as the budget has, or as pinned
            has, or fewer where ``fills_budget`` is False.
        """


INDEXES: Registry[KeyIndex] = Registry("index")
SELECTORS: Registry[Selector] = Registry("selector")


def register_index(name: str) -> Any:
    """Return a decorator that registers a `KeyIndex` class under a name."""
    return INDEXES.register(name)


def register_selector(name: str) -> Any:
    """Return a decorator that registers a `Selector` class under a name."""
    return SELECTORS.register(name)


def index_names() -> tuple[str, ...]:
    """Return the names of all key indexes."""
    return INDEXES.names()


def selector_names() -> tuple[str, ...]:
    """Return the names of all selectors."""
    return SELECTORS.names()
