"""The file of a run: an object a line, every answer kept, to be gone on with after an interruption.

The first line is what was asked of which model, with its fingerprint. A ``method`` line says how a
method is set, before its first answer. A ``sample`` line is an answer. A ``reading`` line ends what
a method had to say about a document, and says what that took.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from kvswap.core.errors import ConfigError

FORMAT = 1
_OPENING = b'{"line": "settings"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer.

    Attributes
    ----------
    task, method : str
    document, question : int
        Numbers from 0.
    seed : int
        What the document was made from.
    output, gold : str
    score : float
        0 to 1.
    tokens : int
        Generated ones.
    time_s : float
        Of ``generate``, the question's own forward in it.
    bytes_read, tokens_read : int
        Bytes read from disk for the question and the answer, and how many tokens these are.
    recall : tuple of (int, float)
        Layer and share of the true attention that the selection covered, where sampled.
    """

    task: str
    document: int
    seed: int
    question: int
    method: str
    output: str
    gold: str
    score: float
    tokens: int
    time_s: float
    bytes_read: int = 0
    tokens_read: int = 0
    recall: tuple[tuple[int, float], ...] = ()

    @property
    def place(self) -> tuple[str, int, int]:
        """Which question this is, whoever answers."""
        return self.task, self.document, self.question


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a method took for a document and all its questions.

    Attributes
    ----------
    task, method : str
    document : int
    document_tokens, questions : int
    full_kv_bytes : int
        Keys and values of the document.
    memory_parts : dict of str to int
        Bytes that the method kept in memory, by part.
    """

    task: str
    document: int
    method: str
    document_tokens: int
    questions: int
    full_kv_bytes: int
    memory_parts: dict[str, int] = field(default_factory=dict)


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class Results:
    """A results file, read as far as it goes and then appended to.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    settings : mapping
        What is asked, of which model; JSON.

    Raises
    ------
    ConfigError
        If the file is of other settings, or of something else.

    Notes
    -----
    Each line is written at once and flushed. A last line that was cut off is left out and
    written again. A context manager.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.methods: dict[str, dict[str, Any]] = {}
        self.samples: dict[tuple[str, int, int, str], Sample] = {}
        self.readings: dict[tuple[str, int, str], Reading] = {}
        whole = self._read() if path.exists() else 0
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(f"output cannot be written: {path}: {error.strerror}") from error
        self._file.truncate(whole)
        if not whole:
            digest = fingerprint_of(self.settings)
            self._write("settings", format=FORMAT, fingerprint=digest, settings=self.settings)

    def name_of(self, description: Mapping[str, Any]) -> str | None:
        """Return by which name a method that is set so has answered, or None."""
        described = json.loads(json.dumps(description))
        answered = (name for *_, name in self.samples)
        return next((name for name in answered if self.methods[name] == described), None)

    def begin(self, method: str, description: Mapping[str, Any]) -> None:
        """Note how a method is set.

        Raises
        ------
        ConfigError
            If the file has answers of the same method set otherwise.
        """
        described = json.loads(json.dumps(description))
        known = self.methods.get(method)
        if known == described:
            return
        if known is not None and any(name == method for *_, name in self.samples):
            self._check_same(f"method {method}", known, described)
        self.methods[method] = described
        self._write("method", method=method, settings=described)

    def add(self, sample: Sample) -> None:
        """Append an answer, unless it is there."""
        if (*sample.place, sample.method) not in self.samples:
            self.samples[(*sample.place, sample.method)] = sample
            self._write("sample", **asdict(sample))

    def end(self, reading: Reading) -> None:
        """Append that a document is done with."""
        self.readings[reading.task, reading.document, reading.method] = reading
        self._write("reading", **asdict(reading))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: str, **named: Any) -> None:
        self._file.write(json.dumps({"line": line, **named}).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Take in what is there; return its length up to the end of the last whole line."""
        whole = 0
        for number, raw in enumerate(self._lines(), 1):
            if not raw.endswith(b"\n") and (number > 1 or raw.startswith(_OPENING)):
                break  # cut off
            try:
                self._take(number, json.loads(raw))
            except (ValueError, TypeError, LookupError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    f"output must be a file of an evaluation, got {self.path}: line {number} is"
                    " none of its lines"
                ) from error
            whole += len(raw)
        return whole

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except OSError as error:
            raise ConfigError(f"output cannot be read: {self.path}: {error.strerror}") from error

    def _take(self, number: int, named: dict[str, Any]) -> None:
        line = named.pop("line")
        if (number == 1) != (line == "settings"):
            raise ValueError(line)
        if line == "settings":
            if named["format"] != FORMAT:
                raise ConfigError(f"output must be of format {FORMAT}, got {named['format']}")
            self._check_same("run", named["settings"], self.settings)
        elif line == "method":
            self.methods[named["method"]] = named["settings"]
        elif line == "sample":
            recall = tuple((int(layer_idx), share) for layer_idx, share in named.pop("recall"))
            sample = Sample(**named, recall=recall)
            self.samples[(*sample.place, sample.method)] = sample
        elif line == "reading":
            reading = Reading(**named)
            self.readings[reading.task, reading.document, reading.method] = reading
        else:
            raise ValueError(line)

    def _check_same(self, what: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        for name in sorted(known.keys() | given.keys()):
            if known.get(name) != given.get(name):
                raise ConfigError(
                    f"output must be of the same {what}, got {self.path}: its {name} is"
                    f" {known.get(name)!r}, not {given.get(name)!r}: name another file"
                )
