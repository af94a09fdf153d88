"""Rotation of attention values, folded offline (QuaRot, arXiv 2404.00456, section 4, stage 1c).

Attention mixes tokens, never channels of a head, so with an orthogonal R per head
    out = W_o · v = (W_o Rᵀ)(R v)
and R goes into the rows of v's projection, Rᵀ into the columns of the output projection. Widths of Hiera's heads are no
powers of two; the Kronecker product of a Hadamard matrix (2ⁿ) and an orthonormal DCT-II (the odd factor) is orthogonal,
and no entry is larger than √2/√width, so that one outlier is spread over the head.
"""

from __future__ import annotations

import scipy.fft  # type: ignore[import-untyped]
import scipy.linalg  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from samq.quant.sites import FoldSite


def spreading_rotation(width: int) -> Tensor:
    """Orthogonal [width, width] float64 matrix with entries of like size."""
    power = width & -width
    hadamard = torch.tensor(scipy.linalg.hadamard(power), dtype=torch.float64) / power**0.5
    odd = torch.tensor(scipy.fft.dct(torch.eye(width // power).numpy().astype("float64"), norm="ortho", axis=0))
    return torch.kron(hadamard, odd)


@torch.no_grad()
def rotate_values(model: nn.Module, site: FoldSite) -> Tensor:
    """Rotate the value heads of one attention; its output stays the same up to rounding.

    Args:
        site: a site with heads.

    Returns:
        R [K, K] in float64, by which the output projection's inputs are now multiplied.
    """
    assert site.heads is not None
    source, (output,) = site.source_in(model), site.layers_in(model)
    start, stop = site.rows
    of_head = spreading_rotation((stop - start) // site.heads).to(source.weight.device)
    rotation = torch.kron(torch.eye(site.heads, dtype=of_head.dtype, device=of_head.device), of_head)
    source.weight[start:stop] = (rotation @ source.weight[start:stop].double()).to(source.weight.dtype)
    source.bias[start:stop] = (rotation @ source.bias[start:stop].double()).to(source.bias.dtype)
    output.weight.copy_(output.weight.double() @ rotation.T)
    return rotation
