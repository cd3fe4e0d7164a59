"""How a key's coefficients are stored, and scored against a query without being decoded.

Coefficients arrive rotated (an orthogonal matrix folded into the projection), which spreads a
token's energy evenly over them, so that one scale a token serves all. The grids of four, two
and one bits are the best uniform ones for a Gaussian, which keeps scoring in integers: of four
bits the error is a fifth above the best of any grid, of two a hundredth, of one it is the best.

The banded code does without the rotation: its coefficients are principal components, each on a
grid of its own deviation, and the leading ones have more bits.

References
----------
HIGGS, https://arxiv.org/abs/2411.17525 and TurboQuant, https://arxiv.org/abs/2504.19874: grids
after a rotation. J. Max, Quantizing for minimum distortion, IRE Trans. IT-6, 1960: the steps.
A. Gersho and R. M. Gray, Vector Quantization and Signal Compression, 1992, chapter 8: how bits are
allotted to components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.units import align_up, ceil_div

CHUNK_BYTES = 4
"""A token's codes are a whole number of these; see `kvswap.kernels.tiles`."""

# Max 1960, table II, in standard deviations: 256 (by its rule), sixteen, four and two levels.
GAUSSIAN_STEP_8BIT = 0.0308
GAUSSIAN_STEP_4BIT = 0.3352
GAUSSIAN_STEP_2BIT = 0.9957
GAUSSIAN_STEP_1BIT = 1.596
_SCALE_LIMIT = 6.0e4  # float16's largest is 65504


class Code(ABC):
    """A way to store coefficients as bytes.

    Parameters
    ----------
    rank : int
        Coefficients of a token.

    Attributes
    ----------
    has_scale : bool
        Whether a token has a scale of its own.
    needs_fit : bool
        Whether coefficients must come centred, in order of variance and in steps of the code's
        grid, as a fit to keys makes them and a projection alone cannot.
    """

    name: str
    has_scale: bool = True
    needs_fit: bool = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @property
    @abstractmethod
    def width(self) -> int:
        """Bytes stored for a token without its scale; a multiple of `CHUNK_BYTES`."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, its scale included."""
        return self.width + (2 if self.has_scale else 0)

    @abstractmethod
    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Store coefficients.

        Parameters
        ----------
        coefficients : Tensor [num_tokens, rank], float32

        Returns
        -------
        codes : Tensor [num_tokens, width], uint8
        scales : Tensor [num_tokens], float16, or None
        """

    @abstractmethod
    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Estimate dot products.

        Parameters
        ----------
        queries : Tensor [num_queries, rank], float32
            Projected queries.
        codes, scales
            From `encode`.

        Returns
        -------
        Tensor [num_tokens, num_queries], float32
        """


class Bf16Code(Code):
    """Coefficients as they are, in bfloat16 (the paper's form)."""

    name = "bf16"
    has_scale = False

    @property
    def width(self) -> int:
        """Bytes stored for a token."""
        return align_up(2 * self.rank, CHUNK_BYTES)

    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round to bfloat16."""
        return _padded(coefficients.to(torch.bfloat16).view(torch.uint8), self.width), None

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Multiply in bfloat16, accumulated in float32 by the library."""
        coefficients = codes.view(torch.bfloat16)[:, : self.rank]
        return (coefficients @ queries.to(torch.bfloat16).t()).float()


class Int8Code(Code):
    """Eight bits a coefficient, 128 above its value, and one scale a token."""

    name = "int8"

    @property
    def width(self) -> int:
        """Bytes stored for a token."""
        return align_up(self.rank, CHUNK_BYTES)

    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale the largest coefficient to 127 and round."""
        scales = _as_scale(coefficients.abs().amax(1) / 127)
        codes = torch.round(coefficients / _divisor(scales.float())).clamp_(-127, 127)
        return _padded((codes + 128).to(torch.uint8), self.width), scales

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Multiply in integers; queries are rounded to eight bits too."""
        assert scales is not None
        query_codes, query_scales = round_queries(queries)
        signed = (codes[:, : self.rank] ^ 128).view(torch.int8)
        products = _int_product(signed, query_codes.t()).float()
        return products.mul_(query_scales).mul_(scales.float()[:, None])


