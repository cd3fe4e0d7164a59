"""Settings of a cache that were tuned for a model and a device, in a file with their evidence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from kvswap.core.checks import check_positive, check_text, check_whole
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.device_facts import DeviceFacts
from kvswap.core.errors import ConfigError
from kvswap.core.frontier import frontier
from kvswap.core.saved_form import SavedForm

_FORM = SavedForm("kvswap-plan", 1, "plan", "kvswap tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedTrial:
    """One setting that was weighed.

    Attributes
    ----------
    settings : dict of str to object
        Fields of `CacheConfig`, ``kv_memory`` in bytes among them.
    recall : float
        Share of the sample's attention that a step attends to.
    predicted_tokens_per_s : float or None
        By the cost model; None where there was none to ask.
    samples : tuple of float
        Tokens a second of each rehearsal; none where it was not rehearsed.
    """

    settings: dict[str, Any]
    recall: float
    predicted_tokens_per_s: float | None = None
    samples: tuple[float, ...] = ()

    @property
    def is_rehearsed(self) -> bool:
        """Whether a short real run says how fast it is."""
        return bool(self.samples)

    @property
    def tokens_per_s(self) -> float | None:
        """The median of what was rehearsed, or else what is predicted."""
        return median(self.samples) if self.samples else self.predicted_tokens_per_s

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> TunedTrial:
        """Rebuild from its fields as JSON has them."""
        return cls(**(named | {"samples": tuple(named["samples"])}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPlan:
    """What `kvswap tune` found; `kvswap.attach` takes it, or its file.

    Parameters
    ----------
    settings : dict of str to object
        Fields of `CacheConfig` that were chosen, ``kv_memory`` in bytes among them.
    max_context, max_batch : int
        Tokens of a sequence, and sequences, that it was tuned for.
    directory : str
        Where the cache lay, and lies unless another directory is named.
    model_class, fingerprint : str
        Of the model.
    geometry : dict of str to object
        Of its cache.
    device : DeviceFacts
        Of the directory's device.
    recall, recall_floor : float
        What the settings reach on the sample, and what they had to.
    tokens_per_s : float
        As rehearsed.
    sample_tokens : int
        Of the text that recall was measured on.
    sample_layers : sequence of int
        Layers on disk that it was measured in.
    trials : sequence of TunedTrial
        All settings weighed.
    date : str
        When it was made.
    """

    settings: dict[str, Any]
    max_context: int
    max_batch: int
    directory: str
    model_class: str
    fingerprint: str
    geometry: dict[str, Any]
    device: DeviceFacts
    recall: float
    recall_floor: float
    tokens_per_s: float
    sample_tokens: int
    sample_layers: Sequence[int]
    trials: Sequence[TunedTrial] = ()
    date: str

    def __post_init__(self) -> None:
        for name in ("directory", "model_class", "fingerprint", "date"):
            check_text(name, getattr(self, name))
        for name in ("max_context", "max_batch", "sample_tokens"):
            check_whole(name, getattr(self, name), least=1)
        check_positive("tokens_per_s", self.tokens_per_s)
        object.__setattr__(self, "sample_layers", tuple(self.sample_layers))
        object.__setattr__(self, "trials", tuple(self.trials))
        self.cache_config()  # its settings are such as a config has

    def cache_config(self, **changes: Any) -> CacheConfig:
        """Return the settings as a config.

        Parameters
        ----------
        **changes
            Fields that take the place of the plan's.

        Raises
        ------
        ConfigError
            If a setting cannot be used.
        """
        named: dict[str, Any] = {"max_context": self.max_context, "max_batch": self.max_batch}
        named |= self.settings | changes
        if "storage" not in named:
            named["storage"] = StorageConfig(directories=[self.directory])
        try:
            return CacheConfig(**named)
        except TypeError as error:
            raise ConfigError(f"settings are unknown or missing: {error}") from error

    @property
    def chosen(self) -> TunedTrial:
        """The trial whose settings were chosen."""
        own = self.settings.items()
        held = [trial for trial in self.trials if trial.settings.items() <= own]
        return max(held, key=lambda trial: len(trial.settings))

    @property
    def frontier(self) -> list[TunedTrial]:
        """The trials that no other surpasses in recall and speed, the fastest first."""
        known = [trial for trial in self.trials if trial.tokens_per_s is not None]
        return frontier(known, speed=lambda each: each.tokens_per_s or 0.0)

    def check(self, fingerprint: str) -> None:
        """Raise `ConfigError` unless it was tuned for the model of this fingerprint."""
        if self.fingerprint != fingerprint:
            raise ConfigError(
                f"plan must be one that was tuned for this model, got that of another"
                f" {self.model_class}"
            )

    # -- its file -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        named |= {"device": self.device.to_dict(), "sample_layers": list(self.sample_layers)}
        named["trials"] = [asdict(trial) | {"samples": [*trial.samples]} for trial in self.trials]
        return _FORM.marked(named)

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> TunedPlan:
        """Rebuild a plan from `to_dict`.

        Raises
        ------
        ConfigError
            If it is something else, of another version, or a field is none that it can be.
        """
        rest = _FORM.unmarked(named)
        try:
            rest["device"] = DeviceFacts.from_dict(rest["device"])
            rest["trials"] = [TunedTrial.from_dict(each) for each in rest["trials"]]
            return cls(**rest)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"fields are unknown or missing: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, by way of a temporary one beside it.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        _FORM.save(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TunedPlan:
        """Read the file.

        Raises
        ------
        ConfigError
            If it cannot be read, is no such file, or is damaged.
        """
        return _FORM.load(path, cls.from_dict)
