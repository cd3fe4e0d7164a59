"""The tasks of EleutherAI's lm-evaluation-harness with the KV cache on disk.

https://github.com/EleutherAI/lm-evaluation-harness knows models by name, and learns this one when
this module is imported. Run as a command it is the harness's own with that name added::

    python -m kvswap.bench.lm_eval --model kvswap \
        --model_args pretrained=DIR,kv_memory=256MiB,kv_dir=kv --tasks hellaswag

Contexts are read exactly, each once; what is generated or scored after them goes through selection.
Needs the package lm-eval, the extra ``lm-eval``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from kvswap.bench.evaluation.budget import Budget
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import read_shape

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm-eval is missing: pip install 'kvswap[lm-eval]'") from error

_BLOCK_TOKENS = 64  # scored in one forward, which selects once for all of them
_WITHOUT_LIMIT = 4096  # tokens of a model that names no limit

Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("kvswap")
class KVSwapLM(TemplateLM):
    """A causal language model whose cache lies on disk.

    Parameters
    ----------
    pretrained : str
        A directory or a name on the Hub.
    kv_memory : str
        As 256MiB, or as 1/16 of the full keys and values of a context.
    kv_dir : path
        Directory for the cache.
    dtype : str
        Of the weights; "auto" is the checkpoint's.
    device : str, optional
        The harness names the first CUDA device; where there is none the host is meant.
    max_length : int, optional
        Most tokens of context and continuation. Default: the model's positions.
    max_gen_toks : int
        Most tokens to generate where a task does not say.
    batch_size, max_batch_size : optional
        The harness names them; one sequence is read at a time.
    **settings
        Other fields of `CacheConfig`.

    Raises
    ------
    ConfigError
        If a setting is not allowed.
    """

    def __init__(  # noqa: PLR0913  (the harness names them)
        self,
        pretrained: str,
        kv_memory: str,
        kv_dir: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("None", "1", "auto"):
            raise ConfigError(f"batch_size must be 1, got {batch_size!r}")
        self._budget = Budget.parse(str(kv_memory))
        self._storage = StorageConfig(directories=[kv_dir])
        self._settings = {"recall_floor": 0.0} | settings
        self._config(full_bytes=2**40, max_context=1)  # what is wrong is said now
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": pretrained,
            "local_files_only": Path(pretrained).is_dir(),
        }
        is_there = torch.cuda.is_available() or not str(device).startswith("cuda")
        self._device = torch.device(device if device and is_there else "cpu")
        self._name = pretrained
        self.tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        self.model = model.to(self._device).train(mode=False)
        shape = read_shape(self.model)
        self._token_bytes = shape.geometry.token_bytes
        self.max_length = max_length or shape.max_positions or _WITHOUT_LIMIT
        self.max_gen_toks = max_gen_toks

    # -- what the harness asks ------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        opening = self.tokenizer.bos_token_id
        return self.eot_token_id if opening is None else int(opening)

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's caches of requests."""
        return self._name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the tokenizer's template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; an opening token that it has is not put there again."""
        if add_special_tokens is None:
            opening = self.tokenizer.bos_token
            add_special_tokens = opening is None or not string.startswith(opening)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, all of whose tokens go through selection."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                1,
            )
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._score_all(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return what is generated after each context, up to the first of its stops."""
        found = []
        for context, given in (request.args for request in requests):
            text = self._generate(context, dict(given))
            self.cache_hook.add_partial("generate_until", (context, given), text)
            found.append(text)
        return found

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._score_all(requests)
        for (pair, *_ids), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return found

    # -- how it is done -------------------------------------------------------------------

    def _score_all(self, requests: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of continuations; each context is read once."""
        by_context: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            kept, scored = self._fitting(context, continuation)
            by_context.setdefault(tuple(kept), []).append((place, scored))
        found: dict[int, tuple[float, bool]] = {}
        for ids, asked in by_context.items():
            room = max(len(continuation) for _, continuation in asked)
            with self._reading(ids, room) as cache:
                for place, continuation in asked:
                    found[place] = self._score(cache, ids[-1], continuation)
                    surplus = cache.get_seq_length() - (len(ids) - 1)
                    if surplus:
                        cache.crop(-surplus)
        return [found[place] for place in range(len(requests))]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Leave out of both together, from the left, what the model has no positions for.

        The last token is scored and never read: so they may be one more than those.
        """
        whole = (context + continuation)[-(self.max_length + 1) :]
        scored = min(len(continuation), self.max_length)
        return whole[:-scored], whole[-scored:]

    @torch.no_grad()
    def _score(self, cache: KVSwapCache, last: int, continuation: list[int]) -> tuple[float, bool]:
        """Score a continuation of a context whose last token the cache does not hold yet."""
        inputs, targets = self._tensor([last, *continuation[:-1]]), self._tensor(continuation)
        total, is_greedy = 0.0, True
        blocks = zip(inputs.split(_BLOCK_TOKENS, 1), targets.split(_BLOCK_TOKENS, 1), strict=True)
        for given, expected in blocks:
            logits = self.model(input_ids=given, past_key_values=cache, use_cache=True).logits
            chances = logits.float().log_softmax(-1)
            total += float(chances.gather(-1, expected[..., None]).sum())
            is_greedy &= bool((logits.argmax(-1) == expected).all())
        return total, is_greedy

    def _generate(self, context: str, given: dict[str, Any]) -> str:
        until = given.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(given.pop("max_gen_toks", given.pop("max_new_tokens", self.max_gen_toks)))
        if most >= self.max_length:
            raise ConfigError(
                f"max_gen_toks must be below max_length {self.max_length}, got {most}"
            )
        if not given.get("temperature"):
            given.pop("temperature", None)
            given["do_sample"] = False
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        with self._reading(ids, most) as cache:
            prompt = self._tensor(ids)
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=most,
                pad_token_id=self.eot_token_id,
                stopping_criteria=[_Stops(self.tokenizer, len(ids), stops)],
                **given,
            )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop, 1)[0] if stop else text
        return text

    @contextmanager
    def _reading(self, ids: Sequence[int], room_tokens: int) -> Iterator[KVSwapCache]:
        """Give a cache that holds all tokens but the last, after which everything selects.

        So many tokens may follow those that it holds.
        """
        full_bytes = self._token_bytes * len(ids)
        config = self._config(full_bytes=full_bytes, max_context=len(ids) - 1 + room_tokens)
        with attach(self.model, config) as cache:
            if len(ids) > 1:
                cache.prefill(self._tensor(ids[:-1]))
            cache.end_prefill()
            yield cache

    def _config(self, *, full_bytes: int, max_context: int) -> CacheConfig:
        budget = max(1, self._budget.bytes_of(full_bytes))
        named = {"kv_memory": budget, "max_context": max_context, **self._settings}
        return CacheConfig.from_dict(named | {"storage": self._storage.to_dict()})

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.long, device=self._device)


class _Stops(StoppingCriteria):
    """Ends a generation once its text holds a stop."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._stops = [stop for stop in stops if stop]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        text = self._tokenizer.decode(input_ids[0, self._prompt_tokens :])
        is_done = any(stop in text for stop in self._stops)
        return torch.tensor([is_done], device=input_ids.device)


def main() -> None:
    """Run the harness's own command, which knows this model by now."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
