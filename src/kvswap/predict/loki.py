"""Per-head key index: each KV head's keys, projected to their principal components.

Paper: Loki, https://arxiv.org/abs/2406.02542, low-rank keys for sparse attention.

Reproduced: a head's own components, from an uncentred decomposition of post-RoPE keys (the
paper tries keys before RoPE too and takes what is better by model); every token is scored by the
leading coefficients. Published setting: a quarter or an eighth of head_dim
(``rank = key_dim // 4``, tried first, or ``key_dim // 8``), and as many of the tokens.
Deviates: components are those of the prompt's keys and not of a calibration set; coefficients
are kept apart, coded in few bits after a rotation among themselves, where the paper rotates the
cache itself and keeps all of it; query heads choose groups together, not tokens each.
"""

from __future__ import annotations

from torch import Tensor

from kvswap.predict.base import register_index
from kvswap.predict.per_head import FittedPerHeadIndex
from kvswap.predict.projection import leading_basis


@register_index("loki")
class LokiIndex(FittedPerHeadIndex):
    """One layer's index of principal components by head; see the module's head."""

    def _find_basis(self, kv_head: int, covariance: Tensor) -> Tensor:
        return leading_basis(covariance, self._rank)
