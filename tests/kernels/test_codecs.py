"""Record codecs: what is lost in eight and four bits, and that outliers do not change it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvswap.kernels.attention import AttentionParams, partial_attention
from kvswap.kernels.codecs import decode, decode_turned, encode, rotation_of, scales

CODED = ("int8", "rot4")
LENGTHS = (16, 24, 64, 80, 96, 128, 256)
# Of a vector's length: what is lost of Gaussian ones at most, on average.
LOST = {"int8": 0.009, "rot4": 0.115}


def lost(found: Tensor, vectors: Tensor) -> Tensor:
    """Return the length of each error, relative to its vector's."""
    return (found - vectors).norm(dim=-1) / vectors.norm(dim=-1)


def coded(vectors: Tensor, codec: str) -> Tensor:
    return decode(encode(vectors, codec), codec)


def naive_int4(vectors: Tensor) -> Tensor:
    """Round each group [head, token, element] by its largest number, with no rotation."""
    step = vectors.abs().amax((-3, -2, -1), keepdim=True) / 7
    return torch.round(vectors / step) * step


@pytest.mark.parametrize("head_dim", LENGTHS)
def test_the_rotation_is_orthogonal_and_spreads_every_element(head_dim):
    whole = rotation_of(head_dim).whole
    torch.testing.assert_close(whole @ whole.t(), torch.eye(head_dim), atol=1e-5, rtol=0)
    assert whole.abs().max() <= (2 / head_dim) ** 0.5 + 1e-6
    assert torch.equal(rotation_of(head_dim).whole, whole)
    assert 0 < (rotation_of(head_dim).factors < 0).sum() < head_dim


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("head_dim", LENGTHS)
def test_codes_keep_gaussian_vectors_of_any_length(codec, head_dim):
    vectors = torch.randn(500, head_dim) * torch.randn(500, 1).mul(2).exp()
    found = lost(coded(vectors, codec), vectors)
    assert found.mean() <= LOST[codec]
    assert found.max() <= 2.5 * LOST[codec]
    bytes_ = encode(vectors, codec)
    assert bytes_.shape[1] == (head_dim if codec == "int8" else head_dim // 2)


@pytest.mark.parametrize("codec", CODED)
def test_turned_vectors_give_the_same_dot_products(codec):
    vectors, query = torch.randn(50, 64), torch.randn(64)
    codes = encode(vectors, codec)
    turned = decode_turned(codes, codec) @ (query @ rotation_of(64).whole)
    torch.testing.assert_close(turned, decode(codes, codec) @ query, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODED)
def test_what_was_decoded_is_nearly_always_coded_as_before(codec, dtype):
    codes = encode(torch.randn(1000, 128), codec)
    decoded = decode(codes, codec)
    again = encode(decoded.to(dtype), codec)
    assert (again == codes).all(-1).float().mean() >= 0.95
    assert lost(decode(again, codec), decoded).mean() <= 0.1 * LOST[codec]


@pytest.mark.parametrize("codec", CODED)
def test_vectors_of_very_different_lengths_do_not_disturb_each_other(codec):
    """First tokens have keys and values far longer, or shorter, than those beside them."""
    vectors = torch.randn(8, 64) * torch.tensor([1e-3, 1e-2, 1, 30, 1, 500, 0.1, 1])[:, None]
    assert lost(coded(vectors, codec), vectors).max() <= 1.5 * LOST[codec]
    if codec == "rot4":  # what a scale for all of them would do to the short ones
        assert lost(naive_int4(vectors[None]), vectors)[0, :3].min() > 0.9


@pytest.mark.parametrize("codec", CODED)
def test_zeros_stay_zeros_and_next_to_nothing_becomes_nothing(codec):
    vectors = torch.zeros(3, 32)
    vectors[1, 4], vectors[2] = 1e-12, 1e-9
    assert not coded(vectors, codec).any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_what_cannot_be_coded_is_no_number_afterwards(codec, wrong, head_dim):
    vectors = torch.randn(3, head_dim)
    vectors[1, 5] = wrong
    found = coded(vectors, codec)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_scales_rise_in_small_steps():
    values = scales()[1:255]
    ratios = values[1:] / values[:-1]
    assert ratios.min() >= 1 + 1 / 15 - 1e-6
    assert ratios.max() <= 1.125
    assert scales()[0] == 0
    assert scales()[255].isnan()


def outlier_keys(heads: int, tokens: int, head_dim: int) -> Tensor:
    """Build keys that hold half of their energy in two channels; one head has an offset too."""
    keys = torch.randn(heads, tokens, head_dim)
    keys[:, :, [3, 17]] *= (head_dim / 2) ** 0.5
    keys[0, :, 5] += head_dim**0.5
    return keys


def attention_error(keys: Tensor, values: Tensor, lossy: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what attention loses in each head, relative to its length."""
    query = torch.randn(keys.shape[0], 32, keys.shape[2])
    query[:, :, [3, 5, 17]] *= 0.1  # models meet such channels with small queries
    params = AttentionParams(scaling=keys.shape[2] ** -0.5)
    expected = partial_attention(query, keys, values, params).out
    found = partial_attention(query, lossy(keys), lossy(values), params).out
    return (found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))


def by_groups(lossy: Callable[[Tensor], Tensor], size: int = 8) -> Callable[[Tensor], Tensor]:
    """Apply to groups [group, head, token, element] of [head, tokens, element]."""

    def apply(tokens: Tensor) -> Tensor:
        groups = tokens.unflatten(1, (-1, size)).transpose(0, 1)
        return lossy(groups).transpose(0, 1).flatten(1, 2)

    return apply


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.015), ("rot4", 0.2)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_to_gaussian_keys_and_values_loses_little(codec, bound, head_dim):
    keys, values = torch.randn(2, 4, 256, head_dim)
    errors = attention_error(keys, values, by_groups(lambda x: coded(x, codec)))
    assert errors.max() <= bound


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_outlier_channels_break_naive_int4_but_not_rot4(head_dim):
    values = torch.randn(4, 256, head_dim)
    keys = outlier_keys(4, 256, head_dim)
    rot4 = by_groups(lambda x: coded(x, "rot4"))
    plain = attention_error(torch.randn_like(keys), values, rot4)
    found = attention_error(keys, values, rot4)
    naive = attention_error(keys, values, by_groups(naive_int4))
    # What is lost is a part of a key's length, be it beside the point or not.
    assert found[1:].max() <= 1.5 * plain.max()
    assert found[0] <= 2 * plain.max()
    assert naive.min() >= 0.45  # nearer to nothing than to what it should be
    assert (naive / found).min() >= 2.5
