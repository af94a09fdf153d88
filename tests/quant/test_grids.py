"""Grids: invariants of both levels, exact dequantization, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from samq.quant.grids import Grid, Scales, grouped, groups_of, pack_int4, round_to_grid, spread, unpack_int4
from samq.quant.scales import choose_scales

GRIDS = {
    "sint4": Grid(4, True),
    "uint4": Grid(4, False),
    "sint8": Grid(8, True),
    "uint8": Grid(8, False),
    "sint4 two-level": Grid(4, True, True),
    "uint4 two-level": Grid(4, False, True),
}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """[N, K] of any magnitude, with outliers, groups of zeros and one-sided rows; and a group size."""
    rows, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    group_size = draw(st.sampled_from([16, 32, inputs]))
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    weight *= 10.0 ** draw(st.integers(-6, 3))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, inputs - 1))] *= 100
    if draw(st.booleans()):
        weight[:, : draw(st.integers(0, inputs))] = 0
    if draw(st.booleans()):
        weight[0] = weight[0].abs() * draw(st.sampled_from([-1, 1]))
    return weight, min(group_size, inputs)


def is_fp16(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)


@pytest.mark.parametrize(
    ("name", "qmin", "qmax", "dtype"),
    [
        ("sint4", -8, 7, torch.int8),
        ("uint4", 0, 15, torch.uint8),
        ("sint8", -127, 127, torch.int8),
        ("uint8", 0, 255, torch.uint8),
        ("sint4 two-level", -7, 7, torch.int8),
        ("uint4 two-level", 0, 15, torch.uint8),
    ],
)
def test_range_of_codes(name: str, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    grid = GRIDS[name]
    assert (grid.qmin, grid.qmax, grid.dtype) == (qmin, qmax, dtype)


@pytest.mark.parametrize("name", GRIDS)
@given(weights())
def test_codes_and_scales_keep_their_promises(name: str, drawn: tuple[Tensor, int]) -> None:
    (weight, group_size), grid = drawn, GRIDS[name]
    quantized = round_to_grid(weight, choose_scales(weight, grid, group_size), grid)
    codes, scales = quantized.codes, quantized.scales
    groups = -(-weight.shape[1] // group_size)

    assert codes.dtype == grid.dtype
    assert grid.qmin <= int(codes.min()) <= int(codes.max()) <= grid.qmax
    assert scales.scale.shape == (weight.shape[0], groups)
    assert (scales.scale > 0).all()
    assert (scales.zero_point is None) == grid.signed
    if scales.zero_point is not None:
        assert torch.equal(scales.zero_point, scales.zero_point.round())
        assert grid.qmin <= float(scales.zero_point.min()) <= float(scales.zero_point.max()) <= grid.qmax
    if grid.two_level:
        assert scales.channel_scale is not None
        assert scales.channel_scale.shape == (weight.shape[0], 1)
        assert is_fp16(scales.channel_scale)
        assert (scales.channel_scale > 0).all()
        assert torch.equal(scales.scale, scales.scale.round())
    else:
        assert scales.channel_scale is None
        assert is_fp16(scales.scale)

    of_group = torch.arange(weight.shape[1]) // group_size
    zero_point = torch.zeros(1, groups) if scales.zero_point is None else scales.zero_point
    integers = (codes.double() - zero_point.double()[:, of_group]) * scales.scale.double()[:, of_group]
    if grid.two_level:
        assert scales.channel_scale is not None
        assert float(integers.abs().max()) <= 127
        assert quantized.as_int8().dtype == torch.int8
        assert torch.equal(quantized.as_int8().double(), integers)
        integers = integers * scales.channel_scale.double()
    assert torch.equal(quantized.dequantize().double(), integers)


@pytest.mark.parametrize("name", GRIDS)
@given(weights())
def test_every_weight_inside_the_range_is_within_half_a_step(name: str, drawn: tuple[Tensor, int]) -> None:
    (weight, group_size), grid = drawn, GRIDS[name]
    quantized = round_to_grid(weight, choose_scales(weight, grid, group_size), grid)
    step, zero_point = (t.double() for t in quantized.scales.per_input(weight.shape[1]))
    lowest, highest = (grid.qmin - zero_point) * step, (grid.qmax - zero_point) * step
    nearest = weight.double().clamp(lowest, highest)
    assert ((quantized.dequantize().double() - nearest).abs() <= 0.5001 * step).all()


def rounded_to_nearest(weight: Tensor, scales: Scales, grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """clamp(round(w / step) + zero_point), equation 4 of arXiv 2106.08295, in float64; and where w is no tie.

    A quotient in float32 is off by half a unit in the last place; nearer to a tie than twice that, it may be one.
    """
    step, zero_point = (t.double().numpy() for t in scales.per_input(weight.shape[1]))
    quotient = weight.double().numpy() / step
    from_tie = np.abs(quotient - np.floor(quotient) - 0.5)
    codes = np.clip(np.rint(quotient) + zero_point, grid.qmin, grid.qmax)
    return codes, from_tie > 2.0**-23 * np.abs(quotient)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "inputs", "group_size"), [(3, 64, 16), (5, 40, 16), (2, 33, 33), (1, 1, 1)])
def test_round_to_nearest_equals_float64(name: str, rows: int, inputs: int, group_size: int) -> None:
    grid = GRIDS[name]
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    scales = choose_scales(weight, grid, group_size)
    expected, no_tie = rounded_to_nearest(weight, scales, grid)
    assert no_tie.all()
    np.testing.assert_array_equal(round_to_grid(weight, scales, grid).codes.numpy(), expected)


@pytest.mark.parametrize("name", GRIDS)
@given(weights())
def test_round_to_nearest_equals_float64_away_from_ties(name: str, drawn: tuple[Tensor, int]) -> None:
    (weight, group_size), grid = drawn, GRIDS[name]
    scales = choose_scales(weight, grid, group_size)
    expected, no_tie = rounded_to_nearest(weight, scales, grid)
    codes = round_to_grid(weight, scales, grid).codes.numpy()
    np.testing.assert_array_equal(codes[no_tie], expected[no_tie])
    assert (np.abs(codes - expected) <= 1).all()


@pytest.mark.parametrize("name", GRIDS)
def test_round_to_nearest_equals_float64_in_ties(name: str) -> None:
    """With a step that is a power of two every quotient is exact, also in float32: half to even in both."""
    grid = GRIDS[name]
    scales = Scales(
        torch.full((1, 1), 4.0),
        None if grid.signed else torch.full((1, 1), 3.0),
        torch.full((1, 1), 2.0**-7) if grid.two_level else None,
        600,
    )
    weight = (torch.arange(-300, 300)[None] + 0.5) * scales.step()
    expected, no_tie = rounded_to_nearest(weight, scales, grid)
    assert not no_tie.any()
    np.testing.assert_array_equal(round_to_grid(weight, scales, grid).codes.numpy(), expected)


def test_ties_go_to_even_and_the_range_clips() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 100.0, -100.0]])
    scales = Scales(torch.ones(1, 1), None, None, 8)
    assert round_to_grid(weight, scales, Grid(4, True)).codes.tolist() == [[0, 2, 2, 0, -2, 6, 7, -8]]


def test_int8_weight_of_one_level_is_its_codes() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    quantized = round_to_grid(weight, choose_scales(weight, Grid(8, True), 32), Grid(8, True))
    assert torch.equal(quantized.as_int8(), quantized.codes)
    assert torch.equal(quantized.as_int8().float() * quantized.scales.scale, quantized.dequantize())


@pytest.mark.parametrize(("inputs", "group_size", "groups"), [(32, 16, 2), (33, 16, 3), (16, 16, 1), (5, 16, 1)])
def test_the_last_group_may_be_short(inputs: int, group_size: int, groups: int) -> None:
    weight = torch.arange(1.0, 2 * inputs + 1).view(2, inputs)
    blocks = grouped(weight, group_size)
    assert groups_of(inputs, group_size) == groups
    assert blocks.shape == (2, groups, group_size)
    assert torch.equal(blocks.flatten(1)[:, :inputs], weight)
    assert not blocks.flatten(1)[:, inputs:].any()
    values = torch.arange(2.0 * groups).view(2, groups)
    expected = [[float(row * groups + k // group_size) for k in range(inputs)] for row in range(2)]
    assert spread(values, group_size, inputs).tolist() == expected


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    weight = torch.cat([torch.full((1, 16), 7.0), torch.full((1, 4), 0.07)], dim=1)
    scales = choose_scales(weight, Grid(4, True), 16)
    assert scales.scale.tolist() == [[1.0, torch.tensor(0.01).half().item()]]


@given(st.lists(st.integers(-8, 7), max_size=65))
def test_signed_codes_pack_and_unpack(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.int8)
    packed = pack_int4(tensor)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(codes) + 1) // 2
    unpacked = unpack_int4(packed, (len(codes),), signed=True)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, tensor)


@given(st.lists(st.integers(0, 15), max_size=65))
def test_unsigned_codes_pack_and_unpack(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.uint8)
    unpacked = unpack_int4(pack_int4(tensor), (len(codes),), signed=False)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, tensor)


def test_packing_puts_the_first_code_into_the_low_half() -> None:
    assert pack_int4(torch.tensor([[1, 2, -1]], dtype=torch.int8)).tolist() == [0x21, 0x0F]
    assert unpack_int4(torch.tensor([0x21, 0x0F], dtype=torch.uint8), (1, 3), signed=True).tolist() == [[1, 2, -1]]
