"""Calibration: a projection from sample text serves a cache in place of a fit."""

from __future__ import annotations

import pytest
import torch

import kvswap
from kvswap.core.errors import ConfigError, UnsupportedModelError
from kvswap.predict.projection import Projection
from tests.caches import SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, prompt

NO_RANK = {name: value for name, value in SMALL.items() if name != "rank"}
# With all of the key kept and no rounding, the index ranks as the keys themselves do.
EXACT = {**NO_RANK, "code": "bf16"}


def windows(count: int = 3, length: int = 60) -> list[torch.Tensor]:
    return [prompt(length, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_basis_is_fitted_for_each_layer_on_disk(family):
    model = make_model(family)
    projection = kvswap.calibrate(model, windows(), rank=8)
    assert projection.rank == 8
    assert len(projection.bases) == (2 if family == "gemma2" else 4)
    for basis in projection.bases:
        assert basis.dtype == torch.bfloat16
        torch.testing.assert_close(
            basis.float().t() @ basis.float(), torch.eye(8), atol=0.05, rtol=0
        )


def test_the_basis_keeps_the_energy_of_the_models_own_keys():
    model = make_model("llama")
    projection = kvswap.calibrate(model, windows(), rank=12)
    cache = stock_cache(model)
    step(model, cache, prompt(60, seed=0))
    for layer, basis in zip(cache.layers, projection.bases, strict=True):
        keys = layer.keys[0].transpose(0, 1).flatten(1)
        best = torch.linalg.svdvals(keys)[:12].pow(2).sum()
        assert (keys @ basis.float()).pow(2).sum() > 0.9 * best


def test_progress_is_told_in_tokens():
    told = []
    kvswap.calibrate(
        make_model("llama"), windows(), rank=8, on_progress=lambda *done: told.append(done)
    )
    assert told == [("calibrate", 60, 0), ("calibrate", 120, 0), ("calibrate", 180, 0)]


def test_a_saved_projection_serves_a_cache_without_a_fit(tmp_path):
    model, path = make_model("llama"), tmp_path / "projection.safetensors"
    kvswap.calibrate(model, windows(5), rank=16).save(path)
    ids, stages = prompt(140), []
    settings = {**EXACT, "projection": path, "on_progress": lambda *done: stages.append(done[0])}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        assert cache.config.rank == 16
        tokens = greedy(model, cache, ids, 15)
        assert cache.stats().index_fit_s == 0
        assert "index" not in stages
    # Both bases span all of the key, so that they rank alike but for rounding.
    with kvswap.attach(model, config_for(tmp_path, **EXACT, rank=16)) as cache:
        assert torch.equal(greedy(model, cache, ids, 15), tokens)


def test_a_projection_is_refused_where_the_code_needs_more_than_one(tmp_path):
    model, path = make_model("llama"), tmp_path / "projection.safetensors"
    kvswap.calibrate(model, windows(), rank=8).save(path)
    config = config_for(tmp_path, **{**EXACT, "code": "band"}, projection=path)
    with pytest.raises(ConfigError, match="projection must be left out with the band code, got"):
        kvswap.attach(model, config)


def test_an_attached_model_is_calibrated_as_any_other(tmp_path):
    model = make_model("llama")
    expected = kvswap.calibrate(model, windows(), rank=8)
    with kvswap.attach(model, config_for(tmp_path)):
        found = kvswap.calibrate(model, windows(), rank=8)
    assert found.fingerprint == expected.fingerprint
    for one, other in zip(found.bases, expected.bases, strict=True):
        projections = [basis.float() @ basis.float().t() for basis in (one, other)]
        torch.testing.assert_close(*projections, atol=0.03, rtol=0)


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "projection.safetensors"
    kvswap.calibrate(make_model("llama"), windows(), rank=8).save(path)
    with pytest.raises(ConfigError, match="projection was calibrated for another model"):
        kvswap.attach(make_model("qwen2"), config_for(tmp_path, projection=path))
    assert [found.name for found in tmp_path.iterdir()] == ["projection.safetensors"]


def test_another_rank_is_refused(tmp_path):
    model, path = make_model("llama"), tmp_path / "projection.safetensors"
    kvswap.calibrate(model, windows(), rank=8).save(path)
    with pytest.raises(ConfigError, match="rank must be the projection's 8, got 4"):
        kvswap.attach(model, config_for(tmp_path, projection=path, rank=4))


def test_a_projection_with_too_few_layers_is_refused_at_attach(tmp_path):
    model, path = make_model("llama"), tmp_path / "projection.safetensors"
    whole = kvswap.calibrate(model, windows(), rank=8)
    Projection(bases=whole.bases[:3], fingerprint=whole.fingerprint).save(path)
    with pytest.raises(ConfigError, match="projection must have 4 layers"):
        kvswap.attach(model, config_for(tmp_path, projection=path))
    short = tuple(basis[:-2] for basis in whole.bases)
    Projection(bases=short, fingerprint=whole.fingerprint).save(path)
    with pytest.raises(ConfigError, match=r"projection must be \[16, 8\], got \[14, 8\]"):
        kvswap.attach(model, config_for(tmp_path, projection=path))


def test_a_missing_projection_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="projection cannot be read"):
        kvswap.attach(make_model("llama"), config_for(tmp_path, projection=tmp_path / "none"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_outside_the_keys_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"rank must be in \[1, 16\] .*, got {rank}"):
        kvswap.calibrate(make_model("llama"), windows(), rank=rank)


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="calibration needs at least 8 tokens, got 7"):
        kvswap.calibrate(make_model("llama"), [prompt(7)], rank=8)
    with pytest.raises(ConfigError, match="calibration needs at least 8 tokens, got 0"):
        kvswap.calibrate(make_model("llama"), [], rank=8)


def test_a_window_longer_than_the_positions_is_refused():
    with pytest.raises(ConfigError, match="512 positions"):
        kvswap.calibrate(make_model("llama"), [prompt(513)], rank=8)


@pytest.mark.parametrize("window", [prompt(20, 2), prompt(20)[0]])
def test_a_window_is_one_row_of_tokens(window):
    with pytest.raises(ConfigError, match=r"windows must be of shape \[1, num_tokens\]"):
        kvswap.calibrate(make_model("llama"), [window], rank=8)


def test_a_model_that_cannot_be_served_is_refused():
    with pytest.raises(UnsupportedModelError):
        kvswap.calibrate(make_model("mistral", sliding_window=8), windows(), rank=8)
