"""The settings that are weighed: few enough to be listed, so that no search strategy is needed.

What is not in it follows from it. Slots take what memory is left. A full group is flushed at once,
so that flushing follows from the group size. Whether a layer is predicted is decided while a model
runs (`kvswap.cache.foresight`), since it pays on one device, at one hour, and not on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from kvswap.cache.plan import CachePlan, default_group_size, plan_cache
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.core.units import align_up, format_bytes
from kvswap.predict import INDEXES, KeyIndex
from kvswap.tune.estimator import Estimator

MEMORY_PARTS = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
"""Of the budget: what is chosen is chosen from all of them, and the frontier shows them."""

TOKEN_PARTS = tuple(Fraction(part, 4) for part in (1, 2, 3, 4, 6, 8))
"""Of the tokens that the rules select."""

_SIZES = 4  # of groups: that of the rules, and twice as long ones
_MOST_RECORD_BYTES = 256 << 10  # beyond, no device reads any faster
_RANKS = (1, 2, 4, 8)  # parts of the largest rank
_CODES = ("int8",)  # tried beside the default of a small rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to share out a budget.

    Attributes
    ----------
    kv_memory : int
        Bytes.
    record_codec : str
    group_size : int
    estimator : Estimator or None
        None where memory holds every group, and nothing is estimated.
    budget_tokens : int
        Selected by a layer; 0 where all are.
    plan : CachePlan
        What follows from it.
    """

    kv_memory: int
    record_codec: str
    group_size: int
    estimator: Estimator | None
    budget_tokens: int
    plan: CachePlan = field(compare=False, repr=False)

    @property
    def fields(self) -> dict[str, Any]:
        """Return what a `CacheConfig` says of it."""
        named: dict[str, Any] = {
            "kv_memory": self.kv_memory,
            "record_codec": self.record_codec,
            "group_size": self.group_size,
        }
        if self.estimator is not None:
            named |= {"index": self.estimator.index, "rank": self.estimator.rank}
            named |= {"code": self.estimator.code, "budget_tokens": self.budget_tokens}
        return named

    @property
    def label(self) -> str:
        """In words, for messages and as a name in files."""
        what = "everything in memory" if self.estimator is None else self.estimator.label
        if self.estimator is None:
            what += f", groups of {self.group_size}"
        else:
            what += f", {self.budget_tokens} tokens selected"
        return f"{what}, {self.record_codec} records, {format_bytes(self.kv_memory)}"

    @property
    def row_slots(self) -> int:
        """Slots of a layer that a sequence has."""
        return self.plan.num_slots // self.plan.batch_size


