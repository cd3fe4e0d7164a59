"""Contract of reuse policies: which groups stay in memory, and which give their slots away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.core.registry import Registry


class ReusePolicy(ABC):
    """Says which of the groups in memory go first, where others need their slots.

    It knows layers and groups and nothing of slots, so that slots may move between layers.
    What it keeps is by group id, also of groups that are not in memory: what comes back is
    known. A group that the step at hand uses is never among those it is asked to choose from,
    and what it answers decides what has to be read, never what is attended to.

    Made with its parameters; `begin` gives it its tables.

    Attributes
    ----------
    wants_scores : bool
        Whether `observe` is to be called with what the key index estimates.
    wants_clusters : bool
        Whether `know_clusters` is to be called with what is found of a layer.
    keeps : bool
        Whether a step may find in memory what an earlier one asked for, or flushed; else all
        slots are empty when a step begins.
    """

    keeps: ClassVar[bool] = True
    wants_scores: ClassVar[bool] = False
    wants_clusters: ClassVar[bool] = False

    @classmethod
    def from_text(cls, parameter: str | None) -> ReusePolicy:
        """Make one from what stands behind its name and a colon in `CacheConfig.reuse`.

        A class that takes a parameter defines it; by default there is none.

        Raises
        ------
        ConfigError
            If the parameter cannot be used.
        """
        if parameter is not None:
            raise ConfigError(f"reuse must be a name alone for this policy, got :{parameter}")
        return cls()

    @abstractmethod
    def plan_bytes(self, num_layers: int, num_groups: int) -> int:
        """Return what `nbytes` becomes."""

    @abstractmethod
    def begin(self, num_layers: int, num_groups: int) -> None:
        """Take memory for the groups of all layers; called once, before anything else."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its tables."""

    @abstractmethod
    def asked(self, layer_idx: int, groups: np.ndarray, is_held: np.ndarray) -> None:
        """Note that a layer asks for some groups, once others have given their slots for them.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            Without repeats.
        is_held : ndarray [n], bool
            Which of them were in memory; the others are now, if there are slots for all.
        """

    @abstractmethod
    def choose(
        self, layer_idx: int, groups: np.ndarray, last_used: np.ndarray, count: int
    ) -> np.ndarray:
        """Choose the groups of one layer that leave memory.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            In memory and not used in this step.
        last_used : ndarray [n], int64
            The moment of each one's last use: of two the later is the larger.
        count : int
            At most n.

        Returns
        -------
        ndarray [count], int64
            Their positions among ``groups``.
        """

    def observe(self, layer_idx: int, groups: np.ndarray, scores: np.ndarray, wanted: int) -> None:
        """Learn what a query scored, before its selection is asked for; where ``wants_scores``.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            All groups of one sequence.
        scores : ndarray [n], float32
            Logarithms of the share of attention that each is expected to get; `KeyIndex.score`.
        wanted : int
            How many are selected.
        """
        raise NotImplementedError("a policy whose wants_scores is True defines it")

    def know_clusters(self, layer_idx: int, groups: np.ndarray, cluster_of: np.ndarray) -> None:
        """Learn which groups are selected together; where ``wants_clusters``.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        cluster_of : ndarray [n], int64
            Of each its cluster's number, in [0, n).
        """
        raise NotImplementedError("a policy whose wants_clusters is True defines it")

    @abstractmethod
    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Forget groups whose ids may come to stand for others."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""


REUSE_POLICIES: Registry[ReusePolicy] = Registry("reuse")


def register_reuse(name: str) -> Any:
    """Return a decorator that registers a `ReusePolicy` class under a name."""
    return REUSE_POLICIES.register(name)


def make_reuse(named: str) -> ReusePolicy:
    """Return a new policy without tables.

    Parameters
    ----------
    named : str
        Its name, or its name with a parameter: "lfu:64".

    Raises
    ------
    ConfigError
        If nothing has that name, or the parameter cannot be used.
    """
    kind, parameter = REUSE_POLICIES.with_parameter(named)
    return kind.from_text(parameter)
