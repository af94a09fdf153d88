"""The α of smoothing with the least error of a layer's output, searched as in AWQ (arXiv 2306.00978, eq. 4 and 5).

    α* = argmin ‖Q(x diag(s)⁻¹) Q(W diag(s))ᵀ − x Wᵀ‖² / ‖x Wᵀ‖²,   s = s(α)

over the sample of the layer's inputs, with its own grids for activations and weights, and rounding to nearest: GPTQ for
every candidate would take as long as the quantization itself, many times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samq.calib.statistics import InputStatistics
from samq.quant.config import Recipe
from samq.quant.grids import round_to_grid
from samq.quant.inputs import input_grid
from samq.quant.plan import grid_of
from samq.quant.scales import choose_scales
from samq.quant.smooth import magnitudes, smoothing_factors

ALPHAS = tuple(tenths / 10 for tenths in range(11))


@torch.no_grad()
def best_alpha(
    layers: Sequence[nn.Linear],
    group_sizes: Sequence[int],
    statistics: Sequence[InputStatistics],
    recipes: Sequence[Recipe],
) -> float:
    """The one of ALPHAS with the least error, summed over layers that read the same inputs.

    Args:
        layers: float layers [N, K] of one site.
        group_sizes: of their weights.
        statistics: of their inputs; each has seen some.
        recipes: each layer's own (`Recipe.of_layer`), for formats of weights and activations.
    """
    inputs, weights = magnitudes(layers, statistics, recipes[0].weight_only)

    def error_of(alpha: float) -> float:
        factors = smoothing_factors(inputs, weights, alpha)
        parts = zip(layers, group_sizes, statistics, recipes, strict=True)
        return sum(rounding_error(layer.weight, size, entry, factors, own) for layer, size, entry, own in parts)

    return min(ALPHAS, key=error_of)


@torch.no_grad()
def rounding_error(
    weight: Tensor, group_size: int, statistics: InputStatistics, factors: Tensor, recipe: Recipe
) -> float:
    """‖Q(x diag(s)⁻¹) Q(W diag(s))ᵀ − x Wᵀ‖² / ‖x Wᵀ‖² on the sample; 0 when the layer puts out zeros.

    Args:
        weight: [N, K].
        statistics: of the inputs before smoothing.
        factors: s [K].
    """
    smoothed = statistics.rescaled(1 / factors)
    scaled = weight.float() * factors
    asked, grid = recipe.wgts.scales, grid_of(recipe)
    importance = smoothed.sample.square().sum(0) if asked.weighted else None
    scales = choose_scales(scaled, grid, group_size, importance, asked.norm)
    rounded = round_to_grid(scaled, scales, grid).dequantize()
    of_inputs = input_grid(recipe.ipts, scaled, smoothed)
    inputs = smoothed.sample if of_inputs is None else of_inputs.fake_quantize(smoothed.sample)
    exact = statistics.sample @ weight.float().T
    total = float(exact.square().sum())
    return float((inputs @ rounded.T - exact).square().sum()) / total if total > 0 else 0.0
