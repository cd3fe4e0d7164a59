"""Which cells each part of the paper's evaluation has, at scaled shapes, and its figures."""

from __future__ import annotations

from dataclasses import replace

from .contenders import (
    AT_PUBLISHED_TOKENS,
    FLEXGEN,
    IN_MEMORY,
    KVSWAP_PUBLISHED,
    KVSWAP_TIGHT,
    WITHOUT_REUSE,
    Contender,
)
from .steps import Cell

NAMES = ("claims", "table4", "figure10", "figure11", "ablation")

WITH_ANSWERS = ("claims", "figure11")
"""Parts in which the reader's questions are answered as each contender would."""

CLAIMED_DEVICES = ("sdcard", "emmc", "nvme", "ufs31")
SHAPE = "qwen3-0.6b"
OTHER_SHAPES = ("llama-3.2-3b", "llama-3.1-8b", "qwen3-14b")

PUBLISHED_TABLE4 = {
    # Tokens/s at 32K, Llama-3.1-8B on the paper's board, by device, method and batch, as far as
    # they could be had from those who read it: 1, 2, 4, 8, 16. Ends of a range over batches are
    # taken to be those of the first and the last.
    ("nvme", "KVSwap as published"): (6.85, 11.9, 21.4, 35.6, 46.8),
    ("nvme", "ShadowKV, 400 tokens"): (6.38, 10.0, 16.3, 21.5, 26.2),
    ("nvme", "FlexGen"): (0.4, None, None, None, 0.8),
    ("emmc", "KVSwap as published"): (5.9, None, None, 15.7, 15.8),
    ("emmc", "ShadowKV, 400 tokens"): (3.0, None, None, 3.76, 4.1),
}
PUBLISHED_BATCHES = (1, 2, 4, 8, 16)
PUBLISHED_REUSE = {"nvme": (17.3, 33.4), "emmc": (3.9, 15.7)}
"""Tokens/s at batch 8 without and with reuse."""
PUBLISHED_TIGHT = {"nvme": 17.2, "emmc": 10.9}
"""Tokens/s of KVSwap with its tight memory, Figure 11."""

_LARGEST = 2**32
"""Bytes of full KV of a cell: three such stores and one cache in memory stand side by side."""

_FIGURE10 = (KVSWAP_PUBLISHED.name, "ShadowKV, 400 tokens", IN_MEMORY.name)


def parts(layers: int, *, is_quick: bool = False) -> dict[str, list[Cell]]:
    """Return the cells of every part.

    Parameters
    ----------
    layers : int
        Of each shape.
    is_quick : bool
        Toy size: one cell a part.
    """
    base = Cell(shape=SHAPE, layers=layers, context=32768, batch=8, device="emmc")
    made = {
        "claims": [
            replace(base, device=device, batch=batch)
            for batch in (8, 1)
            for device in CLAIMED_DEVICES
            if batch == 1 or device != "ufs31"
        ],
        "table4": [
            _within(replace(base, device=device, batch=batch, context=context))
            for context in (32768, 16384)
            for device in ("nvme", "emmc")
            for batch in PUBLISHED_BATCHES
        ],
        "figure10": [
            _within(replace(base, shape=shape, device=device, batch=batch))
            for shape in OTHER_SHAPES
            for device in ("nvme", "emmc")
            for batch in (1, 8)
        ],
        "figure11": [
            replace(base, context=24576, device=device, is_tight=is_tight)
            for device in ("nvme", "emmc")
            for is_tight in (False, True)
        ],
        "ablation": [replace(base, device=device) for device in ("nvme", "emmc")],
    }
    if is_quick:
        small = Cell(shape=SHAPE, layers=2, context=2048, batch=1, device="emmc")
        made = {name: [small] for name in made}
        made["claims"] += [
            replace(small, device=device, batch=batch)
            for device in CLAIMED_DEVICES
            for batch in (1, 8)
            if batch == 1 or device != "ufs31"
        ]
    return made


def _within(cell: Cell) -> Cell:
    """Return a cell with half its layers, until a machine of 24 GiB can hold it."""
    while cell.full_bytes > _LARGEST and cell.layers > 1:
        cell = replace(cell, layers=cell.layers // 2)
    return cell


def takes(cell: Cell, contender: Contender, *, part: str) -> bool:
    """Whether a part looks at a contender in a cell.

    Tables of the paper have its baselines with as many tokens as it gave them; claims, and the
    figure with equal memory, have them raised until they cover what kvswap does.
    """
    if part == "ablation":
        return contender in (KVSWAP_PUBLISHED, *WITHOUT_REUSE)
    if part == "figure10":
        return contender.name in _FIGURE10
    if part == "table4":
        return contender in (FLEXGEN, KVSWAP_PUBLISHED, IN_MEMORY, *AT_PUBLISHED_TOKENS)
    if contender in (*WITHOUT_REUSE, *AT_PUBLISHED_TOKENS):
        return False
    if part == "claims":
        return contender is not KVSWAP_TIGHT
    return contender is not (KVSWAP_PUBLISHED if cell.is_tight else KVSWAP_TIGHT)
