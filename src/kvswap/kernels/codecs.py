"""Record codecs: a head's keys and values in eight or four bits, turned first.

What all vectors of a head share is taken off (`kvswap.kernels.centres`). The rest is multiplied
by a fixed orthogonal matrix that spreads each element over all of them, so that no outlier is
left, and rounded to levels with one scale a token and head: evenly spaced ones in eight bits, those
that are best for a Gaussian in four. The matrix is never undone a token: dot products do not change
when both sides are turned, and a weighted sum of turned values is turned back once
(`kvswap.kernels.slots`).

The scale has eight bits, each of which one eighth of the codes spell together: it is one where an
odd number of them is odd. A record has no bytes beside its codes and stays a power of two, where
a few bytes more would cost a whole block. Of codes that say another bit, the one moves that lies
nearest to its other neighbour, which costs little; several scales are tried and the best is kept.

References
----------
QuaRot, https://arxiv.org/abs/2404.00456, and TurboQuant, https://arxiv.org/abs/2504.19874:
randomised rotations of keys and values before rounding. J. Max, Quantizing for minimum
distortion, IRE Trans. IT-6, 1960, table I: the sixteen levels. R. N. Bracewell, The Hartley
transform, 1986: the matrix for lengths that are no power of two. R. Crandall, Some notes on
steganography, 1998: bits in the parity of several numbers, of which the cheapest changes.

Reproduced: rotation, then a scalar grid with a scale for each vector.
Deviates: the scale lies within the codes; values are turned by the same matrix as keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CODEC_NUMBERS = {"raw": 0, "int8": 1, "rot4": 2}
"""As csrc/kernels/api.h numbers them."""

SPELLING_WORDS = 4  # of eight bytes, the first of a row: their columns spell the scale
NO_NUMBER = 255  # scale of a vector that cannot be coded
_MASK = 2**64 - 1


# -- rotation -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotation:
    """The orthogonal matrix that vectors of one length are turned by.

    Attributes
    ----------
    factors : Tensor [head_dim], float32
        What elements are multiplied by first.
    matrix : Tensor [head_dim, head_dim], float32, or None
        What they are multiplied by then; None for Hadamard's of ones, whose factors are scaled.
    whole : Tensor [head_dim, head_dim], float32
        Both in one: a row ``x`` is turned to ``x @ whole``, and back by its transpose.
    """

    factors: Tensor
    matrix: Tensor | None
    whole: Tensor

    @property
    def addresses(self) -> tuple[int, int]:
        """Of factors and matrix, for native kernels; 0 where there is none."""
        return self.factors.data_ptr(), 0 if self.matrix is None else self.matrix.data_ptr()


@cache
def rotation_of(head_dim: int) -> Rotation:
    """Return the rotation of a length: signs from a fixed sequence, then Hadamard's matrix.

    Where the length is no power of two, Hartley's takes its place: cos + sin of
    ``2 pi row column / head_dim``, symmetric and orthogonal too.
    """
    signs = torch.tensor(_signs(head_dim))
    if head_dim & (head_dim - 1) == 0:
        ones = torch.ones(1, 1)
        while len(ones) < head_dim:
            ones = torch.cat((torch.cat((ones, ones), 1), torch.cat((ones, -ones), 1)))
        factors = signs * head_dim**-0.5
        return Rotation(factors, None, factors[:, None] * ones)
    at = torch.arange(head_dim, dtype=torch.float64)
    # Whole turns are taken out while numbers are whole: the table is exact to the last bit.
    angles = (at[:, None] * at).remainder(head_dim) * (2 * torch.pi / head_dim)
    matrix = ((angles.cos() + angles.sin()) * head_dim**-0.5).float()
    return Rotation(signs, matrix, signs[:, None] * matrix)


def _signs(head_dim: int) -> list[float]:
    """Return 1 or -1 for each element: the top bits of SplitMix64, begun at the length."""
    signs, state = [], head_dim
    for _ in range(head_dim):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        signs.append(-1.0 if (mixed ^ mixed >> 31) >> 63 else 1.0)
    return signs


# -- grids ----------------------------------------------------------------------------------


LEVELS = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
LEVELS = torch.cat((-LEVELS.flip(0), LEVELS))
"""What the codes of ``rot4`` stand for, from the lowest to the highest, in scales."""

_EDGES = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True, slots=True)
class _Grid:
    """Codes are whole numbers, each of which stands for a level, times the scale.

    Attributes
    ----------
    least, most : int
        Of the codes.
    tried : range
        Scales that are tried, counted from the smallest that is as large as wanted.
    """

    least: int
    most: int
    tried: range

    def wanted_scale(self, vectors: Tensor) -> Tensor:
        """Return the scale that would serve best by what is known beforehand."""
        top = vectors.abs().amax(-1)
        if self.most == 127:
            return top / 127
        shape = vectors / top.clamp(min=1e-30)[..., None]  # squares stay numbers
        return shape.square().mean(-1).sqrt() * top

    def level(self, codes: Tensor) -> Tensor:
        """Return what codes stand for, in scales."""
        return codes if self.most == 127 else LEVELS[codes.long() + 8]

    def nearest(self, wanted: Tensor) -> Tensor:
        """Return the codes whose levels are nearest."""
        if self.most == 127:
            return torch.round(wanted).clamp_(self.least, self.most)
        return torch.bucketize(wanted, _EDGES, right=True).float() - 8

    def spell(self, codes: Tensor, wanted: Tensor, scale: Tensor, columns: Tensor) -> None:
        """Let codes spell the scale of that number, moving one of a column where need be."""
        missed = wanted - self.level(codes)
        step = torch.where(missed > 0, 1.0, -1.0)
        beyond = (codes + step < self.least) | (codes + step > self.most)
        following = torch.where(beyond, codes - step, codes + step)
        cost = (wanted - self.level(following)).square() - missed.square()
        at = cost[..., columns].argmin(-1, keepdim=True)
        places = columns.expand(*at.shape[:-1], -1).gather(-1, at)[..., 0]
        odd = codes[..., columns].remainder(2).sum(-1).remainder(2).to(scale.dtype)
        says_other = odd != (scale[..., None] >> torch.arange(8)) & 1
        moved = torch.where(says_other, following.gather(-1, places), codes.gather(-1, places))
        codes.scatter_(-1, places, moved)


_GRIDS = {"int8": _Grid(-128, 127, range(-1, 2)), "rot4": _Grid(-8, 7, range(-3, 2))}


@cache
def spelling_columns(head_dim: int, codec: str) -> Tensor:
    """Return which elements spell each bit of the scale: Tensor [8, n], int64."""
    parts = 1 if codec == "int8" else 2  # a byte holds one element, or one of each half
    words = min(head_dim // parts // 8, SPELLING_WORDS)
    byte = torch.arange(8 * words).unflatten(0, (words, 8))
    elements = byte[None] + (torch.arange(parts) * (head_dim // parts))[:, None, None]
    return elements.flatten(0, 1).t().contiguous()


@cache
def scales() -> Tensor:
    """Return what each scale stands for: Tensor [256], float32.

    Eight bits, five of them the exponent, so that there are eight in an octave: the first is 0,
    the last no number.
    """
    number = torch.arange(256)
    values = torch.ldexp(1 + (number & 7) / 8, (number >> 3) - 19).float()
    values[0], values[NO_NUMBER] = 0, float("nan")
    return values


def encode(vectors: Tensor, codec: str, centre: Tensor | None = None) -> Tensor:
    """Take the centre off vectors, turn and round them.

    Parameters
    ----------
    vectors : Tensor [..., head_dim], any float dtype
    codec : {"int8", "rot4"}
    centre : Tensor, float32, optional
        Broadcast to vectors.

    Returns
    -------
    Tensor [..., row_bytes], uint8
        ``int8``: a byte an element, in two's complement. ``rot4``: a byte holds 8 more than the
        code of an element of the first half in its low bits, of the second in its high ones.

    Notes
    -----
    A vector with an element that is no number, or too large for the scales, is coded with a
    scale that is no number: all of it is none when it is decoded.
    """
    grid = _GRIDS[codec]
    plain = vectors.float() if centre is None else vectors.float() - centre
    turned = plain @ rotation_of(vectors.shape[-1]).whole
    wanted = grid.wanted_scale(turned)
    fits = torch.searchsorted(scales()[1:NO_NUMBER].contiguous(), wanted) + 1
    error = torch.full(fits.shape, float("inf"))
    best = torch.zeros_like(fits)
    for shift in grid.tried:
        scale = (fits + shift).clamp(1, NO_NUMBER - 1)
        levels = turned / scales()[scale][..., None]
        missed = levels - grid.level(grid.nearest(levels))
        found = missed.square().sum(-1) * (scales()[scale] / wanted).square()
        is_better = found < error
        error, best = torch.where(is_better, found, error), torch.where(is_better, scale, best)
    best[(fits >= NO_NUMBER) | ~turned.isfinite().all(-1)] = NO_NUMBER
    best[wanted < scales()[1] / 2] = 0
    levels = turned / scales()[best][..., None]
    codes = grid.nearest(levels)
    grid.spell(codes, levels, best, spelling_columns(vectors.shape[-1], codec))
    codes[(best == 0) | (best == NO_NUMBER)] = 0
    codes[..., :8] += (best == NO_NUMBER)[..., None].float()
    return _as_bytes(codes.to(torch.int16), codec)


def _as_bytes(codes: Tensor, codec: str) -> Tensor:
    if codec == "int8":
        return codes.to(torch.int8).view(torch.uint8)
    half = codes.shape[-1] // 2
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., :half] | (nibbles[..., half:] << 4)


def decode_turned(codes: Tensor, codec: str) -> Tensor:
    """Return what codes stand for, still turned.

    Parameters
    ----------
    codes : Tensor [..., row_bytes], uint8
    codec : {"int8", "rot4"}

    Returns
    -------
    Tensor [..., head_dim], float32
    """
    if codec == "int8":
        numbers, levels = codes, codes.view(torch.int8).float()
    else:
        numbers = torch.cat((codes & 15, codes >> 4), -1)
        levels = LEVELS[numbers.long()]
    columns = spelling_columns(levels.shape[-1], codec)
    bits = (numbers[..., columns] & 1).sum(-1) & 1
    scale = scales()[(bits << torch.arange(8)).sum(-1)]
    return levels.mul_(scale[..., None])


def decode(codes: Tensor, codec: str, centre: Tensor | None = None) -> Tensor:
    """Return what codes stand for: Tensor [..., head_dim], float32."""
    turned = decode_turned(codes, codec)
    plain = turned @ rotation_of(turned.shape[-1]).whole.t()
    return plain if centre is None else plain + centre
