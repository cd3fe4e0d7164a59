"""Ask a model questions about a document that it has read once, and time its answers.

The document is read exactly, in chunks. Each question is asked right after it, on its own:
greedy, unmodified ``generate`` gets document and question, of which the cache already holds the
document; afterwards the cache is cropped back to the document. With a `KVSwapCache` the exact
part ends with the document, so that the question too is answered from disk by selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvswap.bench.answering import generate_after
from kvswap.bench.reader import Document, Question, is_right
from kvswap.core.config import CacheConfig, Progress
from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import read_shape

DISK, MEMORY = "disk", "memory"
"""Names of the two readings that `compare` makes."""

ModelLoader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model generated for one question.

    Attributes
    ----------
    question : Question
    words : tuple of str
        One a token, the end-of-sequence token included where it was generated.
    generate_s : float
        Time of ``generate``: the forward over the question and one for each further token.
    """

    question: Question
    words: tuple[str, ...]
    generate_s: float

    @property
    def is_right(self) -> bool:
        """Whether these are exactly the expected words."""
        return is_right(self.words, self.question.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers of one reading, in the order of the questions."""

    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        """How many are right."""
        return sum(answer.is_right for answer in self.answers)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated in all; those of the questions are not counted."""
        return sum(len(answer.words) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time of ``generate``, the questions' forwards in it."""
        spent = sum(answer.generate_s for answer in self.answers)
        return self.generated_tokens / spent if spent else 0.0


class Reading:
    """One model, one cache, and one document in it, to be asked about again and again.

    Parameters
    ----------
    model : PreTrainedModel
        A cache on disk must be attached to it.
    tokenizer : PreTrainedTokenizerBase
        One token for each word of the document.
    cache : Cache
        Empty: a `KVSwapCache`, or transformers' `DynamicCache`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache
    ) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self._ids = torch.empty(1, 0, dtype=torch.long)

    def read(
        self,
        words: Sequence[str],
        *,
        chunk_tokens: int = 1024,
        on_progress: Progress | None = None,
    ) -> None:
        """Store a document exactly.

        Parameters
        ----------
        words : sequence of str
        chunk_tokens : int
            Of one forward; a `KVSwapCache` goes by its own ``prefill_chunk``.
        on_progress : callable, optional
            ``on_progress("memory", tokens_done, tokens)``; a `KVSwapCache` has its own.
        """
        self._ids = self._encode(words)
        if isinstance(self.cache, KVSwapCache):
            self.cache.prefill(self._ids)
            self.cache.end_prefill()
            return
        total = self._ids.shape[1]
        for chunk in self._ids.split(chunk_tokens, dim=1):
            self._forward(chunk)
            if on_progress is not None:
                on_progress(MEMORY, self.cache.get_seq_length(), total)

    def resume(self, words: Sequence[str]) -> None:
        """Go on with a document that the cache holds already, see `refile`."""
        self._ids = self._encode(words)

    def ask(self, question: Question) -> Answer:
        """Answer one question greedily, and crop the cache back to the document.

        Notes
        -----
        At most one token more is generated than the right answer has: its end.
        """
        prompt = self._encode(question.prompt)
        most = len(question.answer) + 1
        new = generate_after(self.model, self.cache, self._ids, prompt, max_new_tokens=most)
        words = self.tokenizer.convert_ids_to_tokens(list(new.ids))
        return Answer(question=question, words=tuple(words), generate_s=new.generate_s)

    @torch.no_grad()
    def _forward(self, chunk: Tensor) -> None:
        self.model(input_ids=chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def _encode(self, words: Sequence[str]) -> Tensor:
        return torch.tensor([self.tokenizer.convert_tokens_to_ids(list(words))])


def ask_all(
    readings: Mapping[str, Reading],
    questions: Sequence[Question],
    *,
    on_progress: Progress | None = None,
) -> dict[str, Answers]:
    """Ask every reading every question, one question after the other.

    Parameters
    ----------
    readings : mapping of str to Reading
        Each has read the document. Who goes first alternates from question to question, so
        that whatever else the machine does hits all alike.
    questions : sequence of Question
    on_progress : callable, optional
        ``on_progress("questions", answers_done, answers)``.

    Returns
    -------
    dict of str to Answers
        By the names of the readings.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in readings}
    total = len(questions) * len(readings)
    for number, question in enumerate(questions):
        for name in list(readings)[:: -1 if number % 2 else 1]:
            answers[name].append(readings[name].ask(question))
            if on_progress is not None:
                on_progress("questions", sum(map(len, answers.values())), total)
    return {name: Answers(answers=tuple(given)) for name, given in answers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The same questions answered with the cache on disk and with all of it in memory.

    Attributes
    ----------
    context_tokens : int
        Of the document.
    full_kv_bytes : int
        Keys and values of the document, all in memory.
    kv_memory_bytes : int
        Memory that the cache on disk took, ``memory_parts`` in all.
    memory_parts : dict of str to int
        Bytes by part.
    questions, answers_right, answers_right_in_memory : int
    tokens_per_s, tokens_per_s_in_memory : float
        See `Answers.tokens_per_s`.
    bytes_read_per_token, hit_rate, stall_s : float
        Of the cache on disk, over all tokens of questions and answers.
    recall : float or None
        Mean share of the true attention that selections covered, where it was sampled.
    """

    context_tokens: int
    full_kv_bytes: int
    kv_memory_bytes: int
    memory_parts: dict[str, int]
    questions: int
    answers_right: int
    answers_right_in_memory: int
    tokens_per_s: float
    tokens_per_s_in_memory: float
    bytes_read_per_token: float
    hit_rate: float
    stall_s: float
    recall: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def full_kv_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Return the bytes of the keys and values that would go to disk, were all in memory."""
    return read_shape(model).geometry.token_bytes * num_tokens


def longest_context(document: Document) -> int:
    """Return the tokens of a document with its longest question and answer, end included."""
    turns = [len(q.prompt) + len(q.answer) + 1 for q in document.questions]
    return len(document.words) + max(turns, default=0)


def compare(
    load: ModelLoader,
    document: Document,
    make_config: Callable[[PreTrainedModel], CacheConfig],
    *,
    on_progress: Progress | None = None,
) -> Comparison:
    """Answer a document's questions with the cache on disk and with all of it in memory.

    Parameters
    ----------
    load : callable
        Gives model and tokenizer; called twice, so that nothing is changed on the model that
        keeps its cache in memory.
    document : Document
    make_config : callable
        From the model to the settings of the cache on disk, its progress included.
    on_progress : callable, optional
        See `Reading.read` and `ask_all`.

    Returns
    -------
    Comparison
    """
    model, tokenizer = load()
    stock_model, _ = load()
    config = make_config(model)
    with attach(model, config) as cache:
        disk = Reading(model, tokenizer, cache)
        disk.read(document.words)
        memory = Reading(stock_model, tokenizer, DynamicCache(config=stock_model.config))
        memory.read(document.words, chunk_tokens=config.prefill_chunk, on_progress=on_progress)
        answers = ask_all({DISK: disk, MEMORY: memory}, document.questions, on_progress=on_progress)
        return _compared(document, full_kv_bytes(model, len(document.words)), cache, answers)


def _compared(
    document: Document, full_bytes: int, cache: KVSwapCache, answers: dict[str, Answers]
) -> Comparison:
    stats, parts = cache.stats(), cache.memory_report()
    total = parts.pop("total")
    parts.pop("budget"), parts.pop("on_device", None)
    return Comparison(
        context_tokens=len(document.words),
        full_kv_bytes=full_bytes,
        kv_memory_bytes=total,
        memory_parts=parts,
        questions=len(document.questions),
        answers_right=answers[DISK].right,
        answers_right_in_memory=answers[MEMORY].right,
        tokens_per_s=answers[DISK].tokens_per_s,
        tokens_per_s_in_memory=answers[MEMORY].tokens_per_s,
        bytes_read_per_token=stats.bytes_read_per_token,
        hit_rate=stats.hit_rate,
        stall_s=stats.stall_s,
        recall=sum(stats.recall) / len(stats.recall) if stats.recall else None,
    )