@dataclass(frozen=True, slots=True)
class Planes:
    """Coefficients of a few bits each, several in a byte.

    They are cut into planes, equal parts in order, of which the last ones may be short: a byte
    holds one coefficient of each, the first in its lowest bits.
    """

    bits: int
    count: int

    @property
    def length(self) -> int:
        """Coefficients of a plane."""
        return ceil_div(self.count * self.bits, 8)

    @property
    def width(self) -> int:
        """Bytes of a token, whole chunks."""
        return align_up(self.length, CHUNK_BYTES)

    @property
    def top(self) -> int:
        """The highest code; levels are codes less half of it."""
        return int(2**self.bits - 1)

    @property
    def slices(self) -> list[slice]:
        """Coefficients of each plane, first to last."""
        step = self.length
        return [slice(i, min(i + step, self.count)) for i in range(0, self.count, step)]

    def round(self, coefficients: Tensor) -> Tensor:
        """Return the levels nearest to coefficients in steps: -0.5, 0.5, 1.5 ..."""
        half = 2 ** (self.bits - 1)
        return torch.floor(coefficients).clamp_(-half, half - 1).add_(0.5)

    def pack(self, levels: Tensor) -> Tensor:
        """Store levels [num_tokens, count]: uint8 [num_tokens, width]."""
        codes = (levels + self.top / 2).to(torch.uint8)
        packed = codes.new_zeros(len(codes), self.width)
        for place, plane in enumerate(self.slices):
            part = codes[:, plane]
            packed[:, : part.shape[1]] |= part << (self.bits * place)
        return packed

    def products(self, packed: Tensor, query_codes: Tensor) -> Tensor:
        """Multiply codes and rounded queries [num_queries, count], in int32."""
        if self.bits == 8:  # not a signed number as it is
            signed = (packed[:, : self.count] ^ 128).view(torch.int8)
            more = query_codes.sum(1, dtype=torch.int32) << 7
            return _int_product(signed, query_codes.t()) + more
        products: Tensor | None = None
        for place, plane in enumerate(self.slices):
            length = plane.stop - plane.start
            part = (packed[:, :length] >> (self.bits * place)) & self.top
            more = _int_product(part.view(torch.int8), query_codes[:, plane].t())
            products = more if products is None else products.add_(more)
        assert products is not None, "there is a coefficient"
        return products


class GridCode(Code):
    """A few bits a coefficient on a uniform Gaussian grid, and one scale a token.

    Attributes
    ----------
    bits : int
        Of a coefficient: 4, 2 or 1.
    gaussian_step : float
        Distance of the levels, in standard deviations.
    """

    bits: int
    gaussian_step: float

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._planes = Planes(self.bits, rank)

    @property
    def plane_length(self) -> int:
        """Coefficients of a plane."""
        return self._planes.length

    @property
    def width(self) -> int:
        """Bytes stored for a token."""
        return self._planes.width

    def encode(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round to the grid's levels; the scale is the one that fits them best."""
        deviation = coefficients.norm(dim=1, keepdim=True) / self.rank**0.5
        step = (deviation * self.gaussian_step).clamp_(min=1e-20)
        levels = self._planes.round(coefficients / step)
        scales = (coefficients * levels).sum(1) / (levels * levels).sum(1)
        return self._planes.pack(levels), _as_scale(scales)

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Multiply planes in integers; the grid's offset, made whole, is added once a query."""
        assert scales is not None
        query_codes, query_scales = round_queries(queries)
        products = self._planes.products(codes, query_codes)
        products -= self.offsets(query_codes)
        scored = products.float().mul_(query_scales)
        return scored.mul_(scales.float()[:, None])

    def offsets(self, query_codes: Tensor) -> Tensor:
        """Return what the grid's middle adds to each query's products, int32 [num_queries]."""
        return (query_codes.sum(1, dtype=torch.int32) * self._planes.top) >> 1


class Rot4Code(GridCode):
    """Four bits a coefficient; a rank must be even."""

    name = "rot4"
    bits = 4
    gaussian_step = GAUSSIAN_STEP_4BIT

    def __init__(self, rank: int) -> None:
        if rank % 2:
            raise ConfigError(f"rank must be even for the rot4 code, got {rank}")
        super().__init__(rank)


class Rot2Code(GridCode):
    """Two bits a coefficient."""

    name = "rot2"
    bits = 2
    gaussian_step = GAUSSIAN_STEP_2BIT


class Rot1Code(GridCode):
    """One bit a coefficient, its sign."""

    name = "rot1"
    bits = 1
    gaussian_step = GAUSSIAN_STEP_1BIT


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
        return _padded(torch.cat(packed, 1), self.width), _as_scale(scales.clamp_(min=0))

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


def round_queries(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Round each query to eight bits: int8 [num_queries, rank] and float32 [num_queries]."""
    scales = queries.abs().amax(1) / 127
    return torch.round(queries / _divisor(scales)).to(torch.int8), scales


CODES: dict[str, type[Code]] = {
    code.name: code for code in (Bf16Code, Int8Code, Rot4Code, Rot2Code, Rot1Code, BandCode)
}


def _int_product(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[1] == 1:  # torch's own product gives wrong numbers there
        return left.int() * right.int()
    return torch._int_mm(left, right)


def _as_scale(scales: Tensor) -> Tensor:
    return scales.clamp(max=_SCALE_LIMIT).to(torch.float16)


def _divisor(scales: Tensor) -> Tensor:
    # A token of zeros has scale 0: divide by anything, its codes are zeros.
    return torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]


def _padded(codes: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
