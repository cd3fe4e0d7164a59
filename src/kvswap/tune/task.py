"""What is to be tuned, and how: checked as far as that needs no run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from kvswap.core.checks import check_positive
from kvswap.core.config import CacheConfig
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.hf.attach import context_limit
from kvswap.hf.geometry import fingerprint, read_shape
from kvswap.kernels.accelerator import accelerator_of
from kvswap.storage.directory import check_directory
from kvswap.storage.facts import device_facts
from kvswap.tune.sample import QUERIES
from kvswap.tune.space import SettingSpace

_clock = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """How to tune.

    Parameters
    ----------
    indexes : sequence of str
        Key indexes to try, each as `CacheConfig.index` takes it; one without rank or code with a
        few of its own. Default: the config's.
    record_codecs : sequence of str
        Forms of records to try. ``rot4`` costs answers, which recall does not show: it is
        tried only where it is named.
    recall_floor : float, optional
        Least share of the sample's attention that what is chosen must reach. Default: what the
        planner's rules reach with this memory.
    minutes : float
        How long it may take, about; the rehearsal of the rules' own setting is held at any rate.
    """

    indexes: Sequence[str] = ()
    record_codecs: Sequence[str] = ("raw", "int8")
    recall_floor: float | None = None
    minutes: float = 8.0

    def __post_init__(self) -> None:
        check_positive("minutes", self.minutes)
        floor = self.recall_floor
        if floor is not None and not (isinstance(floor, (int, float)) and 0 < floor <= 1):
            raise ConfigError(f"recall_floor must be a number in (0, 1], got {floor!r}")


class TuningTask:
    """A model, a text and a budget, with all settings that fit.

    Parameters
    ----------
    model, ids, config, options, profile
        See `kvswap.tune.tuning.tune_cache`.

    Attributes
    ----------
    shape : ModelShape
    context, rows : int
        Tokens of a sequence, and sequences.
    space : SettingSpace
    settings : list of Setting
        That of the rules is the first.
    fingerprint : str
        Of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        config: CacheConfig,
        options: TuningOptions,
        profile: DeviceProfile | None,
    ) -> None:
        self.model, self.options, self.profile = model, options, profile
        self.shape = read_shape(model)
        self.context, self.rows = context_limit(self.shape, config), config.max_batch or 1
        self.config = replace(config, max_context=self.context, max_batch=self.rows)
        self.ids = ids[:, : self.context]
        if len(config.storage.directories) > 1:
            raise ConfigError(
                "directories must name one directory where settings are tuned, got"
                f" {len(config.storage.directories)}"
            )
        self.directory = check_directory(config.storage.directories[0])
        self.on_device = accelerator_of(model.device) is not None
        self.space = SettingSpace(
            self.shape.geometry,
            self.config,
            context=self.context,
            batch_size=self.rows,
            indexes=options.indexes,
            record_codecs=["raw"] if self.on_device else options.record_codecs,
            on_device=self.on_device,
        )
        self.settings = self.space.settings()
        self._check_text()
        self.fingerprint = fingerprint(model)
        self._begin_s = _clock()

    def _check_text(self) -> None:
        largest = max(setting.group_size for setting in self.settings)
        least = self.space.usual_tokens + QUERIES + 2 * largest
        if self.ids.shape[1] <= least:
            raise ConfigError(
                f"text must be longer than {least} tokens to have groups to choose from,"
                f" got {self.ids.shape[1]}"
            )

    @property
    def key(self) -> str:
        """Stands for everything that findings depend on."""
        named = {
            "fingerprint": self.fingerprint,
            "device": str(self.model.device),
            "text": hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest(),
            "config": self.config.to_dict(),
            "settings": [setting.label for setting in self.settings],
            "disk": device_facts(self.directory).identity,
        }
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    @property
    def spent_s(self) -> float:
        """Seconds since it was begun."""
        return _clock() - self._begin_s

    @property
    def limit_s(self) -> float:
        """Seconds that it may take."""
        return 60 * self.options.minutes

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report progress to whom it was asked for by."""
        if self.config.on_progress is not None:
            self.config.on_progress(stage, done, total)
