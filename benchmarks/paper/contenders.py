"""What is compared: each published method in our engine, so that only the method differs.

Every contender is a `CacheConfig`: the same store, reads, kernels and clock serve all of them. As
the KVSwap paper ran them some keep nothing from one step to the next; given our engine's reuse
buffer they keep what fits. Whatever attends to a prediction is taken to foresee rightly, in its
favour; recall is that of each layer's real query for all alike, in theirs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.geometry import KVGeometry
from kvswap.core.units import ceil_div

PUBLISHED_TOKENS = 400
"""Selected a layer and step in the KVSwap paper, by all methods."""

_UNITS = {"emmc": 8, "sdcard": 8}
"""KVSwap's tokens of a group by device; 4 on faster ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method and its setting.

    Attributes
    ----------
    name : str
    source : str
        Paper and link.
    index : str or None
        Name in the registry; None where all groups are read in every step.
    rank_share : float
        Rank over the key's length, as published; 0 where the index has none.
    code : str or None
    unit : int or None
        Tokens of a group; None for KVSwap's own, which depends on the device.
    tokens : int
        Selected a layer and step.
    per_head : bool
        Each KV head selects for itself, and has records of its own.
    reuse : bool
        Keeps groups from step to step.
    slots_of_budget : bool
        As many slots as the memory has room for; else those of one selection.
    raises : bool
        Its tokens, until it covers what kvswap does; else they stay as published.
    attends_to_prediction : bool
        No second scoring, and no late reads: prediction is taken to be right.
    settings : mapping of str to any
        Further fields of `CacheConfig`.
    note : str
        What deviates from the source.
    on_disk : bool
        Else memory holds all keys and values, and nothing here is a cache's setting.
    """

    name: str
    source: str
    index: str | None
    rank_share: float = 0.0
    code: str | None = None
    unit: int | None = None
    tokens: int = PUBLISHED_TOKENS
    per_head: bool = False
    reuse: bool = True
    slots_of_budget: bool = False
    raises: bool = True
    attends_to_prediction: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    on_disk: bool = True

    def group_size(self, device: str) -> int:
        """Return the tokens of a group on a device."""
        return self.unit or _UNITS.get(device, 4)

    def selects(self, geometry: KVGeometry, group_size: int, tokens: int) -> dict[str, Any]:
        """Return the fields of `CacheConfig` that decide what is attended to.

        Parameters
        ----------
        geometry : KVGeometry
            Of the model: ranks are shares of its keys' length.
        group_size, tokens : int
        """
        if self.index is None:
            return {"index": "none", "group_size": group_size}
        fields: dict[str, Any] = {
            "index": self.index,
            "group_size": group_size,
            "budget_tokens": ceil_div(tokens, group_size) * group_size,
            "head_groups": geometry.num_kv_heads if self.per_head else 1,
            **self.settings,
        }
        if self.rank_share:
            fields["rank"] = self._rank(geometry)
        if self.code is not None:
            fields["code"] = self.code
        return fields

    def _rank(self, geometry: KVGeometry) -> int:
        """Return the rank of one index: of a head, where each has its own."""
        dim = geometry.head_dim if self.per_head else geometry.key_dim
        heads = 1 if self.per_head else geometry.num_kv_heads
        return max(1, round(self.rank_share * dim / heads)) * heads

    def keeps(self, group_size: int, tokens: int, batch_size: int) -> dict[str, Any]:
        """Return the fields that decide what is read, and when."""
        if self.index is None:
            return {}
        fields: dict[str, Any] = {"correct_prediction": not self.attends_to_prediction}
        if not self.reuse:
            fields["reuse"] = "none"
        if not self.slots_of_budget:
            fields["num_slots"] = ceil_div(tokens, group_size) * batch_size
        return fields

    def block_bytes(self, geometry: KVGeometry, group_size: int) -> int:
        """Return the device's unit for its records: below 4 KiB only where they are smaller."""
        heads = geometry.num_kv_heads if self.per_head else 1
        record = group_size * geometry.layer_token_bytes // heads
        return max(512, min(4096, 1 << (record.bit_length() - 1)))

    def config(
        self,
        geometry: KVGeometry,
        *,
        device: str,
        tokens: int,
        batch_size: int,
        directory: Any,
        **planned: Any,
    ) -> CacheConfig:
        """Return the settings of its cache.

        Parameters
        ----------
        geometry : KVGeometry
        device : str
            A preset's name.
        tokens, batch_size : int
        directory : path
        **planned
            Memory, context, selector.
        """
        size = self.group_size(device)
        fields = self.selects(geometry, size, tokens) | self.keeps(size, tokens, batch_size)
        storage = StorageConfig(
            directories=[directory],
            device_model=device,
            block_size_bytes=self.block_bytes(geometry, size),
        )
        return CacheConfig(storage=storage, max_batch=batch_size, **(fields | planned))


_EXACT: dict[str, Any] = {"worth_reading": 0.0, "recent_tokens": 32}
_MEAN: dict[str, Any] = {**_EXACT, "reduce": "mean"}

KVSWAP_PUBLISHED = Contender(
    name="KVSwap as published",
    source="KVSwap, https://arxiv.org/abs/2511.11907",
    index="lowrank",
    rank_share=1 / 8,
    code="bf16",
    attends_to_prediction=True,
    settings=_MEAN,
    note="one projection a prompt, where the paper fits one offline to a sample of text",
)

KVSWAP_TIGHT = replace(KVSWAP_PUBLISHED, name="KVSwap-t as published", rank_share=1 / 32)