class SettingSpace:
    """All settings of a model's cache that fit, within a budget and its parts.

    Parameters
    ----------
    geometry : KVGeometry
    config : CacheConfig
        The budget; what it fixes beside index and codec stays fixed.
    context, batch_size : int
    indexes, record_codecs : sequence of str
        An index alone is tried with some of its ranks and codes; a rank or code named with it is
        kept to. Default: those of the config.
    on_device : bool
        Slots and index lie on a device.

    Raises
    ------
    BudgetError
        If the rules find no setting for the budget.
    ConfigError
        If something cannot be used, or fixes what is to be tuned in a way that it cannot be.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        config: CacheConfig,
        *,
        context: int,
        batch_size: int,
        indexes: Iterable[str] = (),
        record_codecs: Iterable[str] = (),
        on_device: bool = False,
    ) -> None:
        _check(config)
        self.geometry, self.config = geometry, config
        self.context, self.batch_size, self.on_device = context, batch_size, on_device
        own = _spec(config)
        self._indexes = [self._with_index(spec) for spec in dict.fromkeys(indexes or [own])]
        self._codecs = list(dict.fromkeys(record_codecs or [config.record_codec]))
        for codec in self._codecs:
            RecordLayout(geometry=geometry, group_size=1, codec=codec)  # refused in one sentence
        base = replace(self._indexes[0], record_codec=self._codecs[0])
        self.rules = self._ruled(base, self._plan(base))

    def settings(self) -> list[Setting]:
        """Return all that fit, without repeats; that of the rules is the first."""
        return list(dict.fromkeys([self.rules, *self._found()]))

    def _found(self) -> Iterator[Setting]:
        for part in MEMORY_PARTS:
            memory = int(self.config.kv_memory_bytes * part)
            for codec in self._codecs:
                base = replace(self._indexes[0], kv_memory=memory, record_codec=codec)
                ruled = self._plan_if_it_fits(base)
                if ruled is not None:
                    yield self._ruled(base, ruled)
                for size in self._group_sizes(codec):
                    for index in self._indexes:
                        yield from self._selecting(
                            replace(index, kv_memory=memory, record_codec=codec, group_size=size)
                        )

    def _selecting(self, config: CacheConfig) -> Iterator[Setting]:
        size = config.group_size or 0
        for rank, code in self._ranks_and_codes(config):
            for tokens in self._token_choices(config):
                changed = replace(config, rank=rank, code=code, budget_tokens=tokens)
                plan = self._plan_if_it_fits(changed)
                if plan is not None:
                    yield Setting(
                        kv_memory=config.kv_memory_bytes,
                        record_codec=config.record_codec,
                        group_size=size,
                        estimator=Estimator(config.index, rank, code, size),
                        budget_tokens=tokens,
                        plan=plan,
                    )

    def _ruled(self, config: CacheConfig, plan: CachePlan) -> Setting:
        """Return what the rules made of a config, said in full."""
        size = plan.layout.group_size
        estimator = Estimator(config.index, plan.rank, plan.code, size) if plan.rank else None
        return Setting(
            kv_memory=config.kv_memory_bytes,
            record_codec=config.record_codec,
            group_size=size,
            estimator=estimator,
            budget_tokens=plan.budget_groups * size if plan.rank else 0,
            plan=plan,
        )

    def _group_sizes(self, codec: str) -> list[int]:
        if self.config.group_size is not None:
            return [self.config.group_size]
        block = self.config.storage.block_size_bytes
        size = default_group_size(self.geometry, block, codec)
        layout = RecordLayout(
            geometry=self.geometry, group_size=size, block_size_bytes=block, codec=codec
        )
        longer = [size * 2**step for step in range(_SIZES)]
        most = max(size, size * _MOST_RECORD_BYTES // layout.record_bytes)
        return [each for each in longer if each <= min(256, most)]

    def _token_choices(self, config: CacheConfig) -> list[int]:
        if isinstance(config.budget_tokens, int):
            return [config.budget_tokens]
        size, context = config.group_size or 1, self.context
        pinned = size * sum(config.pinned_groups(size))
        found = {align_up(int(self.usual_tokens * part), size) for part in TOKEN_PARTS}
        # Less than as much again as is always selected leaves nothing to choose.
        return sorted(tokens for tokens in found if 2 * pinned <= tokens < context)

    @property
    def usual_tokens(self) -> int:
        """Tokens that the rules select, or would if memory did not hold everything."""
        return self.rules.budget_tokens or max(448, min(2048, self.context // 64))

    def _ranks_and_codes(self, config: CacheConfig) -> list[tuple[int, str]]:
        kind = INDEXES.get(config.index)
        ranks = kind.ranks(self.geometry) if config.rank is None else (config.rank,)
        spread = {next(r for r in ranks if r * part <= ranks[0] or r == ranks[-1]): part
                  for part in _RANKS}  # fmt: skip
        found = [
            (rank, code)
            for rank, part in spread.items()
            for code in self._codes(kind, config, rank, is_small=part > 1)
        ]
        rules = self.rules.estimator
        if rules is not None and rules.index == config.index and config.rank is None:
            found.append((rules.rank, config.code or rules.code))
        return list(dict.fromkeys(found))

    def _codes(
        self, kind: type[KeyIndex], config: CacheConfig, rank: int, *, is_small: bool
    ) -> list[str]:
        if config.code is not None:
            return [config.code]
        usual = kind.default_code(rank, on_device=self.on_device)
        others = [code for code in _CODES if code in kind.codes] if is_small else []
        return [code for code in dict.fromkeys([usual, *others]) if self._goes(kind, rank, code)]

    def _goes(self, kind: type[KeyIndex], rank: int, code: str) -> bool:
        try:
            kind.check(self.geometry, rank=rank, code=code)
        except ConfigError:
            return False
        return True

    def _with_index(self, spec: str) -> CacheConfig:
        named = replace(self.config, index=spec, rank=None, code=None)
        INDEXES.get(named.index)
        return named

    def _plan(self, config: CacheConfig) -> CachePlan:
        return plan_cache(
            self.geometry,
            config,
            batch_size=self.batch_size,
            max_context=self.context,
            on_device=self.on_device,
        )

    def _plan_if_it_fits(self, config: CacheConfig) -> CachePlan | None:
        try:
            return self._plan(config)
        except BudgetError:
            return None


def slots_by_estimator(settings: Iterable[Setting]) -> dict[Estimator, dict[int, set[int]]]:
    """Return what is to be measured: by estimator and selected tokens, the numbers of slots."""
    wanted: dict[Estimator, dict[int, set[int]]] = {}
    for setting in settings:
        if setting.estimator is not None:
            by_tokens = wanted.setdefault(setting.estimator, {})
            by_tokens.setdefault(setting.budget_tokens, set()).add(setting.row_slots)
    return dict(sorted(wanted.items()))


def free_groups(config: CacheConfig, plan: CachePlan) -> int:
    """Return how many groups of a selection are chosen by their scores."""
    pinned = config.pinned_groups(plan.layout.group_size, plan.budget_groups)
    return max(1, plan.budget_groups - sum(pinned))


def _spec(config: CacheConfig) -> str:
    rank = "" if config.rank is None else f":{config.rank}"
    return f"{config.index}{rank}" + ("" if config.code is None else f"+{config.code}")


def _check(config: CacheConfig) -> None:
    if config.head_groups > 1:
        raise ConfigError(f"head_groups must be 1 to be tuned, got {config.head_groups}")
    if config.projection is not None:
        raise ConfigError(f"projection must be left out to be tuned, got {config.projection}")
    if config.budget_tokens is not None and not isinstance(config.budget_tokens, int):
        raise ConfigError(
            f"budget_tokens must be one number or left out to be tuned, got {config.budget_tokens}"
        )
