"""A model's directory, a text, a directory for the cache, and the command in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvswap.cli import main
from tests.cli.tiny import save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can go on long enough to be interrupted."""
    path = tmp_path_factory.mktemp("models") / "long"
    return save_model(path, max_position_embeddings=200_000)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The river was high that year. " * 20, encoding="utf-8")
    return path


@pytest.fixture
def kv_dir(tmp_path: Path) -> Path:
    path = tmp_path / "kv"
    path.mkdir()
    return path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def kvswap(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(warnings, "showwarning", warnings.showwarning)
            code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def run_options(model_dir: Path, text_file: Path, kv_dir: Path) -> dict[str, Any]:
    """What ``kvswap run`` needs, to be changed by a test and made flat by `words`."""
    return {
        "--model": model_dir,
        "--file": text_file,
        "--prompt": "How was the river?",
        "--kv-memory": "1MiB",
        "--kv-dir": kv_dir,
        "--max-new-tokens": 8,
    }
