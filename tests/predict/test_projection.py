"""Projections: the basis that is fitted, and the file that keeps one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kvswap.core.errors import ConfigError
from kvswap.predict.projection import Projection, fit_projection, leading_basis


def covariance_of(keys: torch.Tensor) -> torch.Tensor:
    return keys.t() @ keys


def keys_near_a_subspace(dim: int, inner: int, noise: float = 0.01) -> torch.Tensor:
    return torch.randn(800, inner) @ torch.randn(inner, dim) + noise * torch.randn(800, dim)


# 96 of 96, 24 of 96 in full; 8 of 96 by the randomised decomposition.
@pytest.mark.parametrize("rank", [8, 24, 96])
def test_a_basis_is_orthonormal(rank):
    basis = leading_basis(covariance_of(torch.randn(800, 96)), rank)
    assert basis.shape == (96, rank)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(rank), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rank", "inner"), [(8, 8), (40, 30)])
def test_a_basis_keeps_the_energy_there_is(rank, inner):
    keys = keys_near_a_subspace(96, inner)
    kept = keys @ leading_basis(covariance_of(keys), rank)
    assert kept.norm() ** 2 > 0.999 * keys.norm() ** 2


def test_no_basis_of_that_rank_keeps_much_more():
    keys = torch.randn(800, 96) * torch.linspace(3, 0.1, 96)
    covariance = covariance_of(keys)
    best = torch.linalg.eigvalsh(covariance)[-8:].sum()
    basis = leading_basis(covariance, 8)
    assert torch.trace(basis.t() @ covariance @ basis) > 0.99 * best


def test_energy_is_spread_over_the_coefficients():
    keys = torch.randn(800, 96) * torch.logspace(1, -2, 96)
    energy = (keys @ leading_basis(covariance_of(keys), 16)).pow(2).mean(0)
    assert energy.max() < 12 * energy.mean()


@pytest.mark.parametrize("rank", [8, 48])
def test_a_fit_is_repeatable_and_leaves_the_random_state_alone(rank):
    covariance = covariance_of(torch.randn(300, 96))
    torch.manual_seed(5)
    first, after = leading_basis(covariance, rank), torch.rand(1)
    torch.manual_seed(6)
    second = leading_basis(covariance, rank)
    torch.manual_seed(5)
    assert torch.equal(first, second)
    assert torch.equal(after, torch.rand(1))


def made_projection() -> Projection:
    covariances = [covariance_of(torch.randn(50, 12)) for _ in range(11)]
    return fit_projection(covariances, rank=4, fingerprint="abc")


def test_a_projection_survives_its_file(tmp_path):
    projection, path = made_projection(), tmp_path / "projection.safetensors"
    projection.save(path)
    again = Projection.load(path)
    assert (again.rank, again.fingerprint) == (4, "abc")
    assert len(again.bases) == 11
    for found, expected in zip(again.bases, projection.bases, strict=True):
        assert torch.equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["projection.safetensors"]


def test_saving_replaces_the_file_that_was_there(tmp_path):
    path = tmp_path / "projection.safetensors"
    path.write_text("old")
    made_projection().save(path)
    assert Projection.load(path).rank == 4


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="projection cannot be written"):
        made_projection().save(tmp_path / "missing" / "projection.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="projection cannot be read"):
        Projection.load(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["text", "cut", "foreign", "foreign names", "empty"])
def test_a_file_that_is_no_projection_is_refused(tmp_path, damage):
    path = tmp_path / "projection.safetensors"
    made_projection().save(path)
    if damage == "text":
        path.write_text("no tensors here")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "foreign":
        save_file({"layer.0": torch.zeros(3, 2)}, path)
    elif damage == "foreign names":
        save_file({"weight": torch.zeros(3, 2)}, path, metadata={"format": "pt"})
    else:
        save_file({}, path, metadata={"format": "kvswap-projection"})
    with pytest.raises(ConfigError, match="projection"):
        Projection.load(path)


def test_a_file_with_layers_missing_or_shaped_apart_is_refused(tmp_path):
    path, metadata = tmp_path / "projection.safetensors", {"format": "kvswap-projection"}
    save_file({"layer.1": torch.zeros(3, 2), "layer.2": torch.zeros(3, 2)}, path, metadata)
    with pytest.raises(ConfigError, match="projection"):
        Projection.load(path)
    save_file({"layer.0": torch.zeros(3, 2), "layer.1": torch.zeros(3)}, path, metadata)
    with pytest.raises(ConfigError, match="projection"):
        Projection.load(path)
