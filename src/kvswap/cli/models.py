"""Models and tokenizers from a directory or the Hub, and why one cannot be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvswap.core.errors import ConfigError, KVSwapError

_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is: a directory, or a name on the Hub.

    Raises
    ------
    ConfigError
        If it can be neither.
    """

    name: str

    def __post_init__(self) -> None:
        path = Path(self.name)
        if self.is_directory:
            if not (path / "config.json").is_file():
                raise ConfigError(
                    f"model must be a model's directory, got {self.name}: no config.json"
                )
        elif path.exists() or not _HUB_NAME.fullmatch(self.name):
            raise ConfigError(
                f"model must be an existing directory or a name on the Hub, got {self.name!r}"
            )

    @property
    def is_directory(self) -> bool:
        """Whether it is here and need not be fetched."""
        return Path(self.name).is_dir()

    @property
    def _where(self) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": self.name,
            "local_files_only": self.is_directory,
            "trust_remote_code": False,
        }

    def load_config(self) -> Any:
        """Return the model's config, without its weights."""
        with self._explained("config"):
            return AutoConfig.from_pretrained(**self._where)

    def find_dtype(self, config: Any) -> str:
        """Return what the weights are in, as torch names it, without reading them.

        Raises
        ------
        ConfigError
            If neither the config nor a checkpoint here says.
        """
        named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if named is not None:
            return str(named).removeprefix("torch.")
        for path in sorted(Path(self.name).glob("*.safetensors")) if self.is_directory else ():
            with self._explained("weights"), safe_open(path, framework="pt") as file:
                found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            for dtype, name in _STORED.items():
                if dtype in found:
                    return name
        raise ConfigError(f"dtype must be given for a model that names none, got {self.name}")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        with self._explained("tokenizer"):
            return AutoTokenizer.from_pretrained(**self._where)

    def load_model(self, dtype: str = "auto") -> PreTrainedModel:
        """Return the model.

        Parameters
        ----------
        dtype : str
            Of the weights, as torch names it; "auto" is that of the checkpoint.

        Raises
        ------
        ConfigError
            If it cannot be read, or the checkpoint lacks some of its weights.
        """
        with self._explained("model"):
            model, found = AutoModelForCausalLM.from_pretrained(
                **self._where, dtype=dtype, output_loading_info=True
            )
        missing = sorted(found["missing_keys"])
        if missing:
            raise ConfigError(
                f"model must have all its weights, got {self.name}: {len(missing)} are missing,"
                f" such as {missing[0]}"
            )
        model.generation_config.cache_implementation = None  # we bring our own
        return model

    @contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        """Turn what the libraries raise, which may be anything, into a `ConfigError`."""
        try:
            yield
        except (KVSwapError, MemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"{part} cannot be read from {self.name}: {_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """Return the first line that says something; the rest is mostly advice."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, LookupError):
        return repr(error)
    return " ".join(lines) if lines[0].endswith(":") else lines[0]
