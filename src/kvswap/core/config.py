"""What a user can set: frozen, validated, and written into every manifest and record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvswap.core.device_model import DeviceModel, as_device_model
from kvswap.core.errors import ConfigError
from kvswap.core.geometry import RECORD_CODECS
from kvswap.core.units import ceil_div, parse_bytes

CODES = ("bf16", "int8", "rot4", "rot2", "rot1", "band")
OWN_CODES = ("pq8", "raw")
"""Codes that single indexes have: numbers of centroids, and keys as they are."""

NO_INDEX = "none"
"""In place of an index's name: all groups are attended to, and none is estimated."""

_ESTIMATING = (
    "rank", "code", "projection", "budget_tokens", "selector", "deadline", "warm_window"
)  # fmt: skip

DIRECT_IO = ("auto", "on", "off")
LAYOUTS = ("sequential", "fitted")
REDUCTIONS = ("max", "mean", "mass")

GAP_BYTES = 8192
"""Gap that costs less to read than another request, as measured (docs/log.md)."""

MOST_GAP_BYTES = 2**18
"""No gap beyond this is read through: its bytes need memory to go to."""

_LEAST_RECENT, _MOST_RECENT = 32, 256  # tokens, by default

REUSE = 0.77
"""Share of a step's groups that the step before selected too, where nothing says it: KVSwap's paper
has 0.75 to 0.81."""

MOST_DIRECTORIES = 16
"""Drives of one store: each has an I/O backend, and a share of every layer's reads."""

Progress = Callable[[str, int, int], None]
"""Called as ``on_progress(stage, done, total)``; the total is 0 where it is not known."""


