"""Cells of readers whose answers are no longer there, from the records that were made of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tables import Cell

from kvswap.core.errors import ConfigError

ALIKE = ("context", "dtype", "seed", "samples", "questions")
"""What a record must have been asked with as the run was, beside its tasks."""

FIELDS = ("metric", "commit", "date", "settings")


class Earlier:
    """Earlier records of readers.

    Parameters
    ----------
    path : Path
        File of records.
    readers : sequence of str
        Names.
    args : Namespace
        Of the run that they are to stand beside.

    Raises
    ------
    ConfigError
        If the file has no record of a reader.
    """

    def __init__(self, path: Path, readers: Sequence[str], args: argparse.Namespace) -> None:
        self._path, self._readers = path, readers
        self._alike = {name: vars(args)[name] for name in ALIKE}
        lines = path.read_text(encoding="utf-8").splitlines() if readers and path.exists() else []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._records = [record for record in found if "cells" in record["extra"]]
        for reader in readers:
            if not any(reader in _asked(record) for record in self._records):
                raise ConfigError(f"earlier must be readers with records in {path}, got {reader!r}")

    def of(self, metric: str, tasks: Collection[str]) -> tuple[list[Cell], list[dict[str, Any]]]:
        """Return the cells of all readers, and from which records they are.

        Raises
        ------
        ConfigError
            If a reader has no record of the metric with these tasks, asked as the run was.
        """
        cells: list[Cell] = []
        sources = []
        for reader in self._readers:
            record = self._newest(metric, reader, set(tasks))
            cells += _cells(record, reader)
            known = record | {"settings": record["extra"]["settings"]}
            sources.append({"reader": reader} | {name: known[name] for name in FIELDS})
        return cells, sources

    def _newest(self, metric: str, reader: str, tasks: set[str]) -> dict[str, Any]:
        """Return the newest record that was made of a reader's own answers."""
        for record in reversed(self._records):
            if record["metric"] != metric or reader not in _asked(record):
                continue
            same = {name: record["config"].get(name) for name in ALIKE} == self._alike
            if same and {cell.task for cell in _cells(record, reader)} == tasks:
                return record
        alike = ", ".join(f"{name} {value}" for name, value in self._alike.items())
        raise ConfigError(
            f"{self._path.name} has no {metric} of {reader} with the same tasks, {alike}"
        )


def _asked(record: dict[str, Any]) -> set[str]:
    """Return the readers that were asked for a record, those from earlier ones left out."""
    taken = {source["reader"] for source in record["extra"].get("earlier", ())}
    return set(record["config"]["reader"]) - taken


def _cells(record: dict[str, Any], reader: str) -> list[Cell]:
    return [Cell(**each) for each in record["extra"]["cells"] if each["reader"] == reader]
