"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, the error spread over the columns still to come.

With H = Σ x xᵀ over the calibration inputs of the layer, minimizing ‖(W − Ŵ) X‖² one column q at a time gives (eq. 2)

    δ = −(w_q − quant(w_q)) / [H⁻¹]_qq · (H⁻¹)_q,:

and the inverses that this needs, one per eliminated column, are the rows of the upper Cholesky factor of H⁻¹ (section
3.3, step 3). Updates reach the columns of a block at once and all later columns when the block is done (step 2).
Columns go in the order of falling Hessian diagonal (act-order); scales are chosen before, so groups are unaffected.

Layers of one shape go through the columns together: on a GPU a column of one layer is far too little work. There, the
columns of a block are a CUDA graph, too, for launching them one by one from Python takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from samq.quant.grids import Grid, QuantizedWeight, Scales

DAMPING_GROWTH = 10.0
WARM_UPS = 2  # runs before a capture, in which libraries allocate their workspaces
GRAPHS = 8  # that are kept for further layers; each holds five matrices of a block

BlockRunner = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Factor:
    """What GPTQ wants to know of a Hessian, whatever weights are rounded against it.

    Args:
        order: [K] the inputs by falling diagonal.
        inverse: [K, K] upper Cholesky factor of the damped Hessian's inverse, in that order.
        damping: fraction of the mean diagonal that was added.
    """

    order: Tensor
    inverse: Tensor
    damping: float


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
    factor = factorize(hessian, damping)
    (quantized,) = gptq_together([weight], [factor], [scales], grid, block_size)
    return GptqResult(quantized, factor.damping)


def factorize(hessian: Tensor, damping: float) -> Factor:
    """A Hessian in the form that `gptq_together` takes; arguments and errors as for `gptq`."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return Factor(order, *inverse_cholesky(hessian[order][:, order], damping))


def gptq_together(
    weights: Sequence[Tensor], factors: Sequence[Factor], scales: Sequence[Scales], grid: Grid, block_size: int
) -> list[QuantizedWeight]:
    """`gptq` of several layers of one shape, column by column at the same time; the same codes as one by one.

    Args:
        weights: B of [N, K] float32.
        factors: B, of [K, K].
        scales: B; as for `gptq`, like the rest.
    """
    inputs = weights[0].shape[1]
    # Transposed throughout, so that a column of the weight is contiguous in memory.
    spread = [of_layer.per_input(inputs) for of_layer in scales]
    step, zero_point = (
        torch.stack([tensors[which].T[factor.order] for tensors, factor in zip(spread, factors, strict=True)])
        for which in (0, 1)
    )
    rest = torch.stack([weight.T[factor.order] for weight, factor in zip(weights, factors, strict=True)])
    inverses = torch.stack([factor.inverse for factor in factors])
    codes = _all_columns(rest, inverses, step.to(rest), zero_point.to(rest), grid, block_size)
    results = []
    for weight, factor, found, own in zip(weights, factors, codes, scales, strict=True):
        restored = torch.empty_like(weight)
        restored[:, factor.order] = found.T
        results.append(QuantizedWeight(restored.to(grid.dtype), own, grid))
    return results


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


def _all_columns(
    rest: Tensor, inverse: Tensor, step: Tensor, zero_point: Tensor, grid: Grid, block_size: int
) -> Tensor:
    """Codes [B, K, N] of weights [B, K, N], which are used up; `inverse` [B, K, K] is upper triangular."""
    columns = rest.shape[1]
    codes = torch.empty_like(rest)
    run = _runner(rest, grid, min(block_size, columns))
    for start in range(0, columns, block_size):
        block = slice(start, min(start + block_size, columns))
        codes[:, block], errors = run(rest[:, block], inverse[:, block, block], step[:, block], zero_point[:, block])
        rest[:, block.stop :].baddbmm_(inverse[:, block, block.stop :].mT, errors, alpha=-1)
    return codes


def _block_columns(
    weight: Tensor, inverse: Tensor, step: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Codes of the columns of one block, and each column's error over its pivot, both [B, block, N].

    Args:
        weight: [B, block, N], transposed; used up.
        inverse: [B, block, block] upper triangular.
        step, zero_point: [B, block, N].
    """
    codes, errors = torch.empty_like(step), torch.empty_like(step)
    pivots = inverse.diagonal(dim1=1, dim2=2)[..., None]  # [B, block, 1]
    for column in range(weight.shape[1]):
        value, size, zero = weight[:, column], step[:, column], zero_point[:, column]
        code = torch.round(value / size).add_(zero).clamp_(grid.qmin, grid.qmax)
        error = torch.sub(value, (code - zero).mul_(size), out=errors[:, column]).div_(pivots[:, column])
        weight[:, column:].baddbmm_(inverse[:, column, column:, None], error[:, None], alpha=-1)
        codes[:, column] = code
    return codes, errors


def _runner(rest: Tensor, grid: Grid, block_size: int) -> BlockRunner:
    """`_block_columns` in the form that suits the device of `rest` [B, K, N]."""

    def plain(weight: Tensor, inverse: Tensor, step: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        with _one_thread():
            return _block_columns(weight, inverse, step, zero_point, grid)

    if not rest.is_cuda:
        return plain
    captured = _captured(rest.device, rest.dtype, (len(rest), block_size, rest.shape[2]), grid)

    def fitting(weight: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return (captured if weight.shape[1] == block_size else plain)(weight, *others)

    return fitting


@lru_cache(maxsize=GRAPHS)
def _captured(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], grid: Grid) -> BlockRunner:
    """`_block_columns` of a whole block as a CUDA graph; what it returns is overwritten by its next run.

    Args:
        shape: of the block of weights, [B, block, N].
    """
    weight, step, zero_point = (torch.ones(shape, dtype=dtype, device=device) for _ in range(3))
    inverse = torch.eye(shape[1], dtype=dtype, device=device).repeat(shape[0], 1, 1)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            _block_columns(weight, inverse, step, zero_point, grid)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, errors = _block_columns(weight, inverse, step, zero_point, grid)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        for buffer, given in zip((weight, inverse, step, zero_point), inputs, strict=True):
            buffer.copy_(given)
        graph.replay()
        return codes, errors

    return run


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
