"""How a key's coefficients are stored, and scored against a query without being decoded.

Coefficients arrive rotated (an orthogonal matrix folded into the projection), which spreads a
token's energy evenly over them, so that one scale a token serves all. The grids of four, two
and one bits are the best uniform ones for a Gaussian, which keeps scoring in integers: of four
bits the error is a fifth above the best of any grid, of two a hundredth, of one it is the best.

The banded code does without the rotation; see `kvswap.kernels.banded`.

References
----------
HIGGS, https://arxiv.org/abs/2411.17525 and TurboQuant, https://arxiv.org/abs/2504.19874: grids
after a rotation. J. Max, Quantizing for minimum distortion, IRE Trans. IT-6, 1960: the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.units import align_up
from kvswap.kernels.banded import BandCode
from kvswap.kernels.coding import (
    CHUNK_BYTES,
    GAUSSIAN_STEP_1BIT,
    GAUSSIAN_STEP_2BIT,
    GAUSSIAN_STEP_4BIT,
    Code,
    Planes,
    as_scale,
    divisor,
    int_product,
    padded,
    round_queries,
)


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
        return padded(coefficients.to(torch.bfloat16).view(torch.uint8), self.width), None

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
        scales = as_scale(coefficients.abs().amax(1) / 127)
        codes = torch.round(coefficients / divisor(scales.float())).clamp_(-127, 127)
        return padded((codes + 128).to(torch.uint8), self.width), scales

    def score(self, queries: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
        """Multiply in integers; queries are rounded to eight bits too."""
        assert scales is not None
        query_codes, query_scales = round_queries(queries)
        signed = (codes[:, : self.rank] ^ 128).view(torch.int8)
        products = int_product(signed, query_codes.t()).float()
        return products.mul_(query_scales).mul_(scales.float()[:, None])


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
        return self._planes.pack(levels), as_scale(scales)

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


CODES: dict[str, type[Code]] = {
    code.name: code for code in (Bf16Code, Int8Code, Rot4Code, Rot2Code, Rot1Code, BandCode)
}
