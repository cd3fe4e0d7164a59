"""What stands in for what a document names, so that its blocks run anywhere in a second.

This is the whole list. Blocks are otherwise run as they are printed, in a folder of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.tiny import save_model

MODEL = "Qwen/Qwen3-0.6B"
"""The model that documents name. Its place takes a random one of the same family and positions,
with four layers and a tokenizer of bytes; nothing is fetched."""

REPLACED = {
    # A budget below the tiny model's full cache, so that selection and reads are exercised.
    'kv_memory="256MiB"': 'kv_memory="16MiB"',
    'kv_memory="512MiB"': 'kv_memory="24MiB"',
    "TuningOptions(minutes=5)": (
        'TuningOptions(minutes=0.001, indexes=["lowrank:16+rot4"], record_codecs=["raw"])'
    ),
    'profile_device("kv")': 'profile_device("kv", seconds=1, file_bytes="16MiB")',
}
"""Text of Python blocks, besides the model's name."""

OPTIONS = {
    "--context": "2048",
    "--kv-memory": "16MiB",
    "--max-new-tokens": "4",
    "--minutes": "0.001",
    "--questions": "2",
    "--samples": "2",
    "--seconds": "1",
    "--size": "16MiB",
    "--tasks": "niah_single_1",
}
"""Values of the command's options."""

SIZES = {
    "demo": ("--context", "--kv-memory", "--questions"),
    "eval": ("--samples",),
    "plan": ("--context", "--kv-memory"),
    "profile": ("--seconds", "--size"),
    "tune": ("--minutes",),
}
"""Options that a command gets even where a document names none."""

FLAGS = {
    "plan": ("--force",),
    "tune": ("--force", "--index", "lowrank:16+rot4", "--record-codecs", "raw"),
}
"""What a command is told besides: the folder of a test may lie anywhere."""

BOOK = "It was a wet spring, and the old bridge did not stand for long. " * 16
"""Text of ``book.txt``: more tokens than one step selects."""


def make_folder(path: Path) -> None:
    """Make what the documents tell their readers to have: a text and a directory on a disk."""
    path.mkdir()
    (path / "book.txt").write_text(BOOK, encoding="utf-8")
    (path / "kv").mkdir()


def make_model(path: Path) -> Path:
    """Save the model that stands in for `MODEL`."""
    sizes = {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 40960}
    settings = save_model(path, "qwen3", **sizes) / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}  # as Qwen's own
    known = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(known | names), encoding="utf-8")
    return path


def python(source: str, model: Path) -> str:
    """Return a Python block as it is run."""
    for text, instead in {MODEL: str(model), **REPLACED}.items():
        source = source.replace(text, instead)
    return source


def command(words: list[str], model: Path) -> list[str]:
    """Return the arguments of ``kvswap`` as they are run."""
    words = [str(model) if word == MODEL else word for word in words]
    for option in SIZES.get(words[0], ()):
        if option not in words:
            words += [option, ""]
    words += FLAGS.get(words[0], ())
    return [
        OPTIONS.get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)
    ]
