"""Per-head key index without reduction: every coefficient, rotated at random, in few bits.

Papers: TurboQuant, https://arxiv.org/abs/2504.19874, and HIGGS, https://arxiv.org/abs/2411.17525:
after a random rotation coordinates are nearly Gaussian, and one grid fits them all, whatever the
data.

Reproduced: a rotation a head that looks at no data, a Gaussian grid and one scale a head and
token, and products taken with the codes. Published settings: TurboQuant 2.5 and 3.5 bits a
coordinate, of which one is a residual's sign; HIGGS 2 and 4 bits. Default: 2 bits, which
2 bytes of scale a head make 2.125 where head_dim is 128.
Deviates: scalar uniform grids, where TurboQuant's is optimal by level and HIGGS's of several
coordinates at once; no sign bit for the residual, so products are a little too small, all by
about the same factor; the scale is the one that fits best, not the norm; a dense orthogonal
matrix instead of Hadamard's. Used as an index beside exact records, as neither paper does.
"""

from __future__ import annotations

from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import register_index
from kvswap.predict.per_head import PerHeadIndex
from kvswap.predict.projection import rotation, rotation_bytes

_SEED = 2504


@register_index("rotated")
class RotatedIndex(PerHeadIndex):
    """One layer's index of rotated low-bit codes; see the module's head."""

    codes = ("rot2", "rot4", "rot1")
    _has_keys = False

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """All coefficients: only the code can be smaller."""
        return (geometry.key_dim,)

    @classmethod
    def check(cls, geometry: KVGeometry, *, rank: int, code: str) -> None:
        """Raise `ConfigError` for another code, or fewer coefficients than keys have."""
        if 1 <= rank < geometry.key_dim:
            raise ConfigError(
                f"rank must be {geometry.key_dim}, all that keys have, for this index, got {rank}"
            )
        super().check(geometry, rank=rank, code=code)

    @classmethod
    def fit_bytes(cls, geometry: KVGeometry, rank: int) -> int:
        """Return what making a rotation takes."""
        return rotation_bytes(geometry.head_dim)

    def observe(self, keys: Tensor) -> None:
        """Note that there are keys: which ones makes no difference."""
        self._has_keys = self._has_keys or len(keys) > 0

    def fit(self) -> None:
        """Rotate each head otherwise; the same in every layer and for every prompt."""
        if not self._has_keys:
            raise ConfigError("fit needs observed keys, got none")
        self._has_keys = False
        for place, head in enumerate(self._heads):
            head.set_basis(rotation(self._geometry.head_dim, seed=_SEED + place))
