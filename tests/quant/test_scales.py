"""The scale search against a plain search in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from samq.quant.grids import INT8_MAX, Grid, round_to_grid
from samq.quant.scales import CHANNEL_RATIOS, CLIP_RATIOS, FP16_TINY, as_fp16, choose_scales

ONE_LEVEL = {"sint4": Grid(4, True), "uint4": Grid(4, False), "sint8": Grid(8, True), "uint8": Grid(8, False)}
TWO_LEVEL = {"sint4 two-level": Grid(4, True, True), "uint4 two-level": Grid(4, False, True)}
SHAPES = [(8, 64, 16), (4, 96, 96), (6, 40, 16), (3, 144, 48)]


def heavy_tailed(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights with outliers and an importance that spans two decades."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator) ** 3 / 10 + 0.05
    return weight, 10 ** (2 * torch.rand(inputs, generator=generator) - 1)


def plain_error(
    values: NDArray[np.float64], importance: NDArray[np.float64], ratio: float, grid: Grid, norm: float
) -> float:
    """Weighted sum of |w - Q(w)|^p of one group when its range is shrunk by `ratio`."""
    low, high = min(values.min(), 0.0) * ratio, max(values.max(), 0.0) * ratio
    step = max(-low, high) / grid.qmax if grid.signed else (high - low) / grid.qmax
    zero_point = 0.0 if grid.signed else np.clip(np.rint(-low / step), grid.qmin, grid.qmax)
    step = float(np.float16(step))
    codes = np.clip(np.rint(values / step) + zero_point, grid.qmin, grid.qmax)
    return float((importance * np.abs((codes - zero_point) * step - values) ** norm).sum())


def errors_of(
    weight: Tensor,
    importance: Tensor,
    grid: Grid,
    group_size: int,
    chosen_for: Tensor | None,
    norm: float = 2.0,
    chosen_norm: float | None = None,
) -> Tensor:
    """Weighted |w - Q(w)|^p [N, K] with the scales that are chosen for an importance, and for p unless told another."""
    scales = choose_scales(weight, grid, group_size, chosen_for, norm if chosen_norm is None else chosen_norm)
    quantized = round_to_grid(weight, scales, grid)
    return (quantized.dequantize().double() - weight.double()).abs() ** norm * importance.double()


@pytest.mark.parametrize("name", ONE_LEVEL)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 4.0])
def test_one_level_is_the_best_of_all_ratios(name: str, rows: int, inputs: int, group_size: int, norm: float) -> None:
    grid, (weight, importance) = ONE_LEVEL[name], heavy_tailed(rows, inputs)
    errors = errors_of(weight, importance, grid, group_size, importance, norm)
    shrunk = 0
    for row in range(rows):
        for start in range(0, inputs, group_size):
            group = slice(start, start + group_size)
            values, weights = weight[row, group].double().numpy(), importance[group].double().numpy()
            candidates = [plain_error(values, weights, ratio, grid, norm) for ratio in CLIP_RATIOS]
            assert float(errors[row, group].sum()) == pytest.approx(min(candidates), rel=1e-3)
            shrunk += min(candidates) < candidates[0]
    assert shrunk > 0 or grid.bits == 8 or norm == 4, "no group gained from clipping, so nothing was tested"


@pytest.mark.parametrize("name", TWO_LEVEL)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_two_levels_are_no_worse_than_plain_ones(name: str, rows: int, inputs: int, group_size: int, seed: int) -> None:
    """Plain: channel scale from the largest step, group scales rounded to nearest (QServe, eq. 4 to 6)."""
    grid, (weight, importance) = TWO_LEVEL[name], heavy_tailed(rows, inputs, seed)
    found = errors_of(weight, importance, grid, group_size, importance).sum(1)
    plain = torch.zeros(rows, dtype=torch.float64)
    for row in range(rows):
        groups = [weight[row, k : k + group_size].double().numpy() for k in range(0, inputs, group_size)]
        spans = [max(-min(g.min(), 0), max(g.max(), 0)) if grid.signed else np.ptp([*g, 0.0]) for g in groups]
        steps = [span / grid.qmax for span in spans]
        zeros = [0 if grid.signed else round(-min(g.min(), 0) / s) for g, s in zip(groups, steps, strict=True)]
        limits = [127 // max(zero, grid.qmax - zero) for zero in zeros]
        channel = float(np.float16(max(step / limit for step, limit in zip(steps, limits, strict=True))))
        for index, (group, step, zero, limit) in enumerate(zip(groups, steps, zeros, limits, strict=True)):
            size = min(max(round(step / channel), 1), limit) * channel
            restored = (np.clip(np.rint(group / size) + zero, grid.qmin, grid.qmax) - zero) * size
            weights = importance[index * group_size :][: len(group)].double().numpy()
            plain[row] += (weights * (restored - group) ** 2).sum()
    assert (found <= plain * (1 + 1e-6)).all()
    assert found.sum() < 0.99 * plain.sum()


def two_level_error(groups: list[NDArray[np.float64]], importance: list[NDArray[np.float64]], grid: Grid) -> float:
    """The least squared error of a row: of all clippings of its groups first, then of all channel scales."""

    def error(index: int, step: float, zero: float) -> float:
        codes = np.clip(np.rint(groups[index] / step) + zero, grid.qmin, grid.qmax)
        return float((importance[index] * ((codes - zero) * step - groups[index]) ** 2).sum())

    def shrunk(values: NDArray[np.float64], ratio: float) -> tuple[float, float]:
        low, high = min(values.min(), 0.0) * ratio, max(values.max(), 0.0) * ratio
        step = max(-low, high) / grid.qmax if grid.signed else (high - low) / grid.qmax
        return step, 0.0 if grid.signed else float(np.clip(np.rint(-low / step), grid.qmin, grid.qmax))

    def factored(steps: list[tuple[float, float]]) -> float:
        limits = [INT8_MAX // max(int(zero), grid.qmax - int(zero)) for _, zero in steps]
        full = max(step / limit for (step, _), limit in zip(steps, limits, strict=True))
        totals = []
        for channel in (float(np.float16(full * ratio)) for ratio in CHANNEL_RATIOS):
            total = 0.0
            for index, ((step, zero), limit) in enumerate(zip(steps, limits, strict=True)):
                neighbours = {min(max(f(step / channel), 1), limit) for f in (np.floor, np.ceil)}
                total += min(error(index, size * channel, zero) for size in neighbours)
            totals.append(total)
        return min(totals)

    candidates = [[shrunk(values, ratio) for ratio in CLIP_RATIOS] for values in groups]
    clipped = [min(steps, key=lambda one: error(index, *one)) for index, steps in enumerate(candidates)]
    return min(factored(clipped), factored([steps[0] for steps in candidates]))


@pytest.mark.parametrize("name", TWO_LEVEL)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), SHAPES)
def test_two_levels_are_the_best_of_all_candidates(name: str, rows: int, inputs: int, group_size: int) -> None:
    grid, (weight, importance) = TWO_LEVEL[name], heavy_tailed(rows, inputs)
    found = errors_of(weight, importance, grid, group_size, importance).sum(1)
    starts = range(0, inputs, group_size)
    weights_of = [importance[k : k + group_size].double().numpy() for k in starts]
    for row in range(rows):
        groups = [weight[row, k : k + group_size].double().numpy() for k in starts]
        assert float(found[row]) == pytest.approx(two_level_error(groups, weights_of, grid), rel=1e-3)


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
def test_importance_is_what_is_minimized(grid: Grid) -> None:
    weight, importance = heavy_tailed(16, 64)
    with_it = errors_of(weight, importance, grid, 64, importance).sum()
    without_it = errors_of(weight, importance, grid, 64, None).sum()
    assert with_it < without_it if grid.bits == 4 else with_it <= without_it


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
@pytest.mark.parametrize("norm", [1.0, 4.0])
def test_the_power_is_what_is_minimized(grid: Grid, norm: float) -> None:
    weight, importance = heavy_tailed(16, 64)
    with_it = errors_of(weight, importance, grid, 64, importance, norm).sum()
    without_it = errors_of(weight, importance, grid, 64, importance, norm, chosen_norm=2.0).sum()
    assert with_it < without_it if grid.bits == 4 else with_it <= without_it


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A weight of any shape, spread and offset, and a group size."""
    rows, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spread = 10.0 ** draw(st.floats(-3, 1))
    weight = torch.randn(rows, inputs, generator=generator) ** draw(st.sampled_from([1, 3, 5]))
    return spread * (weight + draw(st.floats(-3, 3))), draw(st.integers(1, inputs))


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
@given(weights())
def test_without_clipping_no_weight_is_off_by_more_than_half_a_step(grid: Grid, case: tuple[Tensor, int]) -> None:
    """Up to the half step by which a rounded zero-point moves an asymmetric grid, and FP16's rounding of the scale."""
    weight, group_size = case
    scales = choose_scales(weight, grid, group_size, norm=None)
    step, zero_point = scales.per_input(weight.shape[1])
    difference = (round_to_grid(weight, scales, grid).dequantize() - weight).abs()
    moved = 0.0 if grid.signed else 0.5
    of_scale = torch.maximum(step * 2.0**-11, torch.tensor(FP16_TINY))
    assert (difference <= (0.501 + moved) * step + grid.qmax * of_scale * (INT8_MAX if grid.two_level else 1)).all()
    assert ((zero_point >= grid.qmin) & (zero_point <= grid.qmax)).all()


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
@given(weights(), st.sampled_from([1.0, 2.0, 2.4, 4.0]))
def test_clipping_never_costs_more_than_none(grid: Grid, case: tuple[Tensor, int], norm: float) -> None:
    """One level, group by group; two levels, row by row, for their groups share a scale."""
    weight, group_size = case
    ones = torch.ones(weight.shape[1])
    clipped = errors_of(weight, ones, grid, group_size, None, norm).sum(1)
    covering = round_to_grid(weight, choose_scales(weight, grid, group_size, norm=None), grid).dequantize()
    covered = ((covering.double() - weight.double()).abs() ** norm).sum(1)
    assert (clipped <= covered * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize("grid", TWO_LEVEL.values(), ids=TWO_LEVEL)
@pytest.mark.parametrize("norm", [None, 2.0, 3.0])
@given(case=weights())
def test_two_levels_stay_in_int8(grid: Grid, norm: float | None, case: tuple[Tensor, int]) -> None:
    weight, group_size = case
    scales = choose_scales(weight, grid, group_size, norm=norm)
    assert torch.equal(scales.scale, scales.scale.round())
    assert (scales.scale >= 1).all()
    assert round_to_grid(weight, scales, grid).as_int8().abs().max() <= 127


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
@pytest.mark.parametrize("zeros", [slice(0, 16), slice(16, 40), slice(0, 40)], ids=["first", "last", "all"])
def test_zeros_stay_zero_and_cost_their_neighbours_nothing(grid: Grid, zeros: slice) -> None:
    weight = heavy_tailed(4, 40)[0] / 10
    weight[:, zeros] = 0
    quantized = round_to_grid(weight, choose_scales(weight, grid, 16), grid)
    dequantized = quantized.dequantize()
    assert not dequantized[:, zeros].any()
    others = [k for k in range(40) if weight[0, k] != 0]
    if others:
        alone = weight[:, others]
        expected = round_to_grid(alone, choose_scales(alone, grid, 16), grid).dequantize()
        assert torch.equal(dequantized[:, others], expected)


@pytest.mark.parametrize("grid", [*ONE_LEVEL.values(), *TWO_LEVEL.values()], ids=[*ONE_LEVEL, *TWO_LEVEL])
@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1e4, 1e8])
def test_extreme_weights_keep_finite_positive_scales(grid: Grid, magnitude: float) -> None:
    weight = heavy_tailed(4, 32)[0] * magnitude
    scales = choose_scales(weight, grid, 16)
    assert torch.isfinite(scales.step()).all()
    assert (scales.step() > 0).all()


def test_as_fp16_is_nearest_positive_and_finite() -> None:
    values = torch.tensor([0.0, 1e-30, 0.1, 1.0, 65504.0, 1e10])
    expected = [FP16_TINY, FP16_TINY, float(np.float16(0.1)), 1.0, 65504.0, 65504.0]
    assert as_fp16(values).tolist() == expected
