"""The low-rank branch against NumPy's SVD and, weighted by inputs, against the papers' equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from samq.quant.gptq import gptq, output_error
from samq.quant.grids import Grid, QuantizedWeight, round_to_grid
from samq.quant.low_rank import DAMPING, InputRoot, LowRank, compensated, energies, input_root, truncated_svd
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
    """Σ x xᵀ of channels that differ in size and go together."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(4 * inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    x = x @ (torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=generator))
    return x.T @ x


def weighted_error(difference: Tensor, hessian: Tensor) -> float:
    """‖D S‖² with the damped moments of `input_root`, straight from its definition."""
    moments = hessian.double().numpy()
    moments = moments / np.diag(moments).mean() + DAMPING * np.eye(len(moments))
    d = difference.double().numpy()
    return float(np.trace(d @ moments @ d.T))


def svd_llm(weight: Tensor, hessian: Tensor, rank: int) -> NDArray[np.float64]:
    """SVD-LLM, arXiv 2403.07378, algorithm 1: truncate the SVD of W S, then undo S."""
    moments = hessian.double().numpy()
    root = np.linalg.cholesky(moments / np.diag(moments).mean() + DAMPING * np.eye(len(moments)))
    left, singular, right = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    product: NDArray[np.float64] = (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.inv(root)
    return product


def l2qer(weight: Tensor, hessian: Tensor, rank: int) -> NDArray[np.float64]:
    """L²QER, arXiv 2402.02446, eq. 9 to 11: the same with a diagonal S."""
    diagonal = hessian.double().diagonal().numpy()
    root = np.sqrt(diagonal / diagonal.mean() + DAMPING)
    left, singular, right = np.linalg.svd(weight.double().numpy() * root, full_matrices=False)
    product: NDArray[np.float64] = (left[:, :rank] * singular[:rank]) @ right[:rank] / root
    return product


@pytest.mark.parametrize(("weighting", "reference"), [("full", svd_llm), ("diagonal", l2qer)])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_weighted_branch_equals_the_papers(
    weighting: Literal["diagonal", "full"],
    reference: Callable[[Tensor, Tensor, int], NDArray[np.float64]],
    rows: int,
    inputs: int,
    rank: int,
) -> None:
    rank = min(rank, rows, inputs)
    weight, hessian = weight_with_outliers(rows, inputs), hessian_of(inputs, 0)
    branch = truncated_svd(weight, rank, input_root(hessian, weighting))
    up, down = branch.up.double().numpy(), branch.down.double().numpy()
    of_rounding = 2.02 * 2**-11 * (np.abs(up) @ np.abs(down)) + 1e-6
    assert (np.abs(up @ down - reference(weight, hessian, rank)) <= of_rounding).all()
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=2e-3)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_other_branch_leaves_less_of_the_output(rows: int, inputs: int, seed: int, data: st.DataObject) -> None:
    """Neither plain and diagonal SVD nor a branch beside the best one does, and what is left is the energies' rest."""
    rank = data.draw(st.integers(1, min(rows, inputs)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(2 * inputs, inputs, generator=generator) @ mix
    hessian = x.T @ x
    root = input_root(hessian, "full")
    best = truncated_svd(weight, rank, root)
    left = weighted_error(weight - best.product(), hessian)
    total = weighted_error(weight, hessian)
    rest = float(energies(root.weigh(weight.double()))[rank:].sum())
    of_rounding = 1e-3 * weighted_error(best.product(), hessian) ** 0.5
    assert left**0.5 == pytest.approx(rest**0.5, abs=10 * of_rounding + 1e-5 * total**0.5)
    noise = LowRank(best.down, best.up + 0.05 * torch.randn(best.up.shape, generator=generator))
    for other in (truncated_svd(weight, rank), truncated_svd(weight, rank, input_root(hessian, "diagonal")), noise):
        assert rest <= weighted_error(weight - other.product(), hessian) * (1 + 1e-4) + 1e-6 * total


@given(st.integers(1, 16), st.integers(1, 16), st.sampled_from(["diagonal", "full"]), st.integers(0, 999))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weighing_is_undone(rows: int, inputs: int, weighting: Literal["diagonal", "full"], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = input_root(hessian_of(inputs, seed), weighting)
    matrix = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(root.unweigh(root.weigh(matrix)), matrix, rtol=1e-9, atol=1e-9)


def test_inputs_of_low_rank_and_dead_channels_have_a_root() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    weight = weight_with_outliers(8, 16)
    for weighting in ("diagonal", "full"):
        branch = truncated_svd(weight, 4, input_root(x.T @ x, weighting))
        assert torch.isfinite(branch.product()).all()
    assert output_error(weight - branch.product(), x.T @ x) < 1e-4 * output_error(weight, x.T @ x)


def test_equal_inputs_make_the_weighted_branch_the_plain_one() -> None:
    weight = weight_with_outliers(12, 20)
    for weighting in ("diagonal", "full"):
        branch = truncated_svd(weight, 4, input_root(3 * torch.eye(20), weighting))
        torch.testing.assert_close(branch.product(), truncated_svd(weight, 4).product(), rtol=2e-3, atol=1e-3)


def quantizer(method: str, hessian: Tensor) -> Callable[[Tensor], QuantizedWeight]:
    grid = Grid(4, True)

    def quantize(residual: Tensor) -> QuantizedWeight:
        scales = choose_scales(residual, grid, 16, hessian.diagonal())
        if method == "rtn":
            return round_to_grid(residual, scales, grid)
        return gptq(residual, hessian, scales, grid, 128, 0.01).weight

    return quantize


def driven(
    alternation: Generator[Tensor, QuantizedWeight, tuple[LowRank, QuantizedWeight]],
    quantize: Callable[[Tensor], QuantizedWeight],
) -> tuple[LowRank, QuantizedWeight]:
    """What an alternation returns that gets its residuals quantized."""
    residual = next(alternation)
    while True:
        try:
            residual = alternation.send(quantize(residual))
        except StopIteration as end:
            branch, quantized = end.value
            return branch, quantized


def alternated(
    weight: Tensor, rank: int, quantize: Callable[[Tensor], QuantizedWeight], hessian: Tensor, root: InputRoot | None
) -> list[float]:
    """Output errors of all half steps of ten rounds."""
    branch, errors = truncated_svd(weight, rank), []
    for _ in range(10):
        codes = quantize(weight - branch.product()).dequantize()
        refitted = truncated_svd(weight - codes, rank, root)
        errors += [output_error(weight - each.product() - codes, hessian) for each in (branch, refitted)]
        branch = refitted
    return errors


@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(32, 48, 4), (48, 32, 8), (24, 96, 2)])
def test_compensation_keeps_the_best_iterate(
    weighting: Literal["none", "diagonal", "full"], method: str, rows: int, inputs: int, rank: int
) -> None:
    gains = []
    for seed in range(4):
        weight, hessian = weight_with_outliers(rows, inputs, seed), hessian_of(inputs, seed)
        root = None if weighting == "none" else input_root(hessian, weighting)
        quantize = quantizer(method, hessian)
        errors = alternated(weight, rank, quantize, hessian, root)
        branch, quantized = driven(compensated(weight, rank, hessian, root), quantize)
        reached = output_error(weight - branch.product() - quantized.dequantize(), hessian)
        per_round = [min(errors[i : i + 2]) for i in range(0, len(errors), 2)]
        rounds = next((i for i in range(1, 10) if per_round[i] >= min(per_round[:i])), 10)
        assert reached == pytest.approx(min(per_round[:rounds]), rel=1e-6)
        gains.append(errors[0] / reached)
        if weighting == "full":  # given the codes, no branch is better than the refitted one
            assert all(after <= before * 1.001 for before, after in zip(errors[::2], errors[1::2], strict=True))
    assert min(gains) >= 1
    assert max(gains) > 1.02, "compensation never gained anything"


@pytest.mark.parametrize("rounds", [1, 10])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weighting_by_the_inputs_lowers_the_output_error(method: str, rounds: int) -> None:
    left: dict[str, float] = {}
    for weighting in ("none", "diagonal", "full"):
        for seed in range(4):
            weight, hessian = weight_with_outliers(32, 48, seed), hessian_of(48, seed)
            root = None if weighting == "none" else input_root(hessian, weighting)
            branch, quantized = driven(compensated(weight, 4, hessian, root, rounds), quantizer(method, hessian))
            error = output_error(weight - branch.product() - quantized.dequantize(), hessian)
            left[weighting] = left.get(weighting, 0) + error / output_error(weight, hessian)
    assert left["full"] < min(left["diagonal"], left["none"])
    assert left["diagonal"] < left["none"] * (1.0 if method == "rtn" else 1.02)
