"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, the error spread over the columns still to come.

With H = Σ x xᵀ over the calibration inputs of the layer, minimizing ‖(W − Ŵ) X‖² one column q at a time gives (eq. 2)

    δ = −(w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_q,:

and the inverses that this needs, one per eliminated column, are the rows of the upper Cholesky factor of H⁻¹ (section
3.3, step 3). Updates reach the columns of a block at once and all later columns when the block is done (step 2).
Columns go in the order of falling Hessian diagonal (act-order); scales are chosen before, so groups are unaffected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from samq.quant.grids import Grid, QuantizedWeight, Scales

DAMPING_GROWTH = 10.0


@dataclass(frozen=True)
class GptqResult:
    """Quantized weight and the damping that its Hessian needed (fraction of the mean diagonal)."""

    weight: QuantizedWeight
    damping: float


def gptq(weight: Tensor, hessian: Tensor, scales: Scales, grid: Grid, block_size: int, damping: float) -> GptqResult:
    """Quantize a weight matrix against its layer's inputs.

    Args:
        weight: [N, K] float32.
        hessian: [K, K] symmetric positive semi-definite, Σ x xᵀ up to a factor.
        scales: chosen beforehand, see `samq.quant.scales`.
        grid: the format.
        block_size: columns handled before the rest is updated.
        damping: fraction of the mean diagonal added to the diagonal; multiplied by ten until the factorization
            succeeds.

    Raises:
        ValueError: the Hessian is zero or not finite.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse, used = inverse_cholesky(hessian[order][:, order], damping)
    # Transposed throughout, so that a column of the weight is contiguous in memory.
    step, zero_point = (t.T[order] for t in scales.per_input(weight.shape[1]))  # [K, N]
    rest = weight.T[order]
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), block_size):
        block = slice(start, min(start + block_size, len(rest)))
        with _one_thread():
            errors = _quantize_block(
                rest[block], codes[block], inverse[block, block], step[block], zero_point[block], grid
            )
        rest[block.stop :] -= inverse[block, block.stop :].T @ errors
    restored = torch.empty_like(weight)
    restored[:, order] = codes.T
    return GptqResult(QuantizedWeight(restored.to(grid.dtype), scales, grid), used)


def inverse_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper U with Uᵀ U = (H + d·mean(diag H)·I)⁻¹, and the d that was needed.

    Raises:
        ValueError: the Hessian is zero or not finite.
    """
    mean = hessian.diagonal().mean()
    if not (torch.isfinite(hessian).all() and torch.isfinite(mean) and mean > 0):
        raise ValueError("the Hessian is zero or not finite")
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, damping
        damping *= DAMPING_GROWTH


def _quantize_block(
    weight: Tensor, codes: Tensor, inverse: Tensor, step: Tensor, zero_point: Tensor, grid: Grid
) -> Tensor:
    """Quantize the columns of one block in place; returns each column's error over its pivot.

    Args:
        weight, codes, step, zero_point: [block, N], transposed.
        inverse: [block, block] upper triangular.
    """
    errors = torch.empty_like(weight)
    pivots = inverse.diagonal().tolist()
    for column, pivot in enumerate(pivots):
        value, size, zero = weight[column], step[column], zero_point[column]
        code = torch.round(value / size).add_(zero).clamp_(grid.qmin, grid.qmax)
        error = (code - zero).mul_(size).sub_(value).div_(-pivot)
        weight[column:].addr_(inverse[column, column:], error, alpha=-1)
        codes[column] = code
        errors[column] = error
    return errors


@contextmanager
def _one_thread() -> Iterator[None]:
    """A column's update is too small to share: on a busy machine, waiting for each other makes threads 20× slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """‖D X‖² = tr(D H Dᵀ) for a weight difference D [N, K] and H = Σ x xᵀ (GPTQ, eq. 1)."""
    return float(((difference @ hessian) * difference).sum())
