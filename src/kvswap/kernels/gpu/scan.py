"""Scores of coded keys on a device, and each group's best, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

_CHANGING = ["first_group", "num_groups"]


@triton.jit(do_not_specialize=_CHANGING)
def scan_groups(
    tiles,
    scales,
    queries,
    query_scales,
    query_offsets,
    groups,
    out,
    first_group,
    num_groups,
    num_queries,
    CODE: tl.constexpr,
    BITS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Score some groups against some queries: a group as its best token.

    Codes lie in tiles of ``TILE`` tokens, in chunks of ``CHUNK`` elements a token. Products of
    codes are taken in float16 and summed in float32, which is exact for whole numbers so small.
    A grid's byte holds ``BITS`` of a coefficient of each plane of ``COLUMNS``.
    """
    places = tl.program_id(0) * BLOCK_GROUPS * GROUP_SIZE + tl.arange(0, BLOCK_GROUPS * GROUP_SIZE)
    at_group = places // GROUP_SIZE
    is_token = at_group < num_groups
    if HAS_IDS:
        group = tl.load(groups + at_group, mask=is_token, other=0)
    else:
        group = (first_group + at_group).to(tl.int64)
    token = group * GROUP_SIZE + places % GROUP_SIZE
    start = ((token // TILE) * CHUNKS * TILE + token % TILE) * CHUNK
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = query < num_queries
    sums = tl.zeros([BLOCK_GROUPS * GROUP_SIZE, BLOCK_QUERIES], tl.float32)
    for first in range(0, COLUMNS, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < COLUMNS
        at = start[:, None] + ((column // CHUNK) * TILE * CHUNK + column % CHUNK)[None, :]
        mask = is_token[:, None] & is_column[None, :]
        codes = tl.load(tiles + at, mask=mask, other=0)
        query_at = query[None, :] * RANK + column[:, None]
        query_mask = is_column[:, None] & is_query[None, :]
        if BITS > 0:
            for plane in tl.static_range(8 // BITS):
                at_plane = plane * COLUMNS
                plane_mask = query_mask & (column + at_plane < RANK)[:, None]
                q = tl.load(queries + query_at + at_plane, mask=plane_mask, other=0.0)
                part = (codes >> (BITS * plane)) & ((1 << BITS) - 1)
                sums += tl.dot(part.to(tl.float16), q)
        else:
            q = tl.load(queries + query_at, mask=query_mask, other=0.0)
            if CODE == "int8":
                sums += tl.dot((codes.to(tl.int32) - 128).to(tl.float16), q)
            else:
                if IS_WIDE:
                    codes = codes.to(tl.float32)
                    q = q.to(tl.float32)
                sums += tl.dot(codes, q, input_precision="ieee")
    if CODE != "bf16":
        sums -= tl.load(query_offsets + query, mask=is_query, other=0.0)[None, :]
        sums *= tl.load(query_scales + query, mask=is_query, other=0.0)[None, :]
        scale = tl.load(scales + token, mask=is_token, other=0.0)
        sums *= scale.to(tl.float32)[:, None]
    best = tl.max(tl.reshape(sums, (BLOCK_GROUPS, GROUP_SIZE, BLOCK_QUERIES)), 1)
    group_at = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    at = query[None, :].to(tl.int64) * num_groups + group_at[:, None]
    tl.store(out + at, best, mask=(group_at < num_groups)[:, None] & is_query[None, :])
