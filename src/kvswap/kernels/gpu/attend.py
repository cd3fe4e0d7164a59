"""Decode attention over slots on a device, in Triton: parts side by side, then merged.

References
----------
Flash-Decoding, https://pytorch.org/blog/flash-decoding: the tokens of one query are split over
programs, and merged by log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

_CHANGING = [
    "q_len",
    "num_slot_tokens",
    "num_rolling",
    "num_newest",
    "split_tokens",
    "num_splits",
    "num_rows",
]  # compiled once, whatever they are


@triton.jit
def _take(
    q,
    best,
    total,
    acc,
    keys,
    values,
    is_token,
    is_seen,
    is_dim,
    scaling,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    """Take some tokens into a running softmax."""
    mask = is_token[:, None] & is_dim
    k = tl.load(keys, mask=mask, other=0.0)
    v = tl.load(values, mask=mask, other=0.0)
    if IS_WIDE:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scaling
    if HAS_SOFTCAP:  # tanh, by the sigmoid that the language has
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = tl.where(is_seen & is_token[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
    weights = tl.exp(scores - base[:, None])
    fade = tl.exp(best - base)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
    return higher, total, acc


@triton.jit(do_not_specialize=_CHANGING)
def attend_splits(
    query,
    slots,
    slot_rows,
    rolling_keys,
    rolling_values,
    newest_keys,
    newest_values,
    out,
    lse,
    q_len,
    num_slot_tokens,
    num_rolling,
    num_newest,
    split_tokens,
    record_elements,
    rolling_keys_head,
    rolling_keys_token,
    rolling_values_head,
    rolling_values_token,
    newest_keys_head,
    newest_keys_token,
    newest_values_head,
    newest_values_token,
    scaling,
    softcap,
    SHARED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Attend to one split of the tokens: those of slots, of the rolling buffer, the newest.

    A program has some query rows (head and query token) of one KV head.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    is_row = (rows < SHARED * q_len)[:, None]
    is_dim = (dims < HEAD_DIM)[None, :]
    at_row = kv_head * SHARED * q_len + rows
    rows_mask = is_row & is_dim
    q = tl.load(query + at_row[:, None] * HEAD_DIM + dims[None, :], mask=rows_mask, other=0.0)
    if IS_WIDE:
        q = q.to(tl.float32)

    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    block = tl.arange(0, BLOCK_TOKENS)
    begin = split * split_tokens
    end = begin + split_tokens
    last = tl.minimum(end, num_slot_tokens)
    for first in range(begin, last, BLOCK_TOKENS):
        tokens = first + block
        is_token = tokens < last
        slot = tl.load(slot_rows + tokens // GROUP_SIZE, mask=is_token, other=0)
        in_slot = (kv_head * GROUP_SIZE + tokens % GROUP_SIZE) * HEAD_DIM
        keys = slots + (slot * record_elements + in_slot)[:, None] + dims[None, :]
        values = keys + NUM_KV_HEADS * GROUP_SIZE * HEAD_DIM
        best, total, acc = _take(
            q,
            best,
            total,
            acc,
            keys,
            values,
            is_token,
            is_row,
            is_dim,
            scaling,
            softcap,
            HAS_SOFTCAP,
            IS_WIDE,
        )
    begin = tl.maximum(begin - num_slot_tokens, 0)
    end = end - num_slot_tokens
    last = tl.minimum(end, num_rolling)
    for first in range(begin, last, BLOCK_TOKENS):
        tokens = first + block
        at = kv_head * rolling_keys_head + tokens * rolling_keys_token
        keys = rolling_keys + at[:, None] + dims[None, :]
        at = kv_head * rolling_values_head + tokens * rolling_values_token
        values = rolling_values + at[:, None] + dims[None, :]
        best, total, acc = _take(
            q,
            best,
            total,
            acc,
            keys,
            values,
            tokens < last,
            is_row,
            is_dim,
            scaling,
            softcap,
            HAS_SOFTCAP,
            IS_WIDE,
        )
    begin = tl.maximum(begin - num_rolling, 0)
    last = tl.minimum(end - num_rolling, num_newest)
    for first in range(begin, last, BLOCK_TOKENS):
        tokens = first + block
        at = kv_head * newest_keys_head + tokens * newest_keys_token
        keys = newest_keys + at[:, None] + dims[None, :]
        at = kv_head * newest_values_head + tokens * newest_values_token
        values = newest_values + at[:, None] + dims[None, :]
        is_seen = is_row & (tokens[None, :] <= (rows % q_len)[:, None])
        best, total, acc = _take(
            q,
            best,
            total,
            acc,
            keys,
            values,
            tokens < last,
            is_seen,
            is_dim,
            scaling,
            softcap,
            HAS_SOFTCAP,
            IS_WIDE,
        )

    some = tl.where(total == 0.0, 1.0, total)
    at_row = (split * NUM_KV_HEADS * SHARED * q_len + at_row).to(tl.int64)
    acc = acc / some[:, None]
    tl.store(out + at_row[:, None] * HEAD_DIM + dims[None, :], acc, mask=rows_mask)
    summed = tl.where(total == 0.0, float("-inf"), best + tl.log(some))
    tl.store(lse + at_row, summed, mask=rows < SHARED * q_len)


@triton.jit(do_not_specialize=_CHANGING)
def merge_splits(
    parts,
    part_lse,
    out,
    lse,
    num_splits,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Join the splits of one query row."""
    row = tl.program_id(0)
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    is_split = splits < num_splits
    is_dim = dims < HEAD_DIM
    at = splits.to(tl.int64) * num_rows + row
    each = tl.load(part_lse + at, mask=is_split, other=float("-inf"))
    best = tl.max(each, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp(each - base)
    total = tl.sum(weights, 0)
    some = tl.where(total == 0.0, 1.0, total)
    mask = is_split[:, None] & is_dim[None, :]
    values = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    joined = tl.sum(values * weights[:, None], 0) / some
    tl.store(out + row * HEAD_DIM + dims, joined, mask=is_dim)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), base + tl.log(some)))
