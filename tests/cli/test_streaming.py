"""The law of streaming: all pieces together are the text, and no character comes in parts."""

from __future__ import annotations

import pytest
import torch

from kvswap.cli.streaming import TextStream, decode
from tests.cli.tiny import make_tokenizer

TEXTS = ["plain words , and blanks .", "é ü 中文 🙂", "", " ", "\n\na\n", "🙂" * 5]


def stream(ids: list[int]) -> list[str]:
    pieces: list[str] = []
    streamer = TextStream(make_tokenizer(), pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_the_text(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = stream([*ids, tokenizer.eos_token_id])
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) == len(text)


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_make_what_decoding_them_at_once_makes(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 259, (60,), generator=generator).tolist()
    assert "".join(stream(ids)) == decode(make_tokenizer(), ids)
