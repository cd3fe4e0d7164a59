"""Ask one question after the other about a document that a cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvswap.bench.answering import generate_after
from kvswap.bench.tasks import TaskQuestion


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What was said to a question.

    Attributes
    ----------
    text : str
        Without special tokens.
    num_tokens : int
        Generated ones, special ones included.
    generate_s : float
        Time of ``generate``, the question's own forward in it.
    """

    text: str
    num_tokens: int
    generate_s: float


class Asking:
    """A model, its tokenizer, and how both are used in an evaluation.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase

    Notes
    -----
    Documents and questions are plain text: no chat template is used, as for a base model. The
    tokenizer's opening token, if it sets one, stands before the document.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        generation = getattr(model, "generation_config", None)
        end = getattr(generation, "eos_token_id", None)
        self._end = tokenizer.eos_token_id if end is None else end
        pad = tokenizer.pad_token_id
        first_end = self._end[0] if isinstance(self._end, list) else self._end
        self._pad = first_end if pad is None else pad

    def document_ids(self, text: str) -> Tensor:
        """Return the tokens of a document [1, num_tokens], int64."""
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:  # the text goes on
            ids = ids[:-1]
        return torch.tensor([ids], dtype=torch.long)

    def question_ids(self, question: TaskQuestion) -> Tensor:
        """Return the tokens of a question's prompt [1, num_tokens], int64."""
        return self.text_ids(question.prompt)

    def text_ids(self, text: str) -> Tensor:
        """Return the tokens of a text [1, num_tokens], int64, without special ones."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)

    def ask(self, cache: Cache, document: Tensor, question: TaskQuestion) -> Output:
        """Answer greedily; the cache holds the document, and nothing else afterwards."""
        stops: dict[str, Any] = {"eos_token_id": self._end, "pad_token_id": self._pad}
        new = generate_after(
            self.model,
            cache,
            document,
            self.question_ids(question),
            max_new_tokens=question.max_tokens,
            num_beams=1,
            **stops,
        )
        text = self.tokenizer.decode(
            list(new.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Output(text=text, num_tokens=len(new.ids), generate_s=new.generate_s)
