"""SmoothQuant: eq. 4 in NumPy, and exactness on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import outputs, relative
from tiny_modules import Tiny, decoder_attention, hiera_attention, layer_norm, normal, randomized, relu_mlp
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.statistics import InputStatistics
from samq.quant.sites import fold_sites
from samq.quant.smooth import SMALLEST, fold_scale, magnitudes, multiply_inputs, smoothing_factors


def ranges(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (4 * torch.rand(width, generator=generator) - 2), torch.rand(width, generator=generator) + 0.01


def two_readers(width: int = 8, seed: int = 0) -> tuple[list[nn.Linear], list[InputStatistics], list[Tensor]]:
    """Two layers with inputs of their own: layers, statistics, rows."""
    generator = torch.Generator().manual_seed(seed)
    layers, statistics, rows = [], [], []
    for outputs_of_it in (4, 6):
        layer = nn.Linear(width, outputs_of_it)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs_of_it, width, generator=generator))
        x = torch.randn(50, width, generator=generator) * (1 + torch.arange(width))
        entry = InputStatistics.empty(width, False, x.device)
        entry.add(x)
        layers.append(layer)
        statistics.append(entry)
        rows.append(x)
    return layers, statistics, rows


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_factors_are_equation_4(alpha: float) -> None:
    inputs, weights = ranges(32)
    expected = inputs.double().numpy() ** alpha / weights.double().numpy() ** (1 - alpha)
    np.testing.assert_allclose(smoothing_factors(inputs, weights, alpha).numpy(), expected, rtol=1e-5)


def test_half_way_balances_both_ranges() -> None:
    inputs, weights = ranges(32)
    factors = smoothing_factors(inputs, weights, 0.5)
    torch.testing.assert_close(inputs / factors, weights * factors)


@given(st.integers(0, 1000), st.floats(0, 1), st.booleans())
def test_no_scale_of_a_channel_survives(seed: int, alpha: float, weights_only: bool) -> None:
    """x / s and W s are the same whatever a channel was multiplied by, and its weights divided by."""
    scale = ranges(8, seed + 1)[0]
    smoothed = []
    for factor in (torch.ones(8), scale):
        layers, statistics, rows = two_readers(seed=seed)
        for layer, entry in zip(layers, statistics, strict=True):
            entry.rescale(factor)
            layer.weight.data /= factor
        s = smoothing_factors(*magnitudes(layers, statistics, weights_only), alpha)
        smoothed.append((rows[0] * factor / s, layers[0].weight.detach() * s))
    torch.testing.assert_close(smoothed[1], smoothed[0], rtol=1e-3, atol=1e-5)


def test_magnitudes_are_the_largest_of_all_readers() -> None:
    layers, statistics, rows = two_readers()
    inputs, weights = magnitudes(layers, statistics, weights_only=False)
    np.testing.assert_array_equal(inputs.numpy(), np.abs(torch.cat(rows).numpy()).max(0))
    both = torch.cat([layer.weight.detach() for layer in layers]).numpy()
    np.testing.assert_array_equal(weights.numpy(), np.abs(both).max(0))


def test_magnitudes_are_averages_for_float_inputs() -> None:
    layers, statistics, rows = two_readers()
    inputs, weights = magnitudes(layers, statistics, weights_only=True)
    means = [np.abs(x.double().numpy()).mean(0) for x in rows]
    np.testing.assert_allclose(inputs.numpy(), np.maximum(*means), rtol=1e-5)
    columns = [np.sqrt((layer.weight.detach().double().numpy() ** 2).mean(0)) for layer in layers]
    np.testing.assert_allclose(weights.numpy(), np.maximum(*columns), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_get_finite_positive_factors(alpha: float) -> None:
    zeros = torch.zeros(3)
    for inputs, weights in [
        (zeros, torch.ones(3)),
        (torch.ones(3), zeros),
        (zeros, zeros),
        (-torch.inf + zeros, zeros),
    ]:
        factors = smoothing_factors(inputs, weights, alpha)
        assert torch.isfinite(factors).all()
        assert (factors >= SMALLEST).all()


@pytest.mark.parametrize("weights_only", [True, False])
def test_without_inputs_factors_are_finite(weights_only: bool) -> None:
    entry = InputStatistics.empty(8, False, torch.device("cpu"))
    factors = smoothing_factors(*magnitudes([nn.Linear(8, 4)], [entry], weights_only), 0.5)
    assert torch.isfinite(factors).all()
    assert (factors >= SMALLEST).all()


@pytest.mark.parametrize("seed", range(3))
def test_every_fold_together_is_exact(small_model: Sam2Model, seed: int) -> None:
    smoothed = copy.deepcopy(small_model)
    for index, site in enumerate(fold_sites(smoothed)):
        factors = ranges(site.rows[1] - site.rows[0], 100 * seed + index)[0]
        before = [layer.weight.clone() for layer in site.layers_in(smoothed)]
        fold_scale(smoothed, site, factors)
        for weight, layer in zip(before, site.layers_in(smoothed), strict=True):
            assert torch.equal(layer.weight, weight * factors)
            assert not torch.equal(layer.weight, weight)
    for after, before_it in zip(outputs(smoothed), outputs(small_model), strict=True):
        assert relative(after - before_it, before_it) < 2e-5


def test_a_channel_that_no_image_used_is_taken_to_be_like_the_others() -> None:
    inputs, weights = torch.tensor([1.0, 0.0, 3.0, 8.0, 0.0]), torch.ones(5)
    factors = smoothing_factors(inputs, weights, 0.5)
    assert factors.tolist() == pytest.approx([1, 3**0.5, 3**0.5, 8**0.5, 3**0.5])
    assert smoothing_factors(torch.zeros(5), weights, 0.5).unique().numel() == 1


KINDS: dict[str, Callable[[int, int], Tiny]] = {
    "LayerNorm": layer_norm,
    "values of the encoder": lambda width, seed: hiera_attention(width, 1 + seed % 3, seed),
    "values of the decoder": lambda width, seed: decoder_attention(width, 1 + seed % 3, seed),
    "ReLU": relu_mlp,
}


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(2, 24), st.integers(0, 999))
@settings(max_examples=25)
def test_a_fold_at_each_kind_of_site_is_exact(kind: str, width: int, seed: int) -> None:
    """In float64, with factors from 0.01 to 100; and had the source not taken them, the output would tell."""
    for source in (True, False):
        tiny = KINDS[kind](width, seed)
        before = tiny.run()
        for index, site in enumerate(tiny.sites):
            factors = ranges(site.rows[1] - site.rows[0], 10 * seed + index)[0].double()
            fold_scale(tiny.model, site, factors)
            if not source:
                undo = 1 / factors
                with torch.no_grad():
                    module, rows = site.source_in(tiny.model), slice(*site.rows)
                    module.bias[rows] /= undo
                    module.weight[rows] /= undo if isinstance(module, nn.LayerNorm) else undo[:, None]
        change = relative(tiny.run() - before, before)
        assert change < 1e-13 if source else change > 1e-3


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 999))
@settings(max_examples=40)
def test_a_product_in_front_of_a_layer_is_exact(width: int, rows: int, seed: int) -> None:
    """In float64: x Wᵀ + b = (x / s)(W diag(s))ᵀ + b, by the layer itself and by the equation."""
    layer, x = randomized(nn.Linear(width, rows), seed), normal(5, width, seed=seed)
    weight, before, factors = layer.weight.detach().clone(), layer(x), ranges(width, seed)[0].double()
    multiplier = multiply_inputs(layer, factors)
    assert torch.equal(multiplier, 1 / factors)
    assert torch.equal(layer.weight, weight * factors)
    assert relative(layer(x) - before, before) < 1e-13
    by_equation = (x * multiplier) @ layer.weight.T + layer.bias
    assert relative(by_equation - before, before) < 1e-13
