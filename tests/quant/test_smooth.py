"""SmoothQuant: eq. 4 in NumPy, and exactness on the whole model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_model import outputs, relative
from transformers import Sam2Model

from samq.quant.sites import fold_sites
from samq.quant.smooth import SMALLEST, smooth, smoothing_factors


def ranges(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (4 * torch.rand(width, generator=generator) - 2), torch.rand(width, generator=generator) + 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_factors_are_equation_4(alpha: float) -> None:
    inputs, weights = ranges(32)
    expected = inputs.double().numpy() ** alpha / weights.double().numpy() ** (1 - alpha)
    np.testing.assert_allclose(smoothing_factors(inputs, weights, alpha).numpy(), expected, rtol=1e-5)


def test_half_way_balances_both_ranges() -> None:
    inputs, weights = ranges(32)
    factors = smoothing_factors(inputs, weights, 0.5)
    torch.testing.assert_close(inputs / factors, weights * factors)


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


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_every_fold_together_is_exact(small_model: Sam2Model, alpha: float) -> None:
    smoothed = copy.deepcopy(small_model)
    for index, site in enumerate(fold_sites(smoothed)):
        absmax = ranges(site.rows[1] - site.rows[0], index)[0]
        before = [layer.weight.clone() for layer in site.layers_in(smoothed)]
        factors = smooth(smoothed, site, absmax, alpha)
        column = torch.stack([weight.abs().amax(0) for weight in before]).amax(0)
        assert torch.equal(factors, smoothing_factors(absmax, column, alpha))
        for weight, layer in zip(before, site.layers_in(smoothed), strict=True):
            assert torch.equal(layer.weight, weight * factors)
            assert not torch.equal(layer.weight, weight)
    for after, before_it in zip(outputs(smoothed), outputs(small_model), strict=True):
        assert relative(after - before_it, before_it) < 2e-5
