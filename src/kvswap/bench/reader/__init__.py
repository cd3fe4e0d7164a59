"""A small language model trained by this project, and documents with questions that it can answer.

`load_reader` gives an ordinary transformers model and tokenizer from `READER_DIRECTORY`; nothing is
downloaded. `make_document` gives a text of any length with questions whose answers are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvswap.bench.reader.documents import (
    KINDS,
    Document,
    Fact,
    Question,
    is_right,
    make_document,
    share_of_facts_right,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "KINDS",
    "READER_DIRECTORY",
    "Document",
    "Fact",
    "Question",
    "is_right",
    "load_reader",
    "make_document",
    "share_of_facts_right",
]

READER_DIRECTORY = Path(__file__).parent / "weights"
"""An ordinary Hugging Face directory: configuration, weights and tokenizer."""


def load_reader(
    dtype: torch.dtype | None = None,
    *,
    directory: str | Path = READER_DIRECTORY,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the reader that ships with the package.

    Parameters
    ----------
    dtype
        Of the weights; float32 by default. bfloat16 gives the same answers.
    directory
        Another reader's folder, as `benchmarks/train_reader.py` writes it.
    attn_implementation
        Name of an attention function of transformers.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode, on the CPU.
    tokenizer : PreTrainedTokenizerBase
        One token for each word; words are separated by blanks and nothing is added to them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32 if dtype is None else dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
    )
    return model.train(mode=False), AutoTokenizer.from_pretrained(directory, local_files_only=True)
