"""Calibrators against a few lines of float64 from their definitions, on all values instead of a histogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from samq.calib.histogram import Histogram
from samq.quant.calibrators import RATIOS, entropy_range, mse_range, percentile_range, whole_range
from samq.quant.config import InputsConfig
from samq.quant.inputs import calibrated_range, grid_of_range, step_of

Array = NDArray[np.float64]


def drawn(seed: int = 0) -> Tensor:
    return torch.randn(40_000, generator=torch.Generator().manual_seed(seed))


VALUES: dict[str, Callable[[], Tensor]] = {
    "normal": drawn,
    "heavy": lambda: drawn() ** 3,
    "relu": lambda: drawn().clamp(min=0),
    "gelu": lambda: torch.nn.functional.gelu(3 * drawn()),
    "negative": lambda: -drawn().abs() - 0.1,
    "outlier": lambda: torch.cat([drawn(), torch.tensor([60.0])]),
}
every = pytest.mark.parametrize("name", VALUES)
both = pytest.mark.parametrize("dtype", ["sint8", "uint8"])


def error_of(dtype: str, low: float, high: float, x: Tensor) -> float:
    """E (x − Q(x))² by the definition, with a grid from `low` to `high` whose scale is an FP16 number."""
    values, limits = x.double().numpy(), {"sint8": (-128, 127), "uint8": (0, 255)}[dtype]
    scale = float(np.float16(max(-low, high) / 127 if dtype == "sint8" else (high - low) / 255))
    zero_point = 0 if dtype == "sint8" else int(np.clip(np.rint(-low / scale), *limits))
    codes = np.clip(np.rint(values / scale) + zero_point, *limits)
    return float((((codes - zero_point) * scale - values) ** 2).mean())


@every
def test_the_whole_range_reaches_zero_and_both_ends(name: str) -> None:
    x = VALUES[name]()
    assert whole_range(Histogram.of(x)) == (min(float(x.min()), 0), max(float(x.max()), 0))


@every
@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99, 100.0])
def test_percentile_of_magnitudes(name: str, percentile: float) -> None:
    x = VALUES[name]()
    histogram = Histogram.of(x)
    expected = np.percentile(np.abs(x.double().numpy()), percentile, method="inverted_cdf")
    found = max(map(abs, percentile_range(histogram, percentile, symmetric=True)))
    assert expected <= found <= expected + histogram.width
    if percentile == 100:
        assert percentile_range(histogram, percentile, symmetric=True) == whole_range(histogram)


@every
@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99, 100.0])
def test_percentile_of_both_ends(name: str, percentile: float) -> None:
    x = VALUES[name]().double().numpy()
    histogram, cut = Histogram.of(torch.from_numpy(x)), (100 - percentile) / 2
    low, high = percentile_range(histogram, percentile, symmetric=False)
    expected = [max(np.percentile(sign * x, 100 - cut, method="inverted_cdf"), 0.0) for sign in (-1, 1)]
    for found, limit in zip((-low, high), expected, strict=True):
        assert limit - 1e-12 <= found <= limit + histogram.width + 1e-12


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50), st.floats(50.1, 100), st.booleans())
def test_percentile_leaves_no_more_out_than_asked_for(values: list[float], percentile: float, symmetric: bool) -> None:
    x = np.array(values)
    low, high = percentile_range(Histogram.of(torch.tensor(values)), percentile, symmetric)
    assert low <= 0 <= high
    kept = np.abs(x) <= max(-low, high) if symmetric else (low <= x) & (x <= high)
    assert kept.mean() >= percentile / 100 - 1e-9


@every
@both
def test_mse_is_the_least_of_all_ratios(name: str, dtype: str) -> None:
    x = VALUES[name]()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    reaches = [ratio * max(-low, high) for ratio in RATIOS]
    errors = [error_of(dtype, max(low, -reach), min(high, reach), x) for reach in reaches]
    found = mse_range(Histogram.of(x), lambda candidate: step_of(grid_of_range(dtype, *candidate)))
    assert error_of(dtype, *found, x) <= 1.01 * min(errors)  # a histogram tells its values to a bin
    assert min(errors) <= errors[0]


def reference_divergence(inside: list[float], below: float, above: float, levels: int) -> float:
    """D(P ‖ Q) as on Migacz's slides: P has outliers in its end bins, Q is what codes tell of what is inside."""
    p, q = list(inside), [0.0] * len(inside)
    p[0] += below
    p[-1] += above
    for level in range(levels):
        bins = [k for k in range(len(inside)) if k * levels // len(inside) == level]
        filled = [k for k in bins if inside[k] > 0]
        for k in filled:
            q[k] = sum(inside[b] for b in bins) / len(filled)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return float("inf")
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * np.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.fixture
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 bins on each side of zero and 16 codes, for a reference in plain Python."""
    monkeypatch.setattr("samq.calib.histogram.BINS", 128)
    monkeypatch.setattr("samq.quant.calibrators.BINS", 128)
    monkeypatch.setattr("samq.quant.calibrators.MAGNITUDE_LEVELS", 16)
    monkeypatch.setattr("samq.quant.calibrators.ALL_LEVELS", 16)


def in_few_bins(x: Tensor) -> Histogram:
    histogram = Histogram(counts=torch.zeros(256, dtype=torch.int64))
    histogram.add(x)
    return histogram


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize("name", ["heavy", "relu"])
def test_entropy_is_that_of_the_slides(name: str) -> None:
    """Around zero: of |x|, whose first bin counts as its neighbour."""
    x = VALUES[name]()
    histogram = in_few_bins(x)
    counts = np.histogram(np.abs(x.double().numpy()), np.arange(129) * histogram.width)[0].astype(float).tolist()
    last = max(k for k, count in enumerate(counts) if count) + 1
    counts[0] = counts[1]
    best = min(range(last, 15, -1), key=lambda i: reference_divergence(counts[:i], 0, sum(counts[i:]), 16))
    assert best < last, "nothing is clipped, so nothing is tested"
    low, high = entropy_range(histogram, symmetric=True)
    assert max(-low, high) == pytest.approx((best + 0.5) * histogram.width)


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize("name", ["normal", "heavy", "relu", "gelu", "outlier"])
def test_entropy_with_a_zero_point_is_that_of_the_slides(name: str) -> None:
    """Of x, as far as its smallest and largest value, with the bin that begins at zero counted as the next one."""
    x = VALUES[name]()
    histogram = in_few_bins(x)
    counts = np.histogram(x.double().numpy(), np.arange(-128, 129) * histogram.width)[0].astype(float).tolist()
    filled = [k for k, count in enumerate(counts) if count] + [128]
    counts[128] = counts[129]

    def divergence(size: int) -> float:
        start, stop = max(min(filled), 128 - size), min(max(filled) + 1, 128 + size)
        if stop - start < 16:
            return float("inf")
        return reference_divergence(counts[start:stop], sum(counts[:start]), sum(counts[stop:]), 16)

    widest = max(128 - min(filled), max(filled) + 1 - 128)
    best = min(range(widest, 0, -1), key=divergence)
    assert best < widest, "nothing is clipped, so nothing is tested"
    low, high = entropy_range(histogram, symmetric=False)
    reach = (best + 0.5) * histogram.width
    assert low == pytest.approx(max(min(float(x.min()), 0.0), -reach))
    assert high == pytest.approx(min(float(x.max()), reach))


@both
def test_entropy_clips_what_is_rare_and_keeps_what_is_even(dtype: str) -> None:
    even = torch.linspace(-3, 3, 50_001)
    low, high = entropy_range(Histogram.of(even), symmetric=dtype == "sint8")
    assert max(-low, high) > 2.9
    rare = torch.cat([torch.randn(50_000, generator=torch.Generator().manual_seed(1)), torch.tensor([12.0, -11.0])])
    low, high = entropy_range(Histogram.of(rare), symmetric=dtype == "sint8")
    assert 2 < max(-low, high) < 6


@every
@both
@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse", "entropy"])
def test_ranges_hold_zero_and_nothing_but_values(name: str, dtype: str, calibrator: str) -> None:
    histogram = Histogram.of(VALUES[name]())
    asked = InputsConfig.model_validate({"dtype": dtype, "calibrator": calibrator})
    low, high = calibrated_range(asked, histogram)
    whole = whole_range(histogram)
    assert whole[0] <= low <= 0 <= high <= whole[1]
    assert low < high


@both
@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("values", [torch.zeros(5), torch.tensor([1e-33, -1e-34]), torch.tensor([3.0])])
def test_few_and_tiny_values(dtype: str, calibrator: str, values: Tensor) -> None:
    asked = InputsConfig.model_validate({"dtype": dtype, "calibrator": calibrator})
    low, high = calibrated_range(asked, Histogram.of(values))
    assert low <= 0 <= high <= max(float(values.max()), 0)
    grid = grid_of_range(dtype, low, high)
    assert grid.scale is not None
    assert grid.scale > 0
