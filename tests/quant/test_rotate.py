"""Rotation of attention values: orthogonal, spreading, exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import outputs, pixels, relative, small_sam2
from tiny_modules import Tiny, decoder_attention, hiera_attention, normal, randomized
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.hadamard import hadamard
from samq.quant.rotate import (
    mean_keeping_rotation,
    rotate_inputs,
    rotate_values,
    runtime_rotation,
    spreading_rotation,
)
from samq.quant.sites import FoldSite, fold_sites

SITES = [site for site in fold_sites(small_sam2()) if site.heads is not None]


def head_width(site: FoldSite) -> int:
    """Channels of one head."""
    assert site.heads is not None
    return (site.rows[1] - site.rows[0]) // site.heads


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 16, 24, 32, 36, 48, 56, 72, 96, 112, 144])
def test_orthogonal_with_entries_of_like_size(width: int) -> None:
    rotation = spreading_rotation(width)
    assert rotation.dtype == torch.float64
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(rotation.abs().max()) <= (2 / width) ** 0.5 + 1e-12
    if width != 3:  # all others have a Hadamard matrix
        assert float(rotation.abs().max()) == pytest.approx(width**-0.5)


@pytest.mark.parametrize("width", [8, 24, 56])
def test_one_outlier_is_spread(width: int) -> None:
    outlier = torch.zeros(width, dtype=torch.float64)
    outlier[width // 2] = 1
    assert float((spreading_rotation(width) @ outlier).abs().max()) <= (2 / width) ** 0.5 + 1e-12


@pytest.mark.parametrize("width", [1, 2, 3, 18, 32, 48, 96, 112, 144, 200])
def test_a_rotation_that_keeps_means(width: int) -> None:
    rotation, ones = mean_keeping_rotation(width), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-11)
    if width >= 32:
        assert float(rotation.abs().max()) < 5 * width**-0.5
        assert float(rotation.pow(4).mean()) < 1.2 * 3 / width**2  # no more peaked than a random rotation


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.source)
def test_each_attention_stays_exact(small_model: Sam2Model, site: FoldSite) -> None:
    rotated = copy.deepcopy(small_model)
    rotate_values(rotated, site)
    weights = [model.get_submodule(site.layers[0]).weight for model in (small_model, rotated)]
    assert relative(weights[1] - weights[0], weights[0]) > 0.5
    for after, before in zip(outputs(rotated), outputs(small_model), strict=True):
        assert relative(after - before, before) < 2e-5


def test_the_output_projection_sees_rotated_heads(small_model: Sam2Model) -> None:
    site = next(site for site in SITES if site.heads == 2)
    rotated, seen = copy.deepcopy(small_model), []
    rotate_values(rotated, site)

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].detach())

    for model in (small_model, rotated):
        handle = model.get_submodule(site.layers[0]).register_forward_pre_hook(hook)
        with torch.no_grad():
            ImageEncoder(model)(pixels(1))
        handle.remove()
    before, after = (x.unflatten(-1, (2, -1)).double() for x in seen)
    rotation = spreading_rotation(before.shape[-1])
    torch.testing.assert_close(after, before @ rotation.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "site", [site for site in SITES if head_width(site) in (8, 16, 32)], ids=lambda site: site.source
)
def test_values_are_rotated_as_in_the_paper(small_model: Sam2Model, site: FoldSite) -> None:
    """QuaRot, section 4, stage 1c: (W_v, b_v) ← (I ⊗ H)(W_v, b_v) and W_o ← W_o (I ⊗ H)ᵀ, H of Walsh and Hadamard."""
    rotated, width, rows = copy.deepcopy(small_model), head_width(site), slice(*site.rows)
    rotate_values(rotated, site)
    assert site.heads is not None
    rotation = np.kron(np.eye(site.heads), scipy.linalg.hadamard(width) / np.sqrt(width))
    (values, shift, reads), (new_values, new_shift, new_reads) = (
        [tensor.detach().double().numpy() for tensor in (source.weight[rows], source.bias[rows], output.weight)]
        for source, output in ((site.source_in(model), site.layers_in(model)[0]) for model in (small_model, rotated))
    )
    for found, expected in (
        (new_values, rotation @ values),
        (new_shift, rotation @ shift),
        (new_reads, reads @ rotation.T),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 3, 12, 32, 88, 112, 200])
def test_a_rotation_at_run_time_is_made_of_fp16_numbers(width: int) -> None:
    rotation = runtime_rotation(width)
    assert rotation.dtype == torch.float32
    assert torch.equal(rotation.half().float(), rotation)
    gram, exact = rotation.double() @ rotation.double().T, torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(gram, exact, rtol=0, atol=2**-10)
    torch.testing.assert_close(rotation.double(), spreading_rotation(width), rtol=2**-11, atol=1e-7)
    assert runtime_rotation(width) is rotation  # which layers of one width share


@pytest.mark.parametrize("width", [3, 12, 32, 88, 200])
def test_a_layer_with_rotated_inputs_puts_out_the_same(width: int) -> None:
    """x Wᵀ in float64, from the definition; and by the layer itself, whose hook rotates."""
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 24), torch.randn(50, width, dtype=torch.float64)
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double()
    rotation = rotate_inputs(layer)
    assert torch.equal(rotation, runtime_rotation(width).double())
    assert relative(layer.weight.detach() - weight, weight) > 0.5
    rotated = (x @ rotation.T) @ layer.weight.detach().double().T
    assert relative(rotated - x @ weight.T, x @ weight.T) < 1e-6
    found = layer(x.float()).detach()
    assert relative(found - (x @ weight.T + bias), found) < 1e-5


@given(st.integers(1, 200))
@settings(max_examples=60)
def test_any_width_has_a_rotation_that_spreads(width: int) -> None:
    rotation = spreading_rotation(width)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(rotation.abs().max()) <= (2 / width) ** 0.5 + 1e-12
    if hadamard(width) is not None:
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, width**-0.5))


@given(st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=60)
def test_any_width_and_seed_has_a_rotation_that_keeps_means(width: int, seed: int) -> None:
    """Orthogonal, R 1 = 1, and no entry beyond 6 / √n; so that LayerNorm without gain commutes with it."""
    rotation, ones = mean_keeping_rotation(width, seed), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-11)
    assert float(rotation.abs().max()) <= 6 * width**-0.5
    x = normal(4, width, seed=seed % 999)
    torch.testing.assert_close((x @ rotation.T).mean(-1), x.mean(-1), rtol=0, atol=1e-11)
    if width > 1:
        normed = (nn.functional.layer_norm(values, (width,)) for values in (x @ rotation.T, x))
        torch.testing.assert_close(next(normed), next(normed) @ rotation.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attention", [hiera_attention, decoder_attention])
@given(st.integers(2, 24), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=25)
def test_any_attention_stays_exact(
    attention: Callable[[int, int, int], Tiny], width: int, heads: int, seed: int
) -> None:
    """In float64, for heads of any width."""
    tiny = attention(width, heads, seed)
    (site,), before = tiny.sites, tiny.run()
    weight = site.layers_in(tiny.model)[0].weight.detach().clone()
    rotation = rotate_values(tiny.model, site)
    assert relative(site.layers_in(tiny.model)[0].weight - weight @ rotation.T, weight) < 1e-13
    assert relative(tiny.run() - before, before) < 1e-13


@given(st.integers(1, 100), st.integers(1, 10), st.integers(0, 999))
@settings(max_examples=40)
def test_any_layer_with_rotated_inputs_puts_out_the_same(width: int, rows: int, seed: int) -> None:
    """x Wᵀ = (x Rᵀ)(W R⁻¹)ᵀ in float64, W R⁻¹ by NumPy; by the layer itself, whose R is float32, up to its rounding."""
    exact, x = randomized(nn.Linear(width, rows), seed), normal(5, width, seed=seed)
    layer, weight, before = copy.deepcopy(exact).float(), exact.weight.detach().clone(), exact(x).detach()
    rotation = rotate_inputs(exact)
    expected = weight.numpy() @ np.linalg.inv(rotation.numpy())
    np.testing.assert_allclose(exact.weight.detach().numpy(), expected, rtol=0, atol=1e-12)
    assert relative((x @ rotation.T) @ exact.weight.T + exact.bias - before, before) < 1e-12
    rotate_inputs(layer)
    assert relative(layer(x.float()) - before, before) < 1e-5
