"""The work of ``kvswap run``: read a prompt into a cache on disk, then generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvswap.bench.questions import full_kv_bytes
from kvswap.cli.kept_text import ROOM_TOKENS, KeptText, open_kept
from kvswap.cli.models import ModelSource
from kvswap.cli.progress import StageBars, waiting
from kvswap.cli.quiet import quieten_transformers
from kvswap.cli.streaming import TextStream, decode
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.core.stats import LayerRecall
from kvswap.core.tuned_plan import TunedPlan
from kvswap.hf.attach import attach, planned_config
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import read_shape

if TYPE_CHECKING:
    from kvswap.cli.run import Request

_TITLES = {"prefill": "Reading", "index": "Indexing"}

_PROBES = ("A", "?")  # what prompts about a text have in common, these two have

Emit = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What was generated, and what it took.

    Attributes
    ----------
    text : str
    context_tokens, new_tokens : int
        Tokens of the prompt, document included, and generated ones.
    kept_tokens : int
        Of the prompt's, those that an earlier run had read (``--keep``).
    full_kv_bytes : int
        Keys and values of all these tokens, were all in memory.
    kv_memory_bytes : int
        Memory that the cache took, ``memory_parts`` in all.
    memory_parts : dict of str to int
        Bytes by part.
    read_s : float
        Time to read the prompt and to fit the index.
    tokens_per_s : float
        Generated tokens over the time of ``generate``.
    bytes_read_per_token, hit_rate, stall_s : float
        While generating.
    recall_by_layer : tuple of LayerRecall
        Share of the true attention that selections covered, where it was sampled.
    """

    text: str
    context_tokens: int
    new_tokens: int
    kept_tokens: int
    full_kv_bytes: int
    kv_memory_bytes: int
    memory_parts: dict[str, int]
    read_s: float
    tokens_per_s: float
    bytes_read_per_token: float
    hit_rate: float
    stall_s: float
    recall_by_layer: tuple[LayerRecall, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def answer(request: Request, emit: Emit | None) -> RunResult:
    """Do what was asked; text is emitted as it comes.

    Raises
    ------
    ConfigError
        If model or tokenizer cannot be read, or the prompt does not fit.
    """
    quieten_transformers()
    source = ModelSource(request.model)
    tokenizer = source.load_tokenizer()
    ids = encode_prompt(tokenizer, request.document, request.prompt)
    check_positions(source.load_config(), ids.shape[1], request.max_new_tokens)
    text = None
    if request.keep:
        probes = [encode_prompt(tokenizer, request.document, probe) for probe in _PROBES]
        text = KeptText.of(request, ids, probes)
    with waiting("Loading the model", is_shown=source.is_directory):
        model = source.load_model()
    with ExitStack() as stack:
        bars = StageBars(_TITLES)
        cache = stack.enter_context(_cache(request, model, ids, text, bars))
        kept_tokens = cache.seq_len
        with bars:
            read_s = _read(cache, ids, ids.shape[1] - 1 if text is None else text.held_tokens)
        begin = time.perf_counter()
        stream = TextStream(tokenizer, emit) if emit is not None else None
        new = _generate(model, cache, ids, request, stream)
        generate_s = time.perf_counter() - begin
        parts, stats = cache.memory_report(), cache.stats()
        if text is not None:
            text.cut_back(cache)  # what is kept is the text alone
        total, _, _ = parts.pop("total"), parts.pop("budget"), parts.pop("on_device", None)
        return RunResult(
            text=decode(tokenizer, new),
            context_tokens=ids.shape[1],
            new_tokens=len(new),
            kept_tokens=kept_tokens,
            full_kv_bytes=full_kv_bytes(model, ids.shape[1] + len(new)),
            kv_memory_bytes=total,
            memory_parts=parts,
            read_s=read_s,
            tokens_per_s=len(new) / generate_s,
            bytes_read_per_token=stats.bytes_read_per_token,
            hit_rate=stats.hit_rate,
            stall_s=stats.stall_s,
            recall_by_layer=tuple(stats.recall_by_layer),
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, document: str, prompt: str) -> Tensor:
    """Return the tokens of document and prompt [1, num_tokens], as one user message if can be.

    Raises
    ------
    ConfigError
        If the tokenizer cannot take them, or makes no token of them.
    """
    text = f"{document}\n\n{prompt}"
    try:
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
        else:
            inputs = tokenizer(text)
    except Exception as error:
        raise ConfigError(f"prompt cannot be tokenized: {error}") from error
    ids = torch.tensor([inputs["input_ids"]], dtype=torch.long)
    if not ids.shape[1]:
        raise ConfigError("prompt must have at least one token, got none")
    return ids


def check_positions(config: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `ConfigError` if prompt and answer are more than a model's positions."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise ConfigError(
            f"prompt and new tokens must be at most the model's {positions} positions,"
            f" got {prompt_tokens} + {max_new_tokens}"
        )


def _cache(
    request: Request, model: PreTrainedModel, ids: Tensor, text: KeptText | None, bars: StageBars
) -> KVSwapCache:
    """Return the cache that was kept of the text, or a new one."""
    needed = ids.shape[1] + request.max_new_tokens
    if text is None:
        return attach(model, _config(request, model, needed, bars))
    cache = open_kept(request, model, text, room_tokens=needed, on_progress=bars)
    if cache is None:
        positions = read_shape(model).max_positions or needed + ROOM_TOKENS
        room_tokens = min(needed + ROOM_TOKENS, positions)
        cache = attach(model, _config(request, model, room_tokens, bars))
        cache.notes = text.notes()
    return cache


def _config(
    request: Request, model: PreTrainedModel, max_context: int, bars: StageBars
) -> CacheConfig:
    """Return what was asked for, over the settings of a plan if one was named."""
    fixed: dict[str, Any] = {
        "max_context": max_context,
        "max_batch": 1,
        "recall_every": request.recall,
        "recall_floor": 0.0,  # the report says it
        "on_progress": bars,
    }
    if request.kv_memory is not None:
        fixed["kv_memory"] = request.kv_memory
    directories = request.kv_dirs
    if request.plan is not None:
        plan = TunedPlan.load(request.plan)
        directories = directories or (Path(plan.directory),)
    fixed["storage"] = StorageConfig(
        directories=directories,
        keep=request.keep,
        disk_limit=request.disk_limit,
        replicas=request.replicas,
        layout=request.layout,
    )
    return CacheConfig(**fixed) if request.plan is None else planned_config(model, plan, **fixed)


def _read(cache: KVSwapCache, ids: Tensor, until: int) -> float:
    """Store so many tokens, but for those that are there; return the time.

    At least the last one is left, whose forward generates the first new one.
    """
    begin = time.perf_counter()
    if cache.seq_len < until:
        cache.prefill(ids[:, cache.seq_len : until])
    if until:
        cache.end_prefill()
    return time.perf_counter() - begin


def _generate(
    model: PreTrainedModel,
    cache: KVSwapCache,
    ids: Tensor,
    request: Request,
    stream: TextStream | None,
) -> list[int]:
    """Return the new tokens."""
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature:
        torch.manual_seed(request.seed)
        sampling = {"do_sample": True, "temperature": request.temperature}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=request.max_new_tokens,
        num_beams=1,
        streamer=stream,
        **sampling,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new
