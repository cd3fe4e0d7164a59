"""Budgets by layer, made beforehand: a JSON file that says whose they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvswap.core.errors import ConfigError
from kvswap.core.files import whole_file

_FORMAT, _VERSION = "kvswap-budgets", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBudgets:
    """How many tokens each layer on disk selects.

    Attributes
    ----------
    budget_tokens : tuple of int
        By layer; sink and recent tokens included.
    recall, even_recall : tuple of float
        By layer: the share of true attention that so many tokens covered where it was
        measured, and that as many for every layer did.
    group_size : int
        Tokens selected as a unit in that measurement.
    dtype : str
        Of the model's keys.
    fingerprint : str
        Of the model.
    """

    budget_tokens: tuple[int, ...]
    recall: tuple[float, ...]
    even_recall: tuple[float, ...]
    group_size: int
    dtype: str
    fingerprint: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, by way of a temporary one beside it."""
        named = {"format": _FORMAT, "version": _VERSION} | asdict(self)
        named["num_layers"] = len(self.budget_tokens)
        with whole_file(path, "budgets") as file:
            file.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerBudgets:
        """Read the file.

        Raises
        ------
        ConfigError
            If it cannot be read or is no such file.
        """
        try:
            named = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"budget_tokens cannot be read: {path}: {error}") from error
        if not _is_ours(named):
            raise ConfigError(f"budget_tokens must be a file made by `kvswap budgets`, got {path}")
        return cls(
            budget_tokens=tuple(named["budget_tokens"]),
            recall=tuple(named["recall"]),
            even_recall=tuple(named["even_recall"]),
            group_size=named["group_size"],
            dtype=named["dtype"],
            fingerprint=named["fingerprint"],
        )

    def check(self, *, num_layers: int, dtype: str, fingerprint: str) -> None:
        """Raise `ConfigError` unless they are those of a model of this kind, and of this one."""
        if len(self.budget_tokens) != num_layers:
            raise ConfigError(
                f"budget_tokens must be those of {num_layers} layers for this model, got a file of"
                f" {len(self.budget_tokens)}"
            )
        if self.dtype != dtype:
            raise ConfigError(
                f"budget_tokens must be those of a model in {dtype}, got a file of one in"
                f" {self.dtype}"
            )
        if self.fingerprint != fingerprint:
            raise ConfigError("budget_tokens were made for another model")


def _is_ours(named: Any) -> bool:
    if not isinstance(named, dict) or named.get("format") != _FORMAT:
        return False
    lists = [named.get(name) for name in ("budget_tokens", "recall", "even_recall")]
    if not all(isinstance(each, list) and len(each) == named.get("num_layers") for each in lists):
        return False
    whole = all(isinstance(each, int) for each in (*lists[0], named.get("group_size")))  # type: ignore[misc]
    plain = all(isinstance(named.get(name), str) for name in ("dtype", "fingerprint"))
    return whole and plain and named.get("version") == _VERSION
