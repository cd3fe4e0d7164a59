"""Indexes and selectors are found by name, also those that a user registers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvswap
from kvswap.core.errors import ConfigError
from kvswap.predict import SELECTORS
from kvswap.predict.selectors import make_selector


@pytest.fixture
def registered(monkeypatch):
    """Take back what a test registers."""
    monkeypatch.setattr(SELECTORS, "_classes", dict(SELECTORS._classes))


def test_the_papers_own_are_there():
    assert "lowrank" in kvswap.index_names()
    assert "topk" in kvswap.selector_names()


@pytest.mark.usefixtures("registered")
def test_a_user_registers_a_selector():
    known = kvswap.selector_names()

    @kvswap.register_selector("newest")
    class Newest(kvswap.Selector):
        def select(self, scores, *, layer_idx, budget_groups, pinned):
            return np.arange(len(scores) - budget_groups, len(scores))

    assert set(kvswap.selector_names()) == {*known, "newest"}
    with pytest.raises(ConfigError, match="selector must be a name alone for this one, got :3"):
        make_selector("newest:3")
    chosen = make_selector("newest").select(
        torch.zeros(9), layer_idx=0, budget_groups=2, pinned=np.empty(0, np.int64)
    )
    assert chosen.tolist() == [7, 8]
