"""Every instruction set whose kernels run here, forced one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvswap.core.extension import native as extension
from kvswap.kernels.accelerator import Accelerator, accelerator_of
from kvswap.kernels.native import TRITON, forced, has_triton, kernel_name, native_names


@contextmanager
def proven(name: str) -> Iterator[str]:
    """Force kernels by name, and fail unless they are the ones in use before and after."""
    with forced(name):
        assert kernel_name() == name
        yield name
        assert extension is not None
        assert extension.kernel_name() == name


@pytest.fixture(params=native_names())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with proven(request.param) as name:
        yield name


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Triton's kernels, forced: on a GPU where there is one, else by interpretation."""
    if not has_triton():
        pytest.skip("triton is not installed")
    with forced(TRITON):
        assert kernel_name() == TRITON
        found = accelerator_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        assert found is not None
        yield found
