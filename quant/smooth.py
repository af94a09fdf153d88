"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the range of activation channels into the weights.

    y = (x diag(s)⁻¹)(diag(s) Wᵀ),   s_k = max|x_k|^α / max|w_:k|^(1−α)        (eq. 4)

diag(s)⁻¹ is folded into whatever produces x (see `samq.quant.sites`), so that nothing runs in addition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samq.quant.sites import FoldSite

SMALLEST = 1e-5


def smoothing_factors(input_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s [K] of eq. 4, from the largest magnitude of each input channel and of each weight column."""
    factors = input_absmax.clamp(min=SMALLEST) ** alpha / weight_absmax.clamp(min=SMALLEST) ** (1 - alpha)
    return factors.clamp(min=SMALLEST)


@torch.no_grad()
def smooth(model: nn.Module, site: FoldSite, input_absmax: Tensor, alpha: float) -> Tensor:
    """Smooth the layers of one site; the model's output stays the same up to rounding.

    Returns:
        s [K], by which the layers' inputs are now divided.
    """
    layers = site.layers_in(model)
    weight_absmax = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
    factors = smoothing_factors(input_absmax, weight_absmax, alpha)
    fold_scale(model, site, factors)
    return factors


@torch.no_grad()
def fold_scale(model: nn.Module, site: FoldSite, factors: Tensor) -> None:
    """Divide the inputs of a site's layers by `factors` [K] > 0 in its source, and multiply their columns by them."""
    for layer in site.layers_in(model):
        layer.weight *= factors
    source, rows = site.source_in(model), slice(*site.rows)
    scale = factors if source.weight.ndim == 1 else factors[:, None]
    source.weight[rows] /= scale
    source.bias[rows] /= factors
