"""GPTQ against its equations: one column after another, each eliminated from an explicit inverse, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from samq.quant.gptq import factorize, gptq, gptq_together, inverse_cholesky, output_error
from samq.quant.grids import Grid, Scales, round_to_grid
from samq.quant.scales import choose_scales

GRIDS = {
    "sint4": Grid(4, True),
    "uint4": Grid(4, False),
    "sint8": Grid(8, True),
    "sint4 two-level": Grid(4, True, True),
    "uint4 two-level": Grid(4, False, True),
}
SHAPES = [(8, 16, 16), (6, 48, 16), (5, 40, 16), (4, 96, 96), (16, 33, 32)]
DAMPING = 0.01


def correlated(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight matrix and Σ x xᵀ of inputs with a few strong common directions, in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * inputs, 4, generator=generator) @ torch.randn(4, inputs, generator=generator)
    x += 0.3 * torch.randn(4 * inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), x.T @ x


def reference(
    weight: NDArray[np.float64], hessian: NDArray[np.float64], scales: Scales, grid: Grid, damping: float
) -> NDArray[np.float64]:
    """Codes by eq. 2 (δ) and eq. 3 (elimination of a row and column of H⁻¹), in the order of falling diagonal."""
    inputs = weight.shape[1]
    step, zero_point = (t.double().numpy() for t in scales.per_input(inputs))
    rest, codes = weight.copy(), np.empty_like(weight)
    diagonal = np.diag(hessian)
    inverse = np.linalg.inv(hessian + damping * diagonal.mean() * np.eye(inputs))
    for q in np.argsort(-diagonal, kind="stable"):
        code = np.clip(np.rint(rest[:, q] / step[:, q]) + zero_point[:, q], grid.qmin, grid.qmax)
        error = rest[:, q] - (code - zero_point[:, q]) * step[:, q]
        codes[:, q] = code
        rest -= np.outer(error / inverse[q, q], inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_codes_equal_the_reference(name: str, rows: int, inputs: int, group_size: int, block_size: int) -> None:
    grid, (weight, hessian) = GRIDS[name], correlated(rows, inputs)
    scales = choose_scales(weight, grid, group_size, hessian.diagonal())
    result = gptq(weight.double(), hessian.double(), scales, grid, block_size, DAMPING)
    expected = reference(weight.double().numpy(), hessian.double().numpy(), scales, grid, DAMPING)
    np.testing.assert_array_equal(result.weight.codes.numpy(), expected)
    assert result.weight.codes.dtype == grid.dtype
    assert result.weight.scales is scales
    assert result.damping == DAMPING
    rounded = round_to_grid(weight, scales, grid).codes.numpy()
    assert (rounded != expected).any(), "nothing was compensated, so nothing was tested"


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_float32_is_as_good_as_the_reference(name: str, rows: int, inputs: int, group_size: int) -> None:
    """In float32 a value next to a tie may round the other way; the output error must not suffer from it."""
    grid, (weight, hessian) = GRIDS[name], correlated(rows, inputs)
    scales = choose_scales(weight, grid, group_size)
    found = gptq(weight, hessian, scales, grid, 16, DAMPING).weight
    expected = reference(weight.double().numpy(), hessian.double().numpy(), scales, grid, DAMPING)
    assert np.mean(found.codes.numpy() != expected) < 0.02
    step, zero_point = scales.per_input(inputs)
    best = (torch.from_numpy(expected) - zero_point) * step
    error = output_error(weight.double() - found.dequantize().double(), hessian.double())
    assert error <= 1.01 * output_error(weight.double() - best, hessian.double())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("block_size", [7, 128])
def test_layers_together_get_the_codes_that_they_get_alone(
    name: str, rows: int, inputs: int, group_size: int, block_size: int
) -> None:
    grid = GRIDS[name]
    weights, hessians = zip(*(correlated(rows, inputs, seed) for seed in range(3)), strict=True)
    hessians = (hessians[0], hessians[1] * 100, torch.ones(inputs, inputs))  # the last one needs more damping
    scales = [choose_scales(weight, grid, group_size) for weight in weights]
    factors = [factorize(hessian, 1e-8) for hessian in hessians]
    found = gptq_together(weights, factors, scales, grid, block_size)
    for together, factor, *of_layer in zip(found, factors, weights, hessians, scales, strict=True):
        alone = gptq(*of_layer, grid, block_size, 1e-8)
        assert torch.equal(together.codes, alone.weight.codes)
        assert together.scales is alone.weight.scales
        assert factor.damping == alone.damping
    assert factors[2].damping > factors[0].damping


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here")
@pytest.mark.parametrize("block_size", [7, 16, 128])
def test_a_cuda_graph_is_as_good_as_the_cpu(block_size: int) -> None:
    grid = GRIDS["sint4 two-level"]
    weights, hessians = zip(*(correlated(64, 96, seed) for seed in range(3)), strict=True)
    scales = [choose_scales(weight.cuda(), grid, 32) for weight in weights]
    factors = [factorize(hessian.cuda(), DAMPING) for hessian in hessians]
    found = gptq_together([weight.cuda() for weight in weights], factors, scales, grid, block_size)
    for result, weight, hessian in zip(found, weights, hessians, strict=True):
        expected = gptq(weight, hessian, choose_scales(weight, grid, 32), grid, block_size, DAMPING).weight
        errors = [output_error(weight - of.dequantize().cpu(), hessian) for of in (result, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
        assert (result.codes.cpu() != expected.codes).float().mean() < 0.02


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_output_error_is_less_than_of_rounding_to_nearest(name: str, rows: int, inputs: int, group_size: int) -> None:
    grid = GRIDS[name]
    for seed in range(10):
        weight, hessian = correlated(rows, inputs, seed)
        scales = choose_scales(weight, grid, group_size, hessian.diagonal())
        compensated = gptq(weight, hessian, scales, grid, 128, DAMPING).weight.dequantize()
        rounded = round_to_grid(weight, scales, grid).dequantize()
        assert output_error(weight - compensated, hessian) < output_error(weight - rounded, hessian)


@pytest.mark.parametrize("name", GRIDS)
def test_uncorrelated_inputs_leave_rounding_to_nearest(name: str) -> None:
    grid, weight = GRIDS[name], torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    scales = choose_scales(weight, grid, 16)
    hessian = torch.diag(torch.arange(1.0, 33.0))
    codes = gptq(weight, hessian, scales, grid, 8, DAMPING).weight.codes
    assert torch.equal(codes, round_to_grid(weight, scales, grid).codes)


@pytest.mark.parametrize("damping", [1e-12, 1e-9])
@pytest.mark.parametrize("rank", [1, 3])
def test_failed_factorization_raises_the_damping(damping: float, rank: int) -> None:
    x = torch.randn(rank, 24, generator=torch.Generator().manual_seed(rank))
    hessian = x.T @ x  # singular, and the damping is below float32's resolution
    _, failed = torch.linalg.cholesky_ex(hessian + damping * hessian.diagonal().mean() * torch.eye(24))
    assert failed, "the Hessian factorizes, so nothing is tested"
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(9))
    scales = choose_scales(weight, Grid(4, True), 24)
    result = gptq(weight, hessian, scales, Grid(4, True), 128, damping)
    powers = np.log10(result.damping / damping)
    assert powers == pytest.approx(round(powers), abs=1e-6)
    assert damping < result.damping < 1e-2
    expected = gptq(weight, hessian, scales, Grid(4, True), 128, result.damping)
    assert torch.equal(result.weight.codes, expected.weight.codes)
    rounded = round_to_grid(weight, scales, Grid(4, True)).dequantize()
    assert output_error(weight - result.weight.dequantize(), hessian) < output_error(weight - rounded, hessian)


@pytest.mark.parametrize("inputs", [1, 5, 48])
def test_inverse_cholesky(inputs: int) -> None:
    hessian = correlated(1, inputs)[1].double()
    upper, damping = inverse_cholesky(hessian, DAMPING)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    assert damping == DAMPING
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(4, 4),
        torch.full((4, 4), torch.nan),
        torch.diag(torch.tensor([1.0, torch.inf, 1.0, 1.0])),
        3e38 * torch.eye(4),  # its mean overflows
    ],
    ids=["zero", "nan", "inf", "overflow"],
)
def test_hopeless_hessians_are_refused(hessian: Tensor) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        inverse_cholesky(hessian, DAMPING)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, hessian = correlated(4, 32)
    hessian[5], hessian[:, 5] = 0, 0
    scales = choose_scales(weight, Grid(4, True), 32)
    codes = gptq(weight, hessian, scales, Grid(4, True), 8, DAMPING).weight.codes
    assert torch.equal(codes[:, 5], round_to_grid(weight, scales, Grid(4, True)).codes[:, 5])


def test_output_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, difference = torch.randn(50, 12, generator=generator), torch.randn(3, 12, generator=generator)
    expected = float((difference.double() @ x.double().T).square().sum())
    assert output_error(difference, x.T @ x) == pytest.approx(expected, rel=1e-5)
