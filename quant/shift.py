"""Channel-wise shifting (Outlier Suppression+, Wei et al., arXiv 2304.09145): ranges that lie around zero.

Outlier channels are often far from zero on one side. With each channel's middle taken away (eq. 1 and 2),

    x Wᵀ + b = (x − z) Wᵀ + (b + W z),   z_k = (max x_k + min x_k) / 2

a channel is as wide as its values differ, no wider, and W z is added in full precision. −z is folded into the bias of
whatever produces x (see `samq.quant.sites`), so that nothing runs in addition. It comes before smoothing, whose factors
are then those of the centred channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samq.quant.sites import FoldSite


def middle(low: Tensor, high: Tensor) -> Tensor:
    """z [K] of eq. 2, from the smallest and the largest input of each channel."""
    return (high + low) / 2


@torch.no_grad()
def fold_offset(model: nn.Module, site: FoldSite, offset: Tensor) -> None:
    """Subtract `offset` [K] from the inputs of a site's layers in its source's bias, and add it in their own.

    Args:
        site: a site that takes an offset.
    """
    assert site.takes_offset
    site.source_in(model).bias[slice(*site.rows)] -= offset
    for layer in site.layers_in(model):
        layer.bias.add_((layer.weight.double() @ offset.double()).to(layer.bias.dtype))
