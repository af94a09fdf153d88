"""A histogram of values that come in batches: a fixed number of bins, whose range doubles when a value lies beyond it.

Ranges are powers of two. So every edge of a wide range is one of a narrow range too, bins are merged in pairs without
error, and what has been counted does not depend on the order of the batches nor on how the values were split into them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 2048  # on each side of zero; the farthest value lies in the outer half of them
LEAST_EXPONENT = -100  # all smaller values share a range, whose bins are still normal numbers in float32
AT_ONCE = 1 << 22  # values whose bins are in memory at the same time


@dataclass
class Histogram:
    """How often values of which size were seen.

    Args:
        counts: [2 · BINS] int64, of the values in [i · width, (i + 1) · width) for i = −BINS … BINS − 1.
        exponent: the range is ±2^exponent; None before the first value.
        low, high: the smallest and the largest value; +∞ and −∞ before the first.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * BINS, dtype=torch.int64))
    exponent: int | None = None
    low: float = math.inf
    high: float = -math.inf

    @staticmethod
    def of(values: Tensor) -> Histogram:
        """The histogram of a tensor of any shape."""
        histogram = Histogram()
        histogram.add(values)
        return histogram

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape; none where one is not finite, which `low` and `high` tell."""
        values = x.detach().float().flatten()
        if not len(values):
            return
        low, high = (float(end) for end in values.aminmax())
        self.low = low if low < self.low or math.isnan(low) else self.low
        self.high = high if high > self.high or math.isnan(high) else self.high
        if not self.is_finite():
            return
        farthest = max(-low, high)
        self._widen(max(math.frexp(farthest)[1], LEAST_EXPONENT) if farthest else LEAST_EXPONENT)
        width = self.width
        for part in torch.split(values, AT_ONCE):
            index = (part / width).floor_().int() + BINS
            self.counts += torch.bincount(index, minlength=2 * BINS).to(self.counts.device)

    @property
    def width(self) -> float:
        """Of one bin."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / BINS

    def is_finite(self) -> bool:
        """No value was infinite or NaN."""
        return self.low > self.high or math.isfinite(self.high - self.low)

    def of_magnitudes(self) -> Tensor:
        """[BINS] counts of |x| in [i · width, (i + 1) · width), where −i · width counts as a little less."""
        return self.counts[BINS:] + self.counts[:BINS].flip(0)

    def _widen(self, exponent: int) -> None:
        """Make the range ±2^exponent, unless it is as wide."""
        if self.exponent is None:
            self.exponent = exponent
        if exponent > self.exponent:
            merged = torch.arange(-BINS, BINS) >> min(exponent - self.exponent, 62)  # rounds down on both sides of zero
            self.counts = torch.zeros_like(self.counts).index_add_(0, merged + BINS, self.counts)
            self.exponent = exponent
