"""Hot clusters: what is activated most often, by what it takes to hold, stays longest.

Paper: Swarm, https://arxiv.org/abs/2603.17803: the score of a cluster is
(f * T_base + s * T_transfer) / s, with f its activations, s its size, T_base what a request costs
and T_transfer what a record does. An activation adds one to f, a step that does not activate a
cluster in memory takes one away, and the lowest score leaves memory first.

Reproduced: score and counts. T_transfer is the same for all, so that the order is that of f / s.
Deviates: groups leave memory one by one, those of the lowest cluster first, and of these the ones
unused for longest, as no more leave than others need slots; a cluster counts as activated where one
of its groups is asked for. Until clusters are known every group is one of its own.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvswap.cache.reuse.base import ReusePolicy, register_reuse


@register_reuse("swarm")
class SwarmPolicy(ReusePolicy):
    """Clusters by activations and size."""

    wants_clusters: ClassVar[bool] = True

    def plan_bytes(self, num_layers: int, num_groups: int) -> int:
        """Return the bytes of activations, clusters, sizes, and of what is in memory."""
        return 13 * num_layers * num_groups

    def begin(self, num_layers: int, num_groups: int) -> None:
        """Let every group be a cluster that was never activated."""
        shape = (num_layers, num_groups)
        self._activations = np.zeros(shape, np.float32)  # by cluster
        self._cluster_of = np.tile(np.arange(num_groups, dtype=np.int32), (num_layers, 1))
        self._size = np.ones(shape, np.int32)  # by cluster
        self._is_here = np.zeros(shape, bool)  # by group

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        tables = self._activations, self._cluster_of, self._size, self._is_here
        return sum(table.nbytes for table in tables)

    def know_clusters(self, layer_idx: int, groups: np.ndarray, cluster_of: np.ndarray) -> None:
        """Take groups as clusters, each as often activated as any of its groups was."""
        before = self._activations[layer_idx, self._cluster_of[layer_idx, groups]]
        _, first, inverse = np.unique(cluster_of, return_index=True, return_inverse=True)
        named = groups[first]  # a cluster has the number of one of its groups
        activations = np.zeros(len(first), np.float32)
        np.maximum.at(activations, inverse, before)
        self._cluster_of[layer_idx, groups] = named[inverse]
        self._size[layer_idx, named] = np.bincount(inverse)
        self._activations[layer_idx, named] = activations

    def asked(self, layer_idx: int, groups: np.ndarray, is_held: np.ndarray) -> None:
        """Count an activation of each cluster asked for, and one less of others in memory."""
        activations, cluster_of = self._activations[layer_idx], self._cluster_of[layer_idx]
        asked = np.zeros(len(activations), bool)
        asked[cluster_of[groups]] = True
        idle = np.zeros(len(activations), bool)
        idle[cluster_of[self._is_here[layer_idx]]] = True
        idle &= ~asked
        activations[asked] += 1
        activations[idle] = np.maximum(activations[idle] - 1, 0)
        self._is_here[layer_idx, groups] = True

    def choose(
        self, layer_idx: int, groups: np.ndarray, last_used: np.ndarray, count: int
    ) -> np.ndarray:
        """Choose those of the clusters with the lowest score; see `ReusePolicy.choose`."""
        clusters = self._cluster_of[layer_idx, groups]
        scores = self._activations[layer_idx, clusters] / self._size[layer_idx, clusters]
        chosen = np.lexsort((last_used, scores))[:count]
        self._is_here[layer_idx, groups[chosen]] = False
        return chosen

    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Let each be a cluster of its own again, never activated."""
        self._is_here[layer_idx, groups] = False
        left = self._cluster_of[layer_idx, groups]
        np.subtract.at(self._size[layer_idx], left, 1)
        self._size[layer_idx] = np.maximum(self._size[layer_idx], 1)
        self._cluster_of[layer_idx, groups] = groups
        self._activations[layer_idx, groups] = 0

    def clear(self) -> None:
        """Forget what was activated and what is in memory; clusters stay."""
        self._activations.fill(0)
        self._is_here.fill(False)
