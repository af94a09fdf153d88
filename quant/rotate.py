"""Rotations (QuaRot, arXiv 2404.00456): activations whose channels are all of like size.

Attention values (section 4, stage 1c), folded offline. Attention mixes tokens, never channels of a head; with an
orthogonal R per head
    out = W_o · v = (W_o Rᵀ)(R v)
and R goes into the rows of v's projection, Rᵀ into the columns of the output projection.

Residual streams (stage 1a) are in `samq.quant.streams`. Where a Hadamard matrix of a width can be had it is R, and one
outlier is spread evenly. Elsewhere R is the Kronecker product of a Hadamard matrix (2ⁿ) and an orthonormal DCT-II (the
odd factor), of which no entry is larger than √2/√width.

Other inputs, at run time and on request (stage 1b). GELU and pooling do not let a rotation pass, LayerNorm only where
its whole stream is rotated. There R is a product in front of the layer:
    x Wᵀ = (x Rᵀ)(W R⁻¹)ᵀ
This R has entries that FP16 holds, so that all engines have the same. That changes nothing but a common factor of a
Hadamard matrix; W gets the exact inverse of what is left in any case.
"""

from __future__ import annotations

from functools import lru_cache

import scipy.fft  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samq.quant.hadamard import hadamard
from samq.quant.sites import FoldSite

CPU = torch.device("cpu")


def spreading_rotation(width: int) -> Tensor:
    """Orthogonal [width, width] float64 matrix with entries of like size."""
    whole = hadamard(width)
    if whole is not None:
        return whole.div(width**0.5)
    power = width & -width
    part = hadamard(power)
    assert part is not None
    odd = torch.tensor(scipy.fft.dct(torch.eye(width // power).numpy().astype("float64"), norm="ortho", axis=0))
    return torch.kron(part / power**0.5, odd)


def mean_keeping_rotation(width: int, seed: int = 0) -> Tensor:
    """Orthogonal R [width, width] in float64 with entries of like size and R 1 = 1.

    A token's mean and deviation are the same in the new basis, and so LayerNorm without gain commutes with R. R is a
    spreading H, rows signed such that H 1 = √n e₀, and then the reflection that takes √n e₀ to 1.

    Args:
        width: n.
        seed: of the rows' signs, without which the first column stayed where it is.
    """
    spreading = spreading_rotation(width)
    spreading = spreading * torch.sign(spreading[0])
    signs = 2.0 * torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(seed)) - 1.0
    signs[0] = 1
    rotation = spreading * signs
    normal = torch.full((width, 1), -(width**-0.5), dtype=torch.float64)
    normal[0] += 1
    if width == 1:
        return rotation
    return rotation - normal @ (normal.T @ rotation) * (2 / normal.square().sum())


@lru_cache(maxsize=16)  # of a model's widths; layers of one width share the tensor
def runtime_rotation(width: int, device: torch.device = CPU) -> Tensor:
    """`spreading_rotation` as engines store it, [width, width] in float32: every entry is an FP16 number."""
    return spreading_rotation(width).half().float().to(device)


@lru_cache(maxsize=4)  # of the blocks of a stage; those of SAM2.1-large take up to 170 MB
def _inverse(width: int) -> Tensor:
    """R⁻¹ of `runtime_rotation`, [width, width] in float64."""
    inverse: Tensor = torch.linalg.inv(runtime_rotation(width).double())
    return inverse


@torch.no_grad()
def rotate_inputs(layer: nn.Linear) -> Tensor:
    """Rotate a layer's inputs whenever it runs, and turn its columns back.

    Returns:
        R [K, K] in float64, by which the inputs are multiplied.
    """
    width, weight = layer.in_features, layer.weight
    rotation = runtime_rotation(width, weight.device)
    weight.copy_(weight.double() @ _inverse(width).to(weight.device))
    layer.register_forward_pre_hook(lambda _, inputs: (F.linear(inputs[0], rotation),))
    return rotation.double()


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