_INFINIGEN = Contender(
    name="InfiniGen",
    source="InfiniGen, https://arxiv.org/abs/2406.19707",
    index="infinigen",
    rank_share=1 / 8,
    code="bf16",
    unit=1,
    per_head=True,
    reuse=False,
    attends_to_prediction=True,
    settings=_EXACT,
    note="as many tokens as the others; layers 0 and 1 select too; 1/8 of the key as the KVSwap"
    " paper ran it, where its own has 0.3",
)
_INFINIGEN_STAR = replace(
    _INFINIGEN,
    name="InfiniGen*",
    source="KVSwap's form of InfiniGen: one selection for all heads",
    per_head=False,
    note="the best head's share counts, not the mean of all",
)
_SHADOWKV = Contender(
    name="ShadowKV",
    source="ShadowKV, https://arxiv.org/abs/2410.21465",
    index="shadowkv_values",
    rank_share=40 / 1024,
    code="bf16",
    unit=16,
    reuse=False,
    settings=_EXACT,
    note="chunks of 16 and rank 40, as the KVSwap paper ran it, where its own paper has 8 and 160;"
    " values of all heads in one read, where that port to disk reads each head's alone",
)
_SOLIDATTENTION = Contender(
    name="SolidAttention",
    source="SolidAttention, FAST 2026",
    index="chess",
    unit=32,
    tokens=1024,
    settings=_EXACT,
    note="a block's mean key stands for its representatives; what the step before selected"
    " stays in memory, which is what it prefetches",
)

FLEXGEN = Contender(
    name="FlexGen",
    source="FlexGen, https://arxiv.org/abs/2303.06865",
    index=None,
    unit=64,
    note="what memory holds stays there; no 4-bit cache and no block schedule over batches",
)

AS_THE_PAPER_RAN_THEM = (
    FLEXGEN,
    _INFINIGEN,
    _INFINIGEN_STAR,
    replace(
        _INFINIGEN_STAR,
        name="InfiniGen* + reuse",
        source="KVSwap's form of InfiniGen with its reuse buffer",
        reuse=True,
    ),
    replace(
        _INFINIGEN,
        name="Loki",
        source="Loki, https://arxiv.org/abs/2406.02542",
        index="loki",
        note="components of the prompt's own keys",
    ),
    _SHADOWKV,
    _SOLIDATTENTION,
)

AT_PUBLISHED_TOKENS = tuple(
    replace(each, name=f"{each.name}, {PUBLISHED_TOKENS} tokens", raises=False)
    for each in AS_THE_PAPER_RAN_THEM
    if each.index is not None and each.tokens == PUBLISHED_TOKENS
)
"""The same with the tokens of the KVSwap paper's tables, however little they cover."""


def _in_our_engine(contender: Contender, source: str) -> Contender:
    """Return a method with our reuse buffer, prefetch, and all slots that fit."""
    return replace(
        contender,
        name=f"{contender.name}, our engine",
        source=source,
        reuse=True,
        slots_of_budget=True,
        attends_to_prediction=False,
        note="",
    )


_INFINIGEN_OURS = _in_our_engine(
    _INFINIGEN_STAR, "InfiniGen with our reuse buffer, prefetch and all slots that fit"
)
GIVEN_OUR_ENGINE = (
    _INFINIGEN_OURS,
    replace(
        _INFINIGEN_OURS,
        name="InfiniGen*, our engine and groups",
        source="the same, with KVSwap's groups",
        unit=None,
    ),
    _in_our_engine(_SHADOWKV, "ShadowKV with our reuse buffer, prefetch and all slots that fit"),
    _in_our_engine(_SOLIDATTENTION, "SolidAttention with our prefetch and all slots that fit"),
)


def ours(unit: int, codec: str, *, rank_share: float = 1 / 8, tokens: int = 256) -> Contender:
    """Return kvswap with its own index and rules, in groups and records of a kind.

    Parameters
    ----------
    unit : int
        Tokens of a group.
    codec : str
        Of records.
    rank_share : float
        Rank over the key's length.
    tokens : int
        The fewest that are tried: answers ask for several facts at once, which recall does not see.
    """
    return Contender(
        name=f"kvswap, groups of {unit}, {codec}, rank {Fraction(rank_share)}",
        source="this project",
        index="lowrank",
        rank_share=rank_share,
        code="rot4",
        unit=unit,
        tokens=tokens,
        slots_of_budget=True,
        settings={"record_codec": codec},
    )


BY_RULES = ours(4, "raw", tokens=512)
"""What the planner's rules select; no setting of kvswap may cover less."""

OURS = (
    BY_RULES,
    *(ours(unit, "int8", rank_share=share) for unit in (8, 16) for share in (1 / 8, 3 / 16, 1 / 4)),
)
"""What kvswap is tuned among."""

WITHOUT_REUSE = (
    replace(KVSWAP_PUBLISHED, name="KVSwap as published, no reuse", reuse=False, raises=False),
    replace(
        ours(8, "int8", tokens=512), name="kvswap, no reuse", reuse=False, slots_of_budget=False
    ),
)
"""For the ablation of the reuse buffer."""

IN_MEMORY = Contender(
    name="everything in memory",
    source="full attention of transformers, over its DynamicCache",
    index=None,
    on_disk=False,
    note="new tokens are written into room beforehand, where a DynamicCache copies all for each",
)
"""What nobody has the memory for."""

ON_DISK = (
    KVSWAP_PUBLISHED,
    KVSWAP_TIGHT,
    *AS_THE_PAPER_RAN_THEM,
    *AT_PUBLISHED_TOKENS,
    *GIVEN_OUR_ENGINE,
    *WITHOUT_REUSE,
)
"""What kvswap is set against, with as much memory."""

ALL = (*ON_DISK, IN_MEMORY)
