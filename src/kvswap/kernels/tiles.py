"""How the codes of a layer's keys lie in memory: sixteen tokens side by side.

A register then holds the same few bytes of sixteen tokens, and no sum ever has to be taken
across one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvswap.core.units import ceil_div
from kvswap.kernels.coding import CHUNK_BYTES

TILE_TOKENS = 16


def tiled_zeros(num_tokens: int, width: int) -> Tensor:
    """Return room for the codes of some tokens.

    Parameters
    ----------
    num_tokens : int
    width : int
        Bytes of a token, a multiple of `CHUNK_BYTES`.

    Returns
    -------
    Tensor [num_tiles, width / 4, 16, 4], uint8
        Tile, chunk, token of the tile, byte of the chunk.
    """
    shape = (ceil_div(num_tokens, TILE_TOKENS), width // CHUNK_BYTES, TILE_TOKENS, CHUNK_BYTES)
    return torch.zeros(shape, dtype=torch.uint8)


def put_codes(tiles: Tensor, tokens: Tensor, codes: Tensor) -> None:
    """Store codes [n, width] of tokens [n], int64."""
    chunks = codes.unflatten(1, (-1, CHUNK_BYTES))
    tiles[tokens // TILE_TOKENS, :, tokens % TILE_TOKENS] = chunks


def take_codes(tiles: Tensor, tokens: Tensor) -> Tensor:
    """Return the codes [n, width] of tokens [n], int64; a copy."""
    return tiles[tokens // TILE_TOKENS, :, tokens % TILE_TOKENS].flatten(1)
