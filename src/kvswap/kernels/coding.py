"""What all codes of keys share: their contract, bits packed into bytes, rounded queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvswap.core.units import align_up, ceil_div

CHUNK_BYTES = 4
"""A token's codes are a whole number of these; see `kvswap.kernels.tiles`."""

# In standard deviations, for 256, sixteen, four and two levels: J. Max, Quantizing for minimum
# distortion, IRE Trans. IT-6, 1960, table II; for 256 by its rule.
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
    def num_coefficients(self) -> int:
        """Coefficients of a token, as `encode` is given them: the rank, or more of fewer bits."""
        return self.rank

    @property
    def most_coefficients(self) -> int:
        """As many as a fit may give a token."""
        return self.num_coefficients

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
            return int_product(signed, query_codes.t()) + more
        products: Tensor | None = None
        for place, plane in enumerate(self.slices):
            length = plane.stop - plane.start
            part = (packed[:, :length] >> (self.bits * place)) & self.top
            more = int_product(part.view(torch.int8), query_codes[:, plane].t())
            products = more if products is None else products.add_(more)
        assert products is not None, "there is a coefficient"
        return products


def round_queries(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Round each query to eight bits: int8 [num_queries, rank] and float32 [num_queries]."""
    scales = queries.abs().amax(1) / 127
    return torch.round(queries / divisor(scales)).to(torch.int8), scales


def int_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply int8 matrices, in int32."""
    if left.shape[1] == 1:  # torch's own product gives wrong numbers there
        return left.int() * right.int()
    return torch._int_mm(left, right)


def as_scale(scales: Tensor) -> Tensor:
    """Round scales of tokens to float16, which none of them leaves."""
    return scales.clamp(max=_SCALE_LIMIT).to(torch.float16)


def divisor(scales: Tensor) -> Tensor:
    """Return what rows are divided by: for a token of zeros anything, its codes are zeros."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]


def padded(codes: Tensor, width: int) -> Tensor:
    """Fill the rows of codes up with zero bytes."""
    return torch.nn.functional.pad(codes, (0, width - codes.shape[1]))
