"""SVDQuant's low-rank branch (Li et al., arXiv 2411.05007): W = L₁ L₂ + R, only R is quantized.

The best rank-r approximation in the Frobenius norm (eq. 6) takes the dominant part of the weight, outliers with it, and
leaves a residual with a smaller range. That is what counts before rounding, whose error is as large as the range.

Afterwards the codes are known, and the best branch is that which leaves least of the layer's output: of D = W − Ŵ it is
to minimise ‖(D − L) X‖² = ‖(D − L) S‖² with S Sᵀ = X Xᵀ, so L is the truncated SVD of D S, times S⁻¹ (EoRA, Liu et al.,
arXiv 2410.21271, section 3; for a weight itself SVD-LLM, Wang et al., arXiv 2403.07378, section 3.1). With S diagonal,
channels count by their size and not by how they go together (L²QER, Zhang et al., arXiv 2402.02446, section 3.2).

Layers that read the same inputs may share `down` (`shared_down`): their weights stacked, [W₁; W₂] ≈ [U₁; U₂] V, are one
weight to all of these equations.

`compensated` alternates branch and quantizer, so that the branch makes up for the quantizer's error, and keeps the
iterate with the least output error.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samq.quant.gptq import DAMPING_GROWTH, output_error
from samq.quant.grids import QuantizedWeight

DAMPING = 0.01  # of the mean second moment; directions without inputs still count a little


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

    def stored_bytes(self, *, with_down: bool = True) -> int:
        """Bytes of both factors in FP16, or of `up` alone."""
        return 2 * (self.up.numel() + (self.down.numel() if with_down else 0))


@dataclass(frozen=True)
class InputRoot:
    """S with S Sᵀ = the second moments of a layer's inputs, up to a factor: ‖D S‖ is what D does to the output.

    Args:
        factor: float64, [K] the diagonal of S, or [K, K] lower triangular.
    """

    factor: Tensor

    def weigh(self, matrix: Tensor) -> Tensor:
        """D S of D [N, K]."""
        return matrix * self.factor if self.factor.ndim == 1 else matrix @ self.factor

    def unweigh(self, matrix: Tensor) -> Tensor:
        """D S⁻¹ of D [r, K]."""
        if self.factor.ndim == 1:
            return matrix / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=False, left=False)
        return solved


def input_root(hessian: Tensor, weighting: Literal["diagonal", "full"]) -> InputRoot:
    """The root of damped second moments; the damping grows tenfold until the factorization succeeds.

    Args:
        hessian: [K, K] symmetric positive semi-definite and not zero, Σ x xᵀ up to a factor.
        weighting: the root of its diagonal alone, or of all of it.
    """
    moments = hessian.double() / hessian.diagonal().double().mean()
    if weighting == "diagonal":
        return InputRoot((moments.diagonal() + DAMPING).sqrt())
    damping, identity = DAMPING, torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(moments + damping * identity)
        if not failed:
            return InputRoot(factor)
        damping *= DAMPING_GROWTH


def truncated_svd(weight: Tensor, rank: int, root: InputRoot | None = None) -> LowRank:
    """The rank-r approximation L with the least ‖(W − L) S‖, its singular values split evenly between the factors.

    The singular vectors are eigenvectors of the smaller Gram matrix, in float64, which is several times as fast as a
    full SVD and as exact for the few dominant ones.

    Args:
        weight: [N, K] float32.
        rank: 1 ≤ r ≤ min(N, K).
        root: S, or None for the identity.
    """
    weighted = weight.double() if root is None else root.weigh(weight.double())
    tall = weight.shape[0] > weight.shape[1]
    matrix = weighted.T if tall else weighted
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)  # [min(N, K), r]
    other = vectors.T @ matrix  # rows are σ vᵀ
    up, down = (other.T, vectors.T) if tall else (vectors, other)
    down = down if root is None else root.unweigh(down)
    smallest = torch.finfo(torch.float64).tiny
    norms = [factor.norm(dim=dim).clamp(min=smallest).sqrt() for factor, dim in ((up, 0), (down, 1))]
    up, down = up * (norms[1] / norms[0]), down * (norms[0] / norms[1])[:, None]
    return LowRank(down.half().float().contiguous(), up.half().float().contiguous())


def energies(weight: Tensor) -> Tensor:
    """Squared singular values [min(N, K)] of W in float64, the largest first: what each direction has of ‖W‖²."""
    matrix = (weight.T if weight.shape[0] > weight.shape[1] else weight).double()
    squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return squares.flip(0).clamp(min=0)


def compensated(
    weight: Tensor, rank: int, hessian: Tensor, root: InputRoot | None, rounds: int
) -> Generator[Tensor, QuantizedWeight, tuple[LowRank, QuantizedWeight]]:
    """Alternate the branch and the quantizer until the output error stops falling; the best iterate is returned.

    Both half steps are iterates: a branch with the codes of its own residual, and the next branch, which fits what
    these codes leave, with the codes as they are. With the full root no branch fits that better.

    Args:
        weight: [N, K] float32.
        rank: 1 ≤ r ≤ min(N, K).
        hessian: [K, K], Σ x xᵀ of the layer's inputs.
        root: of the second moments, by which what codes leave is fitted; None fits the weights.
        rounds: at most so many quantizations.

    Yields:
        what the branch leaves of the weight [N, K], to be sent back quantized.
    """
    best: tuple[LowRank, QuantizedWeight] | None = None
    least = torch.inf
    branch = truncated_svd(weight, rank)
    for _ in range(rounds):
        quantized = yield weight - branch.product()
        left = weight - quantized.dequantize()
        refitted = truncated_svd(left, rank, root)
        errors = {output_error(left - candidate.product(), hessian): candidate for candidate in (refitted, branch)}
        error = min(errors)
        if best is not None and error >= least:
            break
        best, least = (errors[error], quantized), error
        branch = refitted
    assert best is not None
    return best
