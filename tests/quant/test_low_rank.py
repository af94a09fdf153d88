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
from samq.quant.low_rank import DAMPING, LowRank, compensated, energies, input_root, truncated_svd
from samq.quant.scales import choose_scales

Array = NDArray[np.float64]
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


def svd_llm(weight: Tensor, hessian: Tensor, rank: int) -> Array:
    """SVD-LLM, arXiv 2403.07378, algorithm 1: truncate the SVD of W S, then undo S."""
    moments = hessian.double().numpy()
    root = np.linalg.cholesky(moments / np.diag(moments).mean() + DAMPING * np.eye(len(moments)))
    left, singular, right = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    product: Array = (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.inv(root)
    return product


def l2qer(weight: Tensor, hessian: Tensor, rank: int) -> Array:
    """L²QER, arXiv 2402.02446, eq. 9 to 11: the same with a diagonal S."""
    diagonal = hessian.double().diagonal().numpy()
    root = np.sqrt(diagonal / diagonal.mean() + DAMPING)
    left, singular, right = np.linalg.svd(weight.double().numpy() * root, full_matrices=False)
    product: Array = (left[:, :rank] * singular[:rank]) @ right[:rank] / root
    return product


@pytest.mark.parametrize(("weighting", "reference"), [("full", svd_llm), ("diagonal", l2qer)])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_weighted_branch_equals_the_papers(
    weighting: Literal["diagonal", "full"],
    reference: Callable[[Tensor, Tensor, int], Array],
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
@settings(max_examples=40)
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
@settings(max_examples=40)
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


GRID, GROUP_SIZE = Grid(4, True), 16


def quantizer(method: str, hessian: Tensor) -> Callable[[Tensor], QuantizedWeight]:
    """Rounding to nearest with scales that clip nothing, or GPTQ in float64."""

    def quantize(residual: Tensor) -> QuantizedWeight:
        if method == "rtn":
            return round_to_grid(residual, choose_scales(residual, GRID, GROUP_SIZE, norm=None), GRID)
        scales = choose_scales(residual, GRID, GROUP_SIZE, hessian.diagonal())
        return gptq(residual.double(), hessian.double(), scales, GRID, 128, 0.01).weight

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


def nearest(weight: Array) -> Array:
    """Q(W) of rounding to nearest: each group's largest magnitude is the highest code times an FP16 step."""
    rows, inputs = weight.shape
    groups = weight.reshape(rows, inputs // GROUP_SIZE, GROUP_SIZE)
    step = np.float16(np.abs(groups).max(-1, keepdims=True) / 7).astype(np.float64)
    codes: Array = np.clip(np.rint(groups / step), -8, 7)
    return (codes * step).reshape(rows, inputs)


def in_fp16(left: Array, right: Array) -> Array:
    """The product of two factors [N, r] and [r, K] as they are stored: in FP16, columns and rows of one length."""
    balance = np.sqrt(np.linalg.norm(right, axis=1) / np.linalg.norm(left, axis=0))
    up, down = np.float16(left * balance), np.float16(right / balance[:, None])
    product: Array = up.astype(np.float64) @ down.astype(np.float64)
    return product


def best_branch(difference: Array, rank: int, root: Array) -> Array:
    """The L of rank r with the least ‖(D − L) S‖: SVDQuant's eq. 6 with S = I, EoRA's section 3 with S Sᵀ = X Xᵀ."""
    left, singular, right = np.linalg.svd(difference @ root, full_matrices=False)
    return in_fp16(left[:, :rank] * singular[:rank], right[:rank] @ np.linalg.inv(root))


def alternated(
    weight: Array, rank: int, quantize: Callable[[Array], Array], hessian: Array, root: Array
) -> list[tuple[float, float]]:
    """‖(W − L − Q) X‖² of ten rounds: Q of what L leaves, then the next L, which fits what Q leaves.

    LoftQ, arXiv 2310.08659, algorithm 1, with SVDQuant's start.
    """
    branch, errors = best_branch(weight, rank, np.eye(weight.shape[1])), []
    for _ in range(10):
        codes = quantize(weight - branch)
        refitted = best_branch(weight - codes, rank, root)
        left = [weight - each - codes for each in (branch, refitted)]
        errors.append((np.trace(left[0] @ hessian @ left[0].T), np.trace(left[1] @ hessian @ left[1].T)))
        branch = refitted
    return errors


def root_of(hessian: Array, weighting: Literal["none", "diagonal", "full"]) -> Array:
    """S [K, K], of damped second moments as `svd_llm` and `l2qer` have them; the identity without a weighting."""
    moments = hessian / np.diag(hessian).mean() + DAMPING * np.eye(len(hessian))
    if weighting == "full":
        factor: Array = np.linalg.cholesky(moments)
        return factor
    return np.diag(np.sqrt(np.diag(moments))) if weighting == "diagonal" else np.eye(len(hessian))


@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(32, 48, 4), (48, 32, 8), (24, 96, 2)])
def test_compensation_keeps_the_best_iterate(
    weighting: Literal["none", "diagonal", "full"], method: str, rows: int, inputs: int, rank: int
) -> None:
    """Of the alternation in float64 up to the first round without a gain; GPTQ has a reference of its own.

    A number half way between two of FP16 or two codes may be rounded the other way in float32, and once in a while one
    is; from there on the iterates are others, as good or as bad.
    """
    gains, off = [], []
    for seed in range(4):
        weight, hessian = weight_with_outliers(rows, inputs, seed), hessian_of(inputs, seed)
        exact, moments, quantize = weight.double().numpy(), hessian.double().numpy(), quantizer(method, hessian)

        def codes_of(residual: Array, quantize: Callable[[Tensor], QuantizedWeight] = quantize) -> Array:
            codes: Array = quantize(torch.from_numpy(residual).float()).dequantize().double().numpy()
            return codes

        reference = nearest if method == "rtn" else codes_of
        errors = alternated(exact, rank, reference, moments, root_of(moments, weighting))
        root = None if weighting == "none" else input_root(hessian, weighting)
        branch, quantized = driven(compensated(weight, rank, hessian, root, 10), quantize)
        reached = output_error(weight - branch.product() - quantized.dequantize(), hessian)
        per_round = [min(both) for both in errors]
        rounds = next((i for i in range(1, 10) if per_round[i] >= min(per_round[:i])), 10)
        off.append(abs(reached / min(per_round[:rounds]) - 1))
        gains.append(errors[0][0] / reached)
        if weighting == "full":  # given the codes, no branch is better than the refitted one
            assert all(after <= before * 1.001 for before, after in errors)
    assert sorted(off)[1] < 1e-5  # of four
    assert max(off) < 0.2
    assert min(gains) >= 1 - 1e-3
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
