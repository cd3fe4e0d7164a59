"""Seeds and small geometries for all tests; nothing here reaches a network."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

from kvswap.core.geometry import KVGeometry

# Nothing is timed: a slow machine is no failure.
settings.register_profile("kvswap", deadline=None)
settings.load_profile("kvswap")
# Before triton is imported: where there is no GPU its kernels run by interpretation.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Models are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def geometry() -> KVGeometry:
    return KVGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