def usual_recent_tokens(selected_tokens: int) -> int:
    """Return the recent tokens of a selection of so many where no config says how many."""
    return max(_LEAST_RECENT, min(_MOST_RECENT, selected_tokens // 4))


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        known = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{name} must be one of {known}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """Where records lie and how they are moved.

    Parameters
    ----------
    directories : sequence of path
        Existing, writable directories, at most 16. With several, each is to be on a drive of
        its own, and groups are spread over all by their speed: that of ``device_model``, or else
        of the profile that `kvswap profile` saved in each; equally where one has none.
    keep : bool
        Save the store on close so that `KVSwapCache.open` can resume it. A store that is
        not kept is unlinked once open: nothing is left, whatever ends the process.
    disk_limit : int or str, optional
        Most bytes the store may take ("20GiB"), on all drives. Default: the free space.
    direct_io : {"auto", "on", "off"}
        O_DIRECT where the file system allows it; ``on`` makes its absence an error.
        Without it pages are dropped from the page cache after each transfer.
    num_threads : int
        Threads of the pread/pwrite backend, of which each drive has one.
    block_size_bytes : int
        The device's unit.
    device_model : DeviceModel, str or sequence of either, optional
        Be as slow as this device, or as the preset of that name: sdcard, emmc, nvme, ufs31
        or swarm; each drive by itself, or each as its own of a sequence, None for as fast as it
        is. For measurements.
    read_gap_bytes : int, optional
        Records with at most so many bytes between them are read in one request, gap
        included. Default: what breaks even on the device model, or as measured.
    replicas : int
        Drives that hold each group. Reads go to those that have the least to do, and are answered
        by the others where a drive fails; room and writes are as many times as much.
    layout : {"sequential", "fitted"}
        How groups lie: in the order of their tokens, or each layer's anew by what its steps have
        selected together, once there have been enough and where it is then read sooner. Layouts
        take up to twice the groups' own room beside it, five times where the cache is saved again
        and again in between; where there is none, groups stay where they are.
    """

    directories: Sequence[str | os.PathLike[str]]
    keep: bool = False
    disk_limit: int | str | None = None
    direct_io: str = "auto"
    num_threads: int = 4
    block_size_bytes: int = 4096
    device_model: DeviceModel | str | Sequence[DeviceModel | str | None] | None = None
    read_gap_bytes: int | None = None
    replicas: int = 1
    layout: str = "sequential"

    def __post_init__(self) -> None:
        if isinstance(self.directories, (str, os.PathLike)):
            raise ConfigError(
                f"directories must be a list of directories, got {str(self.directories)!r}"
            )
        try:
            paths = tuple(str(Path(path)) for path in self.directories)
        except TypeError as error:
            raise ConfigError(
                f"directories must be a list of directories, got {self.directories!r}"
            ) from error
        if not 1 <= len(paths) <= MOST_DIRECTORIES:
            raise ConfigError(
                f"directories must name 1 to {MOST_DIRECTORIES} directories, got {len(paths)}"
            )
        object.__setattr__(self, "directories", paths)
        if self.disk_limit is not None:
            limit = parse_bytes(self.disk_limit, field="disk_limit")
            object.__setattr__(self, "disk_limit", limit)
        _one_of("keep", self.keep, (True, False))
        _one_of("direct_io", self.direct_io, DIRECT_IO)
        _at_least("num_threads", self.num_threads, 1)
        _at_least("block_size_bytes", self.block_size_bytes, 512)
        object.__setattr__(self, "device_model", _models(self.device_model, len(paths)))
        if self.read_gap_bytes is not None:
            _at_least("read_gap_bytes", self.read_gap_bytes, 0)
        _one_of("layout", self.layout, LAYOUTS)
        _at_least("replicas", self.replicas, 1)
        if self.replicas > len(paths):
            raise ConfigError(
                f"replicas must be at most {len(paths)}, the number of directories,"
                f" got {self.replicas}"
            )

    @property
    def device_models(self) -> tuple[DeviceModel | None, ...]:
        """The device that each drive is as slow as, or None."""
        model = self.device_model
        if isinstance(model, tuple):
            return model
        assert model is None or isinstance(model, DeviceModel), "made of its name"
        return (model,) * len(self.directories)

    def gap_bytes(self, record_bytes: int) -> int:
        """Return the largest gap between records of that length that is read through.

        With several drives, what pays on each of them.
        """
        if self.read_gap_bytes is not None:
            return min(self.read_gap_bytes, MOST_GAP_BYTES)
        measured = GAP_BYTES if record_bytes <= GAP_BYTES else 0  # gaps are records themselves
        gaps = {
            measured if model is None else model.gap_bytes(record_bytes)
            for model in self.device_models
        }
        return min(*gaps, MOST_GAP_BYTES)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """One cache: its memory, its disk, and how groups are chosen.

    Only ``kv_memory`` and ``storage`` are needed. What is left at None is planned from the
    budget and the model by the rules in docs/concepts/architecture.md.

    Parameters
    ----------
    kv_memory : int or str
        Budget of all memory kept for the KV cache ("256MiB"): index, slots, rolling
        buffers, tables, staging and fitting workspace.
    storage : StorageConfig
        Where the cache lies.
    max_context : int, optional
        Longest context, in tokens, to plan for. Default: the model's positions.
    max_batch : int, optional
        Sequences to plan for. Default: those of the first forward.
    group_size : int, optional
        Tokens read as a unit; a power of two.
    budget_tokens : int, sequence of int, or path, optional
        Tokens selected a layer and step, sink and recent tokens included; one number for each
        layer on disk, or the file of such numbers that `kvswap budgets` makes of a model.
    num_slots : int, optional
        Groups each layer can hold in memory.
    head_groups : int
        Parts that each layer's KV heads are split into, of consecutive heads. Each has records,
        slots and an index of its own, and selects for itself; what else is stated a layer then
        holds for each of them. Must divide the model's KV heads.
    record_codec : {"raw", "int8", "rot4"}
        How records hold keys and values, on disk and in slots: as they are, or turned and in
        eight or four bits, which reads, writes and keeps half or a quarter of sixteen-bit ones.
    sink_tokens : int
        The first ones, always in the working set.
    recent_tokens : int, optional
        The newest ones, always in the working set too: what a model has said so far says how it
        goes on and where it ends. Default: a quarter of what a layer may select, from 32 to 256.
    index, selector : str
        Names in the registries of key indexes and selectors. An index may be followed by its
        rank and its code: "lowrank:64+rot4"; "none" attends to all groups in every step, as
        FlexGen does, and goes with nothing that says which. A selector may be followed by its
        parameter: "share:0.02" is that share of the context's groups, "topp:0.95" the least
        groups that reach that mass of attention; neither takes more than the budget.
    reduce : {"max", "mean", "mass"}
        From a score a query head to one a group: the best head's share of attention, where
        heads that attend to more groups than are selected have less say; the share of one
        averaged head; or the mean of the shares.
    correct_prediction : bool
        Let each layer's real query correct what was predicted for it: what was foreseen is
        read while the layer before computes, what was not is read when the query is known.
        False attends to the prediction itself, as KVSwap was published: no second scoring
        and no late reads, for models whose layers change the residual little.
    worth_reading : float, optional
        A group that was not selected in the step before, and so would have to be read, comes
        behind those that were unless it is expected to get this part of an even share among
        the selected groups: of some query head's attention, or of that which ``reduce`` names.
        0 selects what scores best, whatever it costs. Default: 0.5, or 0 for a selector that
        counts mass, with which no other goes.
    deadline : bool
        A layer asks for no more groups that are not in memory than can be read while others
        compute, as measured so far, the best first; what is in memory takes the place of the
        others. **Answers then depend on timing**, and on the machine.
    reuse : str
        Which groups leave memory first, a name in the registry of reuse policies: "lru",
        those unused for longest; "lfu", those used least often, or "lfu:64" with the number of
        selections in which a use comes to count half; "score", those that the index expected
        least of, with a half-life too; "sieve"; "swarm", those of the cluster that was activated
        least for its size, clusters being known with ``layout="fitted"``; "none", where every step
        reads all that it selects, as methods without reuse do. "lru" and "none" have no tables, the
        others take a few bytes for each group and layer. It decides what is read, never what is
        attended to.
    share_slots : bool
        Let slots move between layers, to where they are found to save most reads, as long as each
        keeps what one selection needs. It counts what each layer misses and costs a little for
        every selection; not with "sieve", "swarm" or "none".
    rank : int, optional
        Coefficients kept of a token's key, over all KV heads of a head group.
    code : {"bf16", "int8", "rot4", "rot2", "rot1", "band"}, optional
        How a coefficient is stored. Some indexes have a code of their own: "pq8", "raw".
    projection : path, optional
        A calibrated projection (`kvswap calibrate`), for one head group. Default: fitted to the
        prompt's keys.
    prefill_chunk : int
        Tokens a prefill forward handles at once.
    exact_append : bool
        Let forwards of several tokens after the prefill see the whole context.
    warm_window : int
        So many of a prefill's last queries say which groups are read before the first step
        asks for them; 0 for none. It costs their memory and a step's reads, which the first
        step needs a part of: worth it where nobody waits between prefill and first token. With
        ``layout="fitted"`` each counts as a step to go by.
    recall_every : int
        Every so many steps measure, on one layer, the attention mass of the selection;
        0 never.
    recall_floor : float
        Warn when that share falls below.
    on_progress : callable, optional
        ``on_progress(stage, done, total)`` in tokens ("prefill") or layers ("index").
    """

    kv_memory: int | str
    storage: StorageConfig
    max_context: int | None = None
    max_batch: int | None = None
    group_size: int | None = None
    budget_tokens: int | Sequence[int] | str | os.PathLike[str] | None = None
    num_slots: int | None = None
    head_groups: int = 1
    record_codec: str = "raw"
    sink_tokens: int = 4
    recent_tokens: int | None = None
    index: str = "lowrank"
    selector: str = "topk"
    reduce: str = "max"
    correct_prediction: bool = True
    worth_reading: float | None = None
    deadline: bool = False
    reuse: str = "lru"
    share_slots: bool = False
    rank: int | None = None
    code: str | None = None
    projection: str | os.PathLike[str] | None = None
    prefill_chunk: int = 1024
    exact_append: bool = False
    warm_window: int = 0
    recall_every: int = 0
    recall_floor: float = 0.8
    on_progress: Progress | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._read_index()
        object.__setattr__(self, "kv_memory", parse_bytes(self.kv_memory, field="kv_memory"))
        if not isinstance(self.storage, StorageConfig):
            raise ConfigError(f"storage must be a StorageConfig, got {self.storage!r}")
        for name in (
            "max_context",
            "max_batch",
            "group_size",
            "num_slots",
            "rank",
        ):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        object.__setattr__(self, "budget_tokens", _budget(self.budget_tokens))
        for name in ("sink_tokens", "recall_every", "warm_window"):
            _at_least(name, getattr(self, name), 0)
        if self.recent_tokens is not None:
            _at_least("recent_tokens", self.recent_tokens, 0)
        _at_least("prefill_chunk", self.prefill_chunk, 1)
        _at_least("head_groups", self.head_groups, 1)
        _one_of("correct_prediction", self.correct_prediction, (True, False))
        _one_of("deadline", self.deadline, (True, False))
        _one_of("share_slots", self.share_slots, (True, False))
        _one_of("exact_append", self.exact_append, (True, False))
        size = self.group_size
        if size is not None and (size > 256 or size & (size - 1)):
            raise ConfigError(f"group_size must be a power of two in [1, 256], got {size}")
        if self.code is not None:
            _one_of("code", self.code, (*CODES, *OWN_CODES))
        _one_of("record_codec", self.record_codec, tuple(RECORD_CODECS))
        self._check_what_is_chosen()
        if self.projection is not None:
            if self.head_groups > 1:
                raise ConfigError(
                    "projection must be left out with several head_groups, as it joins all KV"
                    f" heads, got {str(self.projection)!r} with head_groups={self.head_groups}"
                )
            object.__setattr__(self, "projection", str(self.projection))

    def _read_index(self) -> None:
        """Take rank and code out of an index that is followed by them."""
        if not isinstance(self.index, str):
            return
        form = re.fullmatch(r"(\w+)(?::(\d+))?(?:\+(\w+))?", self.index)
        if form is None:
            raise ConfigError(
                f"index must be a name, or as in 'lowrank:64+rot4' with rank and code,"
                f" got {self.index!r}"
            )
        name, rank, code = form.groups()
        named = {"rank": None if rank is None else int(rank), "code": code}
        for field_name, value in named.items():
            if value is None:
                continue
            if getattr(self, field_name) not in (None, value):
                raise ConfigError(
                    f"{field_name} must be the index's ({self.index}), got"
                    f" {getattr(self, field_name)!r}"
                )
            object.__setattr__(self, field_name, value)
        object.__setattr__(self, "index", name)

    def _check_what_is_chosen(self) -> None:
        _share("recall_floor", self.recall_floor)
        if self.worth_reading is not None:
            _share("worth_reading", self.worth_reading)
        _one_of("reduce", self.reduce, REDUCTIONS)
        for name in ("index", "selector", "reuse"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a name, got {getattr(self, name)!r}")
        if self.on_progress is not None and not callable(self.on_progress):
            raise ConfigError(f"on_progress must be callable, got {self.on_progress!r}")

        self._check_no_index()

    def _check_no_index(self) -> None:
        if self.estimates:
            return
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _ESTIMATING and value != each.default:
                raise ConfigError(
                    f"{each.name} must be left out with index={NO_INDEX!r}, with which every step"
                    f" attends to all groups, got {value!r}"
                )

    @property
    def estimates(self) -> bool:
        """Whether a key index says what is attended to, where memory does not hold everything."""
        return self.index != NO_INDEX

    @property
    def kv_memory_bytes(self) -> int:
        """The budget in bytes."""
        return int(self.kv_memory)

    def recent_tokens_of(self, selected_tokens: int = 0) -> int:
        """Return the recent tokens of a selection of so many; by default the fewest of any."""
        if self.recent_tokens is None:
            return usual_recent_tokens(selected_tokens)
        return self.recent_tokens

    def pinned_groups(self, group_size: int, selected: int = 0) -> tuple[int, int]:
        """Return how many groups are always selected: of sinks and of recent tokens.

        Parameters
        ----------
        group_size : int
        selected : int
            Groups that a layer selects in all. Default: as few as there can be.
        """
        recent = self.recent_tokens_of(selected * group_size)
        return ceil_div(self.sink_tokens, group_size), ceil_div(recent, group_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; the progress callback is left out."""
        named = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        named.pop("on_progress")
        return named

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> CacheConfig:
        """Rebuild a config from `to_dict`."""
        rest = dict(named)
        try:
            storage = StorageConfig(**rest.pop("storage"))
            return cls(storage=storage, **rest)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"config has unknown or missing fields: {error}") from error


def _models(value: Any, num_drives: int) -> DeviceModel | tuple[DeviceModel | None, ...] | None:
    """Return the device that all drives are as slow as, or that of each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return as_device_model(value)
    if len(value) != num_drives:
        raise ConfigError(
            f"device_model must be one, or one for each of {num_drives} directories,"
            f" got {len(value)}"
        )
    return tuple(as_device_model(each) for each in value)


def _budget(value: Any) -> int | tuple[int, ...] | str | None:
    """Return tokens to select: one number, one for each layer, or a file's path."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, Sequence) and value:
        for number in value:
            _at_least("budget_tokens", number, 1)
        return tuple(value)
    if value is None:
        return None
    _at_least("budget_tokens", value, 1)
    return int(value)


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number in [0, 1], got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, (StorageConfig, DeviceModel)):
        return value.to_dict()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
