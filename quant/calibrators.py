"""How far the constant grid of a layer's inputs reaches, decided on a histogram of all values that calibration saw.

max         as far as the values, so that nothing is clipped
percentile  as far as all but a given percentage of them; a grid with a zero-point leaves half of that out at each end
mse         to where E (x − Q(x))² is least (Nagel et al., arXiv 2106.08295, section 3.1)
entropy     to where codes tell most of how values are distributed: the least D(P ‖ Q) of TensorRT's calibration
            (Migacz, "8-bit Inference with TensorRT", GTC 2017)

They look at values alone. What the layer's weights make of an error counts only for `output` (`samq.quant.inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from samq.calib.histogram import BINS, Histogram

Range = tuple[float, float]
Step = Callable[[Range], tuple[float, float, float]]
"""A range → scale, lowest and highest multiple of it that the range's grid holds."""

RATIOS = tuple(2.0 ** (-i / 16) for i in range(129))  # of the largest magnitude, for mse
MAGNITUDE_LEVELS, ALL_LEVELS = 128, 256  # codes from zero on of a grid around it; codes of one with a zero-point


def whole_range(histogram: Histogram) -> Range:
    """The smallest and the largest value, and zero."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def percentile_range(histogram: Histogram, percentile: float, symmetric: bool) -> Range:
    """The range of `percentile` % of the values, to the outer end of a bin; symmetric about zero, or cut at both ends.

    Args:
        percentile: above 50, at most 100.
    """
    low, high = whole_range(histogram)
    if symmetric:
        farthest = _quantile_bin(histogram.of_magnitudes().numpy(), percentile / 100) + 1
        return _within(histogram, farthest * histogram.width)
    counts, share = histogram.counts.numpy(), (1 + percentile / 100) / 2
    top = _quantile_bin(counts, share) + 1 - BINS
    bottom = BINS - 1 - _quantile_bin(counts[::-1], share)
    return max(low, min(bottom * histogram.width, 0.0)), min(high, max(top * histogram.width, 0.0))


def mse_range(histogram: Histogram, step_of: Step) -> Range:
    """The range, of those that leave out what is farther than RATIOS of the farthest value, with the least error.

    Values are taken to be spread evenly over their bin, so that fine steps are told apart on coarse bins, too. With n
    the code of x and r = x − n s, ∫₀ˣ (u − Q(u))² du = n s³/12 + r³/3, within the grid and beyond its ends.
    """
    counts = histogram.counts.numpy()
    seen = np.flatnonzero(counts)
    first, last = int(seen[0]), int(seen[-1]) + 1
    edges = np.arange(first - BINS, last - BINS + 1) * histogram.width
    farthest = max(-histogram.low, histogram.high)

    def error_of(candidate: Range) -> float:
        scale, lowest, highest = step_of(candidate)
        codes = np.clip(np.rint(edges / scale), lowest, highest)
        integral = codes * scale**3 / 12 + (edges - codes * scale) ** 3 / 3
        return float(counts[first:last] @ np.diff(integral))

    return min((_within(histogram, farthest * ratio) for ratio in RATIOS), key=error_of)


def entropy_range(histogram: Histogram, symmetric: bool) -> Range:
    """The range with the least D(P ‖ Q), the widest of equals.

    P is the histogram inside the range with all that lies outside put into its end bins, Q what is left of the inside
    when there is one count for each code, shared evenly by its bins that are not empty. The bin that begins at zero
    counts as much as the next one, as in NVIDIA's calibrators: every code tells zeros, and many would decide alone.
    """
    levels = MAGNITUDE_LEVELS if symmetric else ALL_LEVELS
    best, least = whole_range(histogram), np.inf
    for threshold, inside, below, above in _windows(histogram, symmetric):
        if len(inside) < levels:
            continue
        divergence = _divergence(inside, below, above, levels)
        if divergence <= least:
            best, least = _within(histogram, threshold), divergence
    return best


def _within(histogram: Histogram, threshold: float) -> Range:
    """What of the whole range is no farther from zero than a threshold."""
    low, high = whole_range(histogram)
    return max(low, -threshold), min(high, threshold)


def _quantile_bin(counts: NDArray[np.int64], share: float) -> int:
    """The first bin up to which at least a share of all values lie."""
    running = np.cumsum(counts)
    return int(np.searchsorted(running, share * running[-1]))


def _windows(histogram: Histogram, symmetric: bool) -> Iterator[tuple[float, NDArray[np.int64], int, int]]:
    """Thresholds from the narrowest on, each with the counts of the bins inside and the numbers of values outside."""
    width = histogram.width
    magnitudes, counts = histogram.of_magnitudes().numpy(), histogram.counts.numpy().copy()
    filled = np.flatnonzero(magnitudes)
    magnitudes[0], counts[BINS] = magnitudes[1], counts[BINS + 1]
    low, high = whole_range(histogram)
    first, last = int(np.floor(low / width)) + BINS, int(np.floor(high / width)) + BINS
    for size in range(1, int(filled[-1]) + 2):
        threshold = (size + 0.5) * width
        if symmetric:
            yield threshold, magnitudes[:size], 0, int(magnitudes[size:].sum())
        else:
            start, stop = max(first, BINS - size), min(last, BINS + size - 1) + 1
            yield threshold, counts[start:stop], int(counts[:start].sum()), int(counts[stop:].sum())


def _divergence(inside: NDArray[np.int64], below: int, above: int, levels: int) -> float:
    """D(P ‖ Q) in nats; infinite where values are put into an end bin that is empty itself.

    Args:
        inside: [bins ≥ levels] counts.
        below, above: values to be put into the first and the last bin.
        levels: codes.
    """
    level = np.arange(len(inside)) * levels // len(inside)
    filled = inside > 0
    shared = np.bincount(level, inside, levels) / np.maximum(np.bincount(level, filled, levels), 1)
    told = np.where(filled, shared[level], 0.0)
    values = inside.astype(np.float64)
    values[0] += below
    values[-1] += above
    if not told.any() or bool(((values > 0) & (told == 0)).any()):
        return float(np.inf)
    p, q = (distribution[values > 0] / distribution.sum() for distribution in (values, told))
    return float((p * np.log(p / q)).sum())
