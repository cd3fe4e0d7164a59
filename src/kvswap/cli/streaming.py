"""Generated text, given on as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens as it was generated: no special tokens, no blank tidied away."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """A streamer for ``generate``: every token's text is emitted at once.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    emit : callable
        Takes the next piece of text. All pieces together are what `decode` gives.

    Notes
    -----
    Text is decoded from the tokens since the last piece but one, since what a token looks like
    may depend on the one before. A character in parts is held back until it is whole.
    """

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._ids: list[int] = []
        self._first, self._shown = 0, 0  # of the window, and behind what was emitted
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt's tokens, which are not shown, then each new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        self._flush(is_last=False)

    def end(self) -> None:
        """Emit what is left."""
        self._flush(is_last=True)

    def _flush(self, *, is_last: bool) -> None:
        before = decode(self._tokenizer, self._ids[self._first : self._shown])
        text = decode(self._tokenizer, self._ids[self._first :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not is_last):
            return
        self._first, self._shown = self._shown, len(self._ids)
        self._emit(text[len(before) :])
