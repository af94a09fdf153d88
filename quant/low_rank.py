"""SVDQuant's low-rank branch (Li et al., arXiv 2411.05007): W = L₁ L₂ + R, only R is quantized.

The best rank-r approximation in the Frobenius norm (eq. 6) takes the dominant part of the weight, outliers with it, and
leaves a residual with a smaller range. `compensated` alternates the branch and the quantizer, so that the branch also
makes up for the quantizer's error, and keeps the iterate with the least output error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samq.quant.gptq import output_error
from samq.quant.grids import QuantizedWeight

MAX_ROUNDS = 10


@dataclass(frozen=True)
class LowRank:
    """The branch x ↦ (x downᵀ) upᵀ; both factors hold FP16 numbers in float32.

    Args:
        down: [r, K].
        up: [N, r].
    """

    down: Tensor
    up: Tensor

    def product(self) -> Tensor:
        """up · down, [N, K]."""
        return self.up @ self.down

    def stored_bytes(self) -> int:
        """Bytes of both factors in FP16."""
        return 2 * (self.down.numel() + self.up.numel())


def truncated_svd(weight: Tensor, rank: int) -> LowRank:
    """The best rank-r approximation of a matrix, its singular values split evenly between the factors.

    The singular vectors are eigenvectors of the smaller Gram matrix, in float64, which is several times as fast as a
    full SVD and as exact for the few dominant ones.

    Args:
        weight: [N, K] float32.
        rank: 1 ≤ r ≤ min(N, K).
    """
    tall = weight.shape[0] > weight.shape[1]
    matrix = (weight.T if tall else weight).double()
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)  # [min(N, K), r]
    other = vectors.T @ matrix  # rows are σ vᵀ
    balance = other.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    left, right = vectors * balance, other / balance[:, None]
    up, down = (right.T, left.T) if tall else (left, right)
    return LowRank(down.half().float().contiguous(), up.half().float().contiguous())


def compensated(
    weight: Tensor, rank: int, quantize: Callable[[Tensor], QuantizedWeight], hessian: Tensor
) -> tuple[LowRank, QuantizedWeight]:
    """Alternate the branch and the quantizer until the output error stops falling; the best iterate is kept.

    Args:
        weight: [N, K] float32.
        rank: 1 ≤ r ≤ min(N, K).
        quantize: quantizer of the residual.
        hessian: [K, K], Σ x xᵀ of the layer's inputs.
    """
    best: tuple[LowRank, QuantizedWeight] | None = None
    least = torch.inf
    target = weight
    for _ in range(MAX_ROUNDS):
        branch = truncated_svd(target, rank)
        quantized = quantize(weight - branch.product())
        dequantized = quantized.dequantize()
        error = output_error(weight - branch.product() - dequantized, hessian)
        if best is not None and error >= least:
            break
        best, least = (branch, quantized), error
        target = weight - dequantized
    assert best is not None
    return best
