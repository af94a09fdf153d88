"""Histograms of streams against NumPy's of all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samq.calib.histogram import BINS, LEAST_EXPONENT, Histogram

magnitudes = st.floats(2.0**-30, 2.0**30, width=32)
values = st.just(0.0) | magnitudes | magnitudes.map(lambda magnitude: -magnitude)
batches = st.lists(st.lists(values, max_size=8), max_size=6)


def counted(parts: list[list[float]]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(torch.tensor(part, dtype=torch.float32))
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return torch.equal(one.counts, other.counts) and (one.exponent, one.low, one.high) == (
        other.exponent,
        other.low,
        other.high,
    )


@given(batches)
def test_how_values_come_does_not_matter(parts: list[list[float]]) -> None:
    together = [value for part in parts for value in part]
    assert same(counted(parts), counted([together]))
    assert same(counted(parts), counted([[value] for value in reversed(together)]))


@given(batches)
def test_counts_are_numpys(parts: list[list[float]]) -> None:
    together, found = np.array([value for part in parts for value in part], np.float64), counted(parts)
    if not len(together):
        assert found.exponent is None
        assert not found.counts.any()
        return
    edges = np.arange(-BINS, BINS + 1) * found.width
    np.testing.assert_array_equal(found.counts.numpy(), np.histogram(together, edges)[0])
    assert (found.low, found.high) == (together.min(), together.max())
    assert found.of_magnitudes().sum() == len(together)
    farthest = np.abs(together).max()
    assert farthest < BINS * found.width
    assert farthest >= BINS / 2 * found.width or found.exponent == LEAST_EXPONENT


def test_a_range_that_widens_far_keeps_sides_and_number() -> None:
    found = counted([[1e-20, -1e-20, 2e-20], [1e20]])
    assert found.counts[BINS - 1 : BINS + 1].tolist() == [1, 2]
    assert found.counts.sum() == 4


def test_large_batches_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    whole = Histogram.of(x)
    monkeypatch.setattr("samq.calib.histogram.AT_ONCE", 7)
    assert same(Histogram.of(x), whole)


def test_zeros_alone_leave_the_range_open() -> None:
    found = counted([[0.0, 0.0], [0.001]])
    assert found.width * BINS == 2.0**-9
    assert found.counts[BINS] == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_show(value: float) -> None:
    found = counted([[1.0, value], [2.0]])
    assert not found.is_finite()
    assert not found.counts.any()
    assert Histogram().is_finite()


def test_the_largest_and_smallest_numbers_of_float32() -> None:
    limits = torch.finfo(torch.float32)
    found = counted([[limits.tiny], [limits.max, limits.min / 2]])
    assert found.exponent == 128
    assert found.counts.sum() == 3
    assert found.counts[-1] == 1


def test_it_keeps_no_values() -> None:
    x: Tensor = torch.randn(100_000)
    found = Histogram.of(x)
    assert found.counts.shape == (2 * BINS,)
    assert vars(found).keys() == {"counts", "exponent", "low", "high"}
