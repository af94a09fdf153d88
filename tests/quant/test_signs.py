"""The sign fold: exact bit for bit, found where keys lie in two clouds and only there, and nothing to weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_model import outputs, small_sam2
from torch import Tensor
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention

from samq.quant.grids import Grid, round_to_grid
from samq.quant.scales import choose_scales
from samq.quant.signs import bimodal_signs, decoder_attentions, fold_signs, is_bimodal

CHANNELS, TOKENS = 16, 200
ATTENTION = decoder_attentions(small_sam2())["mask_decoder.transformer.layers.0.cross_attn_token_to_image"]


def signs_of(count: int, seed: int) -> Tensor:
    """[count] of ±1, at least three eighths on either side."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(
        torch.arange(count) < torch.randint(3 * count // 8, 5 * count // 8, (1,), generator=generator), -1, 1
    )
    return signs[torch.randperm(count, generator=generator)].float()


def keys_at(centres: Tensor, seed: int) -> Tensor:
    """[2, TOKENS, C] with deviations of one around a centre for each channel."""
    noise = torch.randn(2, TOKENS, len(centres), generator=torch.Generator().manual_seed(seed))
    return noise + centres


def attended(attention: Sam2Attention, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of random tokens, both [1, 1, tokens, C], and what the attention makes of them."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 1, tokens, attention.hidden_size, generator=generator) for tokens in (5, 40))
    with torch.no_grad():
        return attention.q_proj(query), attention.k_proj(key), attention(query=query, key=key, value=key)[0]


@given(st.integers(0, 1000))
def test_products_of_queries_and_keys_stay_the_same_bit_for_bit(seed: int) -> None:
    folded, signs = copy.deepcopy(ATTENTION), signs_of(ATTENTION.internal_dim, seed)
    fold_signs(folded, signs)
    (queries, keys, answer), (flipped, turned, same) = attended(ATTENTION, seed), attended(folded, seed)
    assert torch.equal(flipped, queries * signs)
    assert torch.equal(turned, keys * signs)
    assert torch.equal(flipped @ turned.mT, queries @ keys.mT)
    assert torch.equal(same, answer)


@given(st.integers(0, 1000))
def test_a_second_fold_undoes_the_first(seed: int) -> None:
    folded, signs = copy.deepcopy(ATTENTION), signs_of(ATTENTION.internal_dim, seed)
    fold_signs(folded, signs)
    assert not torch.equal(folded.k_proj.weight, ATTENTION.k_proj.weight)
    fold_signs(folded, signs)
    assert all(torch.equal(tensor, folded.state_dict()[name]) for name, tensor in ATTENTION.state_dict().items())


@given(st.integers(0, 1000), st.floats(5, 100))
def test_two_clouds_become_one(seed: int, distance: float) -> None:
    sides = signs_of(CHANNELS, seed)
    keys = keys_at(distance * sides, seed)
    assert is_bimodal(keys)
    signs = bimodal_signs(keys)
    assert torch.equal(signs, sides)
    assert bool((keys * signs).mean((0, 1)).gt(0).all())
    assert not is_bimodal(keys * signs)


@given(st.integers(0, 1000), st.sampled_from([(0.0,), (8.0,), (-8.0,), (-9.0, 0.0, 9.0), (-30.0, -10.0, 10.0, 30.0)]))
def test_one_cloud_and_more_than_two_stay(seed: int, centres: tuple[float, ...]) -> None:
    keys = keys_at(torch.tensor(centres).repeat(12 // len(centres)), seed)
    assert not is_bimodal(keys)
    assert torch.equal(bimodal_signs(keys), torch.ones(12))


def peaks_of(values: NDArray[np.float64]) -> int:
    """Peaks of the kernel density estimate from its definition, by PTQ4SAM's settings: the highest first."""
    width = values.std(ddof=1) * len(values) ** -0.2  # Scott's rule
    points = np.linspace(values.min(), values.max(), 128)
    density = np.exp(-(((points[:, None] - values) / width) ** 2) / 2).sum(1) / (
        len(values) * width * (2 * np.pi) ** 0.5
    )
    inner = np.arange(1, 127)
    tops = inner[(density[inner] > density[inner - 1]) & (density[inner] > density[inner + 1])]
    kept: list[int] = []
    for top in sorted(tops, key=lambda index: -density[index]):
        if density[top] >= 0.01 * density.sum() and all(abs(top - other) >= 32 for other in kept):
            kept.append(top)
    return len(kept)


@pytest.mark.parametrize("distance", [0.0, 0.8, 1.6, 2.4, 4.0, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_criterion_is_that_of_the_density_itself(distance: float, seed: int) -> None:
    keys = keys_at(distance * signs_of(CHANNELS, seed), seed)
    assert is_bimodal(keys) == (peaks_of(keys.double().flatten().numpy()) == 2)


def test_few_channels_between_the_clouds_do_not_hide_them_and_keep_their_sign() -> None:
    keys = keys_at(8 * signs_of(62, 0), 0)
    signs = bimodal_signs(torch.cat([keys, torch.zeros(2, TOKENS, 2)], dim=-1))
    assert torch.equal(signs, torch.cat([signs_of(62, 0), torch.ones(2)]))


@pytest.mark.parametrize("keys", [torch.zeros(0, 4), torch.full((3, 4), 2.5), torch.tensor([[1e8, 1e8 + 8]])])
def test_keys_that_say_nothing_are_not_bimodal(keys: Tensor) -> None:
    assert torch.equal(bimodal_signs(keys), torch.ones(keys.shape[-1]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_keys_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="infinite or NaN"):
        bimodal_signs(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("signs", [torch.ones(3), torch.zeros(ATTENTION.internal_dim), torch.ones(1)])
def test_signs_that_are_none_are_an_error(signs: Tensor) -> None:
    folded = copy.deepcopy(ATTENTION)
    with pytest.raises(ValueError, match="of ±1"):
        fold_signs(folded, signs)
    assert torch.equal(folded.q_proj.weight, ATTENTION.q_proj.weight)


def test_the_decoders_attentions_are_found(small_model: Sam2Model) -> None:
    blocks = [f"layers.{index}" for index in range(2)]
    kinds = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    names = [f"{block}.{kind}" for block in blocks for kind in kinds] + ["final_attn_token_to_image"]
    assert set(decoder_attentions(small_model)) == {f"mask_decoder.transformer.{name}" for name in names}


@pytest.mark.parametrize("grid", [Grid(4, True, True), Grid(4, False), Grid(8, True)], ids=str)
def test_the_model_answers_the_same_and_no_weight_error_changes(small_model: Sam2Model, grid: Grid) -> None:
    """Why no preset has the fold: nothing that is quantized depends on it."""
    folded = copy.deepcopy(small_model)

    def errors(model: Sam2Model) -> list[Tensor]:
        weights = [
            layer.weight.detach()
            for attention in decoder_attentions(model).values()
            for layer in (attention.q_proj, attention.k_proj)
        ]
        rounded = [round_to_grid(weight, choose_scales(weight, grid, 16), grid).dequantize() for weight in weights]
        return [(one - other).norm(dim=1) for one, other in zip(rounded, weights, strict=True)]

    for index, attention in enumerate(decoder_attentions(folded).values()):
        fold_signs(attention, signs_of(attention.internal_dim, index))
    for after, before in zip(errors(folded), errors(small_model), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(outputs(folded), outputs(small_model), strict=True))
