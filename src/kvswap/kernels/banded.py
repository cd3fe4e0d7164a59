"""The banded code: principal components, each on a grid of its own deviation.

A transform code: coefficients are stored in proportion to how far they vary, and those that vary
more have more bits.

References
----------
A. Gersho and R. M. Gray, Vector Quantization and Signal Compression, 1992, chapter 8: how bits are
allotted to components.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.units import align_up, ceil_div
from kvswap.kernels.coding import (
    CHUNK_BYTES,
    GAUSSIAN_STEP_2BIT,
    GAUSSIAN_STEP_4BIT,
    GAUSSIAN_STEP_8BIT,
    Code,
    Planes,
    as_scale,
    padded,
    round_queries,
)

_STEPS = {8: GAUSSIAN_STEP_8BIT, 4: GAUSSIAN_STEP_4BIT, 2: GAUSSIAN_STEP_2BIT}
_DISTORTION = {8: 1.1e-4, 4: 0.01154, 2: 0.1188}  # of the variance, on those grids
_LEAST_SHARE = 1e-6  # of the largest deviation: what varies less is stored as if it varied so
_LEAST_DEVIATION = 1e-12


class BandCode(Code):
    """Eight bits for the leading coefficients, four for the next, two for others, and a scale.

    Each coefficient is stored in proportion to its deviation over all tokens, and a token's
    scale is how far it is from them. How many coefficients there are, and how many have which
    bits, follows from their variances: what leaves the least error in the same bytes.

    Parameters
    ----------
    rank : int
        A token has as many bytes as so many coefficients of four bits, in whole chunks.
    counts : tuple of int
        Coefficients of eight, four and two bits; before a fit as if all had four.
    deviations : Tensor [sum of counts], float32, optional
        Of the coefficients; ones by default.

    Attributes
    ----------
    steps : Tensor [sum of counts], float32
        Distance of each coefficient's levels in a token of scale one.
    """

    name = "band"
    bits = (8, 4, 2)
    needs_fit = True

    def __init__(
        self,
        rank: int,
        counts: tuple[int, int, int] | None = None,
        deviations: Tensor | None = None,
    ) -> None:
        super().__init__(rank)
        self.counts = (0, rank, 0) if counts is None else counts
        self._bands = [
            Planes(bits, count) for bits, count in zip(self.bits, self.counts, strict=True)
        ]
        if (
            min(self.counts) < 0
            or not any(self.counts)
            or sum(band.width for band in self._bands) > self.width
        ):
            raise ConfigError(f"counts must fill at most {self.width} bytes, got {self.counts}")
        self.steps = self._grid() if deviations is None else deviations * self._grid()

    @classmethod
    def fitted(cls, rank: int, variances: Tensor) -> BandCode:
        """Return the code for coefficients of these variances.

        Parameters
        ----------
        rank : int
        variances : Tensor [n], float32
            Largest first, as many as there can be: `most_coefficients`, or all there are.
        """
        counts = _allot(cls(rank).width // CHUNK_BYTES, variances.double())
        deviations = variances[: sum(counts)].clamp(min=0).sqrt()
        least = max(float(deviations[0]) * _LEAST_SHARE, _LEAST_DEVIATION)
        return cls(rank, counts, deviations.clamp_(min=least))

    @property
    def width(self) -> int:
        """Bytes stored for a token."""
        return align_up(ceil_div(self.rank, 2), CHUNK_BYTES)

    @property
    def num_coefficients(self) -> int:
        """Coefficients of a token."""
        return sum(self.counts)

    @property
    def most_coefficients(self) -> int:
        """As many as a fit may give a token: all of two bits."""
        return 4 * self.width

    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round to the levels of each band's grid; the scale is the one that fits them best."""
        grid = self._grid()
        in_steps = coefficients / self.steps
        deviation = (in_steps * grid).norm(dim=1, keepdim=True)
        in_steps /= (deviation / self.num_coefficients**0.5).clamp_(min=1e-20)
        levels = torch.cat([b.round(part) for b, part in self._by_band(in_steps)], 1)
        scales = (coefficients * levels) @ grid  # weighted by the deviations
        scales /= (levels * levels) @ (self.steps * grid)
        packed = [band.pack(part) for band, part in self._by_band(levels)]
        return padded(torch.cat(packed, 1), self.width), as_scale(scales.clamp_(min=0))

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Multiply band by band in integers; the offset of all grids is made whole."""
        assert scales is not None
        query_codes, query_scales = round_queries(queries * self.steps)
        total = torch.zeros(len(codes), len(queries), dtype=torch.int32)
        offsets = torch.zeros(len(queries), dtype=torch.int32)
        first = 0
        for band, part in self._by_band(query_codes):
            total += band.products(codes[:, first : first + band.width], part)
            offsets += part.sum(1, dtype=torch.int32) * band.top
            first += band.width
        total -= offsets >> 1
        return total.float().mul_(query_scales).mul_(scales.float()[:, None])

    def _grid(self) -> Tensor:
        """Distance of each coefficient's levels in its deviations, [num_coefficients]."""
        steps = torch.tensor([_STEPS[bits] for bits in self.bits])
        return steps.repeat_interleave(torch.tensor(self.counts))

    def _by_band(self, coefficients: Tensor) -> Iterator[tuple[Planes, Tensor]]:
        parts = coefficients.split(self.counts, dim=1)
        return ((b, part) for b, part in zip(self._bands, parts, strict=True) if b.count)


def _allot(chunks: int, variances: Tensor) -> tuple[int, int, int]:
    """Return how many coefficients have eight, four and two bits for the least squared error."""
    below = torch.cat((variances.new_zeros(1), variances.cumsum(0)))
    best, found = float("inf"), (0, 0, 0)
    for wide in range(chunks + 1):
        for middle in range(chunks + 1 - wide):
            ends = [0, 4 * wide, 4 * wide + 8 * middle, 16 * chunks - 12 * wide - 8 * middle]
            ends = [min(end, len(variances)) for end in ends]
            error = float(below[-1] - below[ends[-1]])
            for factor, begin, end in zip(_DISTORTION.values(), ends, ends[1:], strict=False):
                error += factor * float(below[end] - below[begin])
            if error < best:
                best, found = error, (ends[1], ends[2] - ends[1], ends[3] - ends[2])
    return found
