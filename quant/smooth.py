"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the range of activation channels into the weights.

    y = (x diag(s)⁻¹)(diag(s) Wᵀ),   s_k = max|x_k|^α / max|w_:k|^(1−α)        (eq. 4)

diag(s)⁻¹ is folded into whatever produces x (see `samq.quant.sites`), so that nothing runs in addition; where nothing
can take it, it may stay as a product in front of the layer. With float activations it still pays: columns that matter
are enlarged and lose less of themselves to rounding, as in AWQ (Lin et al., arXiv 2306.00978, section 3.2). Whatever
scale a channel had before, x diag(s)⁻¹ and W diag(s) come out the same: no outlier channel survives, at any α.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samq.calib.statistics import InputStatistics
from samq.quant.sites import FoldSite

SMALLEST = 1e-5


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s [K] of eq. 4, from a magnitude of each input channel and of each weight column.

    A channel that no image used, as there are behind ReLU, is taken to be like the others: one that does would
    otherwise find it enlarged ten-thousandfold.
    """
    used = inputs > 0
    if used.any():
        inputs = torch.where(used, inputs, inputs[used].median())
    factors = inputs.clamp(min=SMALLEST) ** alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)
    return factors.clamp(min=SMALLEST)


@torch.no_grad()
def magnitudes(
    layers: Sequence[nn.Linear], statistics: Sequence[InputStatistics], weights_only: bool
) -> tuple[Tensor, Tensor]:
    """What eq. 4 compares: magnitudes [K] of inputs and weight columns, the larger ones where layers share inputs.

    These are the largest values, which decide on the steps of both grids. Where the inputs stay float, no step of
    theirs is at stake, and averages tell better how much a channel matters: mean|x| and the column's root mean square.
    """
    if weights_only:
        inputs = [entry.sample.abs().sum(0) / max(1, len(entry.sample)) for entry in statistics]
        columns = [layer.weight.square().mean(0).sqrt() for layer in layers]
    else:
        inputs = [entry.absmax() for entry in statistics]
        columns = [layer.weight.abs().amax(0) for layer in layers]
    return torch.stack(inputs).amax(0), torch.stack(columns).amax(0)


@torch.no_grad()
def fold_scale(model: nn.Module, site: FoldSite, factors: Tensor) -> None:
    """Divide the inputs of a site's layers by `factors` [K] > 0 in its source, and multiply their columns by them."""
    for layer in site.layers_in(model):
        layer.weight *= factors
    source, rows = site.source_in(model), slice(*site.rows)
    scale = factors if source.weight.ndim == 1 else factors[:, None]
    source.weight[rows] /= scale
    source.bias[rows] /= factors


@torch.no_grad()
def multiply_inputs(layer: nn.Linear, factors: Tensor) -> Tensor:
    """Divide a layer's inputs by `factors` [K] > 0 whenever it runs, and multiply its columns by them.

    Returns:
        what the inputs are multiplied by, [K].
    """
    multiplier = 1 / factors
    layer.weight *= factors
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * multiplier,))
    return multiplier
