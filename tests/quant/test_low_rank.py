"""The low-rank branch against NumPy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from samq.quant.gptq import gptq, output_error
from samq.quant.grids import Grid, QuantizedWeight, round_to_grid
from samq.quant.low_rank import compensated, truncated_svd
from samq.quant.scales import choose_scales

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 7), (96, 16)]


def weight_with_outliers(rows: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(rows, inputs, generator=generator)
    weight[:, inputs // 2] *= 20
    return weight


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
def test_product_equals_the_truncated_svd(rows: int, inputs: int, rank: int) -> None:
    rank = min(rank, rows, inputs)
    weight = weight_with_outliers(rows, inputs)
    branch = truncated_svd(weight, rank)
    left, singular, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank]
    up, down = branch.up.double().numpy(), branch.down.double().numpy()
    of_rounding = 2.02 * 2**-11 * (np.abs(up) @ np.abs(down)) + 1e-7  # both factors are rounded to FP16
    assert (np.abs(up @ down - expected) <= of_rounding).all()
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.sqrt(singular[:rank]), rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(down, axis=1), np.sqrt(singular[:rank]), rtol=1e-3)


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_factors_are_fp16_of_the_right_shape(rows: int, inputs: int) -> None:
    branch = truncated_svd(weight_with_outliers(rows, inputs), 1)
    assert branch.up.shape == (rows, 1)
    assert branch.down.shape == (1, inputs)
    for factor in (branch.up, branch.down):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        assert torch.equal(factor.half().float(), factor)
    assert branch.stored_bytes() == 2 * (rows + inputs)


@pytest.mark.parametrize("rank", [1, 4])
def test_rank_deficient_and_zero_matrices(rank: int) -> None:
    assert not truncated_svd(torch.zeros(8, 12), rank).product().any()
    outer = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 13.0))
    torch.testing.assert_close(truncated_svd(outer, rank).product(), outer, rtol=2e-3, atol=2e-3)


def test_the_branch_takes_the_outliers() -> None:
    weight = weight_with_outliers(48, 64)
    residual = weight - truncated_svd(weight, 4).product()
    assert float(residual.abs().max()) < 0.3 * float(weight.abs().max())


def hessian_of(inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(4 * inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    return x.T @ (x @ (torch.eye(inputs) + 0.1))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(32, 48, 4), (48, 32, 8), (24, 96, 2)])
def test_compensation_is_never_worse_than_one_round(method: str, rows: int, inputs: int, rank: int) -> None:
    grid, gains = Grid(4, True), []
    for seed in range(6):
        weight = weight_with_outliers(rows, inputs, seed)
        hessian = hessian_of(inputs, seed)
        hessian = (hessian + hessian.T) / 2

        def quantize(residual: Tensor, hessian: Tensor = hessian) -> QuantizedWeight:
            scales = choose_scales(residual, grid, 16, hessian.diagonal())
            if method == "rtn":
                return round_to_grid(residual, scales, grid)
            return gptq(residual, hessian, scales, grid, 128, 0.01).weight

        once = truncated_svd(weight, rank)
        after_one = output_error(weight - once.product() - quantize(weight - once.product()).dequantize(), hessian)
        branch, quantized = compensated(weight, rank, quantize, hessian)
        assert torch.equal(quantized.codes, quantize(weight - branch.product()).codes)
        after_all = output_error(weight - branch.product() - quantized.dequantize(), hessian)
        assert after_all <= after_one
        gains.append(after_one / after_all)
    assert max(gains) > 1.02, "compensation never gained anything"
