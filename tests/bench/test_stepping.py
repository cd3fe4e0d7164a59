"""Steps of a cache that is filled once and timed as several devices."""

from __future__ import annotations

import pytest
import torch

import kvswap
from kvswap.bench.stepping import describe, imitate
from kvswap.core.errors import ConfigError
from tests.caches import SMALL, config_for, step
from tests.families import make_model, prompt


@pytest.mark.parametrize("changes", [{}, {"head_groups": 2}, {"deadline": True}], ids=str)
def test_a_filled_cache_goes_on_as_another_device(changes, tmp_path):
    model, logits = make_model("llama"), []
    with kvswap.attach(model, config_for(tmp_path, **SMALL, **changes, worth_reading=0.0)) as cache:
        step(model, cache, prompt(121))
        for device in (None, "ufs31", "emmc", None):
            imitate(cache, device)
            assert device is None or cache.session.store.backend_name.endswith(f"paced as {device}")
            for turn in range(3):
                logits.append(step(model, cache, prompt(1, seed=turn)))
            cache.crop(121)
            assert describe(cache, [1.0])["bytes_read_per_token"] > 0
        with pytest.raises(ConfigError, match="device_model must be"):
            imitate(cache, "tape")
    if "deadline" not in changes:
        whole = torch.cat(logits).unflatten(0, (4, 3))
        torch.testing.assert_close(whole, whole[:1].expand_as(whole), atol=2e-4, rtol=1e-4)
