"""Which kernels run: those of the extension, for the best instruction set, or plain torch.

``KVSWAP_KERNEL`` forces one by name: ``torch`` or one of `native_names`. ``triton`` forces those
of a device (`kvswap.kernels.accelerator`); what stays on the host runs as if nothing was named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvswap.core.errors import KernelUnavailableError
from kvswap.core.extension import native as extension
from kvswap.core.extension import warn_once

REFERENCE = "torch"
TRITON = "triton"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As csrc/kernels/api.h numbers them."""

_forced: list[str] = []


def native_names() -> tuple[str, ...]:
    """Return the instruction sets whose kernels run here, best first."""
    return () if extension is None else tuple(extension.kernel_names())


def kernel_name() -> str:
    """Return the name of the kernels in use."""
    module = native()
    if asked_for() == TRITON:
        return TRITON
    return REFERENCE if module is None else str(module.kernel_name())


def native() -> ModuleType | None:
    """Return the extension with the right kernels chosen, or None for the torch reference.

    Raises
    ------
    KernelUnavailableError
        If ``KVSWAP_KERNEL`` names kernels that do not run here.
    """
    return _choose(asked_for())


def asked_for() -> str:
    """Return the name of the kernels that are forced, or nothing."""
    return _forced[-1] if _forced else os.environ.get("KVSWAP_KERNEL", "")


def is_interpreting() -> bool:
    """Return whether Triton's kernels run on the CPU, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    """Return whether triton can be imported."""
    return find_spec("triton") is not None


@cache
def _choose(name: str) -> ModuleType | None:
    if name == REFERENCE:
        return None
    if not name or (name == TRITON and _runs_triton()):
        if extension is None:
            warn_once("plain torch computes what native kernels would, as they were not built")
        else:
            extension.use_kernels(extension.kernel_names()[0])
        return extension
    if extension is None or not extension.use_kernels(name):
        triton = (TRITON,) if _runs_triton() else ()
        present = ", ".join((REFERENCE, *native_names(), *triton))
        raise KernelUnavailableError(f"KVSWAP_KERNEL must be one of {present}, got {name!r}")
    return extension


def _runs_triton() -> bool:
    return has_triton() and (is_interpreting() or torch.cuda.is_available())


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use kernels by name within a block, for tests and comparisons."""
    before = extension and extension.kernel_name()
    _forced.append(name)
    _choose.cache_clear()
    try:
        native()
        yield
    finally:
        _forced.pop()
        _choose.cache_clear()
        if extension is not None:  # for those who found it before
            extension.use_kernels(before)


def query_view(query: Tensor) -> tuple[int, int, int, int, int]:
    """Return address, heads, tokens and their strides of [num_heads, q_len, head_dim]."""
    return (query.data_ptr(), query.shape[0], query.shape[1], query.stride(0), query.stride(1))


def tokens_view(keys: Tensor, values: Tensor) -> tuple[Any, ...]:
    """Return addresses, count and strides of keys and values [num_kv_heads, count, head_dim]."""
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    return (keys.data_ptr(), values.data_ptr(), keys.shape[1], *strides)
