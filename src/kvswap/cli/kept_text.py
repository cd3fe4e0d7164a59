"""What `kvswap run --keep` keeps of a text, so that it is read once for all questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from kvswap.core.config import Progress
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan
from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache
from kvswap.storage.directory import STORE_NAME, holds_store

if TYPE_CHECKING:
    from kvswap.cli.run import Request

ROOM_TOKENS = 4096
"""For later questions and answers, beyond the first one's."""

_WAY_OUT = "remove what is there, or name another directory"


@dataclass(frozen=True, slots=True)
class KeptText:
    """The tokens that a text has whatever is asked about it, and what their cache was made with.

    Attributes
    ----------
    held_tokens : int
        With how many of them the prompt at hand begins; one of it is always left.
    num_tokens : int
    digest : str
        SHA-256 of their ids, in hexadecimal.
    settings : dict of str to any
        By option.
    """

    held_tokens: int
    num_tokens: int
    digest: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, request: Request, ids: Tensor, probes: Sequence[Tensor]) -> KeptText:
        """Find them: what prompts [1, num_tokens] about the same text have in common.

        Parameters
        ----------
        request : Request
        ids : Tensor [1, num_tokens], int64
            The prompt that was asked for.
        probes : sequence of Tensor
            Two others, always the same ones.

        Raises
        ------
        ConfigError
            If the plan cannot be read.
        """
        num_tokens = _alike(*probes)
        text = probes[0][:, :num_tokens]
        return cls(
            held_tokens=min(_alike(ids, text), ids.shape[1] - 1),
            num_tokens=num_tokens,
            digest=_digest(text.numpy().tobytes()),
            settings={
                "--plan": None if request.plan is None else _plan_digest(request.plan),
                "--replicas": request.replicas,
                "--layout": request.layout,
                "--disk-limit": request.disk_limit,
            },
        )

    def notes(self) -> dict[str, Any]:
        """Return what is kept beside the cache, ready for JSON."""
        return {"text": self.digest, "tokens": self.num_tokens, "settings": self.settings}

    def cut_back(self, cache: KVSwapCache) -> None:
        """Take off a cache what lies beyond the text, as far as the prompt begins with it."""
        cache.crop(min(0, self.held_tokens - cache.seq_len))


def open_kept(
    request: Request,
    model: PreTrainedModel,
    text: KeptText,
    *,
    room_tokens: int,
    on_progress: Progress,
) -> KVSwapCache | None:
    """Return the cache that was kept in the directories, as far as the prompt begins like it.

    None where there is none. It is attached to the model, and the caller's to close.

    Parameters
    ----------
    request : Request
    model : PreTrainedModel
    text : KeptText
    room_tokens : int
        For the prompt, text included, and the answer.
    on_progress : callable
        As in `CacheConfig`.

    Raises
    ------
    ConfigError
        If it is of another text or model, was made with other settings, or has no such room.
    """
    if not any(holds_store(path) for path in request.kv_dirs):
        return None
    cache = KVSwapCache.open(
        request.kv_dirs,
        kv_memory=request.kv_memory,
        device=str(model.device),
        recall_every=request.recall,
        on_progress=on_progress,
    )
    try:
        _check(cache.notes, text, request.kv_dirs)
        if room_tokens > cache.max_context:
            raise ConfigError(
                f"prompt and new tokens must be at most the {cache.max_context} that the kept"
                f" cache was made for, got {room_tokens}"
            )
        attach(model, cache)
        text.cut_back(cache)
    except BaseException:
        cache.session.close()  # nothing is saved
        cache.close()
        raise
    return cache


def _check(notes: dict[str, Any], text: KeptText, directories: Sequence[Path]) -> None:
    place = directories[0] / STORE_NAME
    if notes.get("text") != text.digest:
        raise ConfigError(f"--file must be the text whose cache is kept in {place}: {_WAY_OUT}")
    made_with = notes["settings"]
    for option, value in text.settings.items():
        if made_with.get(option) != value:
            raise ConfigError(
                f"{option} must be what the cache in {place} was made with: {_WAY_OUT}"
            )


def _alike(first: Tensor, second: Tensor) -> int:
    """Return with how many same tokens two prompts begin."""
    shorter = min(first.shape[1], second.shape[1])
    return int((first[0, :shorter] == second[0, :shorter]).long().cumprod(0).sum())


def _plan_digest(path: Path) -> str:
    found = TunedPlan.load(path).to_dict()
    return _digest(json.dumps(found, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
