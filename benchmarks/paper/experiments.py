"""Which cells each part of the paper's evaluation has, at scaled shapes, and its figures."""

from __future__ import annotations

from dataclasses import replace

from .contenders import KVSWAP_PUBLISHED, KVSWAP_TIGHT, WITHOUT_REUSE, Contender
from .steps import Cell

NAMES = ("claims", "table4", "figure10", "figure11", "ablation")

WITH_ANSWERS = ("claims", "figure11")
"""Parts in which the reader's questions are answered as each contender would."""

CLAIMED_DEVICES = ("sdcard", "emmc", "nvme", "ufs31")
SHAPE = "qwen3-0.6b"
OTHER_SHAPES = ("llama-3.2-3b", "llama-3.1-8b", "qwen3-14b")

PUBLISHED_TABLE4 = {
    # Tokens/s at 32K, Llama-3.1-8B on the paper's board, by device, method and batch, as far as
    # they could be had from those who read it: 1, 2, 4, 8, 16.
    ("nvme", "KVSwap as published"): (6.85, 11.9, 21.4, 35.6, 46.8),
    ("nvme", "ShadowKV"): (6.38, 10.0, 16.3, 21.5, 26.2),
    ("emmc", "KVSwap as published"): (None, None, None, 15.7, None),
    ("emmc", "ShadowKV"): (None, None, None, 3.76, None),
}
PUBLISHED_BATCHES = (1, 2, 4, 8, 16)
PUBLISHED_REUSE = {"nvme": (17.3, 33.4), "emmc": (3.9, 15.7)}
"""Tokens/s at batch 8 without and with reuse."""


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
            replace(base, device=device, batch=batch, context=context)
            for context in (32768, 16384)
            for device in ("nvme", "emmc")
            for batch in PUBLISHED_BATCHES
        ],
        "figure10": [
            replace(base, shape=shape, device=device, batch=batch)
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


def takes(cell: Cell, contender: Contender, *, part: str) -> bool:
    """Whether a part looks at a contender in a cell."""
    if part == "ablation":
        return contender in (KVSWAP_PUBLISHED, *WITHOUT_REUSE)
    if contender in WITHOUT_REUSE:
        return False
    if part == "claims":
        return contender is not KVSWAP_TIGHT
    return contender is not (KVSWAP_PUBLISHED if cell.is_tight else KVSWAP_TIGHT)
