"""LFU with ageing: what was asked for least often goes first, earlier uses counting for less.

Paper: LRFU, https://doi.org/10.1109/TC.2001.970573: the weight of a use halves with every so many
steps; one half-life after the other it lies between counting all uses and looking at the last one.
Forward decay, https://doi.org/10.1109/ICDE.2009.65: instead of making all past uses lighter, each
new one is made heavier by the same factor.

Reproduced: the sum over a group's uses of 2^(-age / half-life), and that no step touches a group
that it does not ask for.
Deviates: the age is counted in selections of the layer and not in single groups, as a step asks
for all of its groups at once; groups that left memory keep their sum, in four bytes; what is
read ahead counts as asked for. In single precision the sums are scaled back now and then.
"""

from __future__ import annotations

from typing import ClassVar

from kvswap.cache.reuse.base import register_reuse
from kvswap.cache.reuse.priority import PriorityPolicy
from kvswap.core.errors import ConfigError

_HALF_LIFE = 64  # selections; 16 to 128 serve nearly alike on traces of two readers (docs/log.md)
_HEAVIEST = 2.0**48  # sums are scaled back then: float32 holds them and what is 2^-76 of them


@register_reuse("lfu")
class LFUPolicy(PriorityPolicy):
    """Uses in memory and out of it, each weighing half as much after a stated time.

    Parameters
    ----------
    half_life : float
        In selections of a layer.
    """

    use: ClassVar[float] = 1.0
    """What a use counts."""

    def __init__(self, half_life: float = _HALF_LIFE) -> None:
        super().__init__()
        self._growth: float = 2 ** (1 / half_life)
        self._units: list[float] = []

    @classmethod
    def from_text(cls, parameter: str | None) -> LFUPolicy:
        """Make one from its half-life, as in "lfu:64"."""
        if parameter is None:
            return cls()
        try:
            half_life = float(parameter)
        except ValueError:
            half_life = 0.0
        if not 1 <= half_life < float("inf"):
            raise ConfigError(
                f"reuse must have a half-life of at least 1 selection behind its colon,"
                f" got :{parameter}"
            )
        return cls(half_life)

    def begin(self, num_layers: int, num_groups: int) -> None:
        """Make sums, all 0."""
        super().begin(num_layers, num_groups)
        self._units = [1.0] * num_layers

    def weight(self, layer_idx: int) -> float:
        """Return the weight of a use now, heavier than that of the one before."""
        unit = self._units[layer_idx] * self._growth
        if unit > _HEAVIEST:
            assert self.priority is not None
            self.priority[layer_idx] /= unit
            unit = 1.0
        self._units[layer_idx] = unit
        return self.use * unit

    def clear(self) -> None:
        """Let all sums be 0."""
        super().clear()
        self._units = [1.0] * len(self._units)
