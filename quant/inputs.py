"""INT8 grids of layer inputs (activations), static or dynamic.

static   scale and zero-point are constants, found on calibration data: by the same clipping search as for weights, or
         by one of the calibrators that look at values alone (`samq.quant.calibrators`)
dynamic  scale = max|x| / 127 over each token, or over the whole tensor, computed while running (symmetric only)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samq.calib.histogram import Histogram
from samq.calib.statistics import InputStatistics
from samq.quant.calibrators import Range, entropy_range, mse_range, percentile_range, whole_range
from samq.quant.config import InputsConfig
from samq.quant.scales import as_fp16

CLIP_RATIOS = tuple(1.0 - 0.05 * i for i in range(15))
SMALLEST_RANGE = 1e-6  # keeps the scale of an all-zero token positive


@dataclass(frozen=True)
class InputGrid:
    """How one layer's inputs are quantized.

    Args:
        dtype: "sint8" (codes -128…127 around zero) or "uint8" (codes 0…255 with a zero-point).
        granularity: "per_tensor" or "per_token".
        scale: the constant scale, None when dynamic.
        zero_point: 0 for sint8.
    """

    dtype: str
    granularity: str
    scale: float | None = None
    zero_point: int = 0

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -128 if self.dtype == "sint8" else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return 127 if self.dtype == "sint8" else 255

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x` [..., K], computed as ONNX QuantizeLinear and DequantizeLinear do."""
        scale = self.dynamic_scale(x) if self.scale is None else torch.tensor(self.scale, device=x.device)
        codes = torch.clamp(torch.round(x / scale) + self.zero_point, self.qmin, self.qmax)
        return (codes - self.zero_point) * scale

    def dynamic_scale(self, x: Tensor) -> Tensor:
        """max|x| / 127 per token [..., 1], or of the whole tensor (every dimension 1)."""
        dims = (-1,) if self.granularity == "per_token" else tuple(range(x.ndim))
        return x.abs().amax(dims, keepdim=True).clamp(min=SMALLEST_RANGE) / self.qmax


def input_grid(asked: InputsConfig | None, weight: Tensor, statistics: InputStatistics | None) -> InputGrid | None:
    """The grid of a layer's inputs.

    Args:
        asked: the format, None for float inputs.
        weight: [N, K] of the layer.
        statistics: of its inputs; may be None where they stay float or scales are dynamic. For a calibrator that asks
            for a histogram but finds none, the sample stands for all inputs, as it does while smoothing is searched.
    """
    if asked is None:
        return None
    if asked.mode == "dynamic":
        return InputGrid(asked.dtype, asked.granularity)
    assert statistics is not None
    if statistics.rows == 0:
        return InputGrid(asked.dtype, asked.granularity, scale=1.0)
    if asked.calibrator == "output":
        importance = weight.square().sum(0)
        return static_grid(asked.dtype, statistics.low, statistics.high, statistics.sample, importance)
    histogram = statistics.histogram
    if histogram is None and asked.reads_histogram:
        histogram = Histogram.of(statistics.sample)
    if histogram is None:
        histogram = Histogram(low=float(statistics.low.min()), high=float(statistics.high.max()))
    return grid_of_range(asked.dtype, *calibrated_range(asked, histogram))


def calibrated_range(asked: InputsConfig, histogram: Histogram) -> Range:
    """The range that the calibrator of a static format, other than `output`, gives its grid."""
    symmetric = asked.dtype == "sint8"  # its scale is that of the farther end
    if asked.calibrator == "percentile":
        assert asked.percentile is not None
        return percentile_range(histogram, asked.percentile, symmetric)
    if asked.calibrator == "mse":
        return mse_range(histogram, lambda candidate: step_of(grid_of_range(asked.dtype, *candidate)))
    if asked.calibrator == "entropy":
        return entropy_range(histogram, symmetric)
    return whole_range(histogram)


def static_grid(dtype: str, low: Tensor, high: Tensor, sample: Tensor, importance: Tensor) -> InputGrid:
    """Constant per-tensor grid with the least weighted squared error on a sample of inputs.

    Args:
        dtype: "sint8" or "uint8".
        low, high: [K] smallest and largest input of each channel over all calibration data.
        sample: [rows, K] inputs.
        importance: [K] weight of each channel's squared error; ‖W[:, k]‖² makes it the layer's output error.
    """
    lowest, highest = float(low.min().clamp(max=0)), float(high.max().clamp(min=0))
    best, least = None, torch.inf
    for ratio in CLIP_RATIOS:
        grid = grid_of_range(dtype, lowest * ratio, highest * ratio)
        error = float(((grid.fake_quantize(sample) - sample).square() * importance).sum())
        if best is None or error < least:
            best, least = grid, error
    assert best is not None
    return best


def step_of(grid: InputGrid) -> tuple[float, float, float]:
    """Scale, lowest and highest multiple of it that the grid holds."""
    assert grid.scale is not None
    return grid.scale, grid.qmin - grid.zero_point, grid.qmax - grid.zero_point


def grid_of_range(dtype: str, low: float, high: float) -> InputGrid:
    """The per-tensor grid whose codes reach from `low` ≤ 0 to `high` ≥ 0, its scale an FP16 number."""
    span = max(-low, high) / 127 if dtype == "sint8" else (high - low) / 255
    scale = float(as_fp16(torch.tensor(span if span > 0 else 1.0)))
    zero_point = 0 if dtype == "sint8" else min(max(round(-low / scale), 0), 255)
    return InputGrid(dtype, "per_tensor", scale, zero_point)
