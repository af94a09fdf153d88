"""Choosing scales: no clipping at all, or a search over clipping ratios for the least error.

For each group the range is shrunk by a few ratios and the one with the least Σ hₖ |wₖ − ŵₖ|ᵖ is kept. p = 2 is the MSE
range search of Nagel et al. (arXiv 2106.08295, section 2.3.1); a larger p minds large weights more. h is the diagonal
of the Hessian where errors are to be weighted by the inputs, and one otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samq.quant.grids import INT8_MAX, Grid, Scales, grouped

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
CHANNEL_RATIOS = (1.0, 0.93, 0.86, 0.79, 0.72)
FP16_TINY = 2.0**-24  # smallest positive FP16 number


def choose_scales(
    weight: Tensor, grid: Grid, group_size: int, importance: Tensor | None = None, norm: float | None = 2.0
) -> Scales:
    """Scales and zero-points for a weight matrix.

    Args:
        weight: [N, K] float32.
        grid: the format.
        group_size: inputs that share a scale, 1 ≤ G ≤ K.
        importance: [K] non-negative weights of the error, or None for all ones.
        norm: the power p > 0 of the error, or None for scales that clip no weight.
    """
    values = grouped(weight, group_size)  # [N, groups, G]
    weights = None if importance is None else grouped(importance[None], group_size)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)  # zero is always inside
    if norm is None:
        return _covering(values, low, high, grid, group_size)
    best = _Best(low)
    for ratio in CLIP_RATIOS:
        step, zero_point = _range_to_step(low * ratio, high * ratio, grid)
        step = step if grid.two_level else as_fp16(step)
        best.offer(_error(values, step, zero_point, grid, weights, norm), step, zero_point)
    if not grid.two_level:
        return Scales(best.first, None if grid.signed else best.second, None, group_size)
    searched = _split_levels(values, best.first, best.second, grid, weights, norm)
    plain = _split_levels(values, *_range_to_step(low, high, grid), grid, weights, norm)  # so that clipping never loses
    scale, zero_point, channel_scale = (
        torch.where(plain[0] < searched[0], b, a) for a, b in zip(searched[1:], plain[1:], strict=True)
    )
    return Scales(scale, None if grid.signed else zero_point, channel_scale, group_size)


def _covering(values: Tensor, low: Tensor, high: Tensor, grid: Grid, group_size: int) -> Scales:
    """Scales whose grids reach the ends of each group's range, [N, groups], up to FP16's rounding of the real ones."""
    step, zero_point = _range_to_step(low, high, grid)
    zeros = None if grid.signed else zero_point
    if not grid.two_level:
        return Scales(as_fp16(step), zeros, None, group_size)
    limit = _largest_scale(zero_point, grid)
    channel = as_fp16(_channel_step(values, step, limit))
    return Scales(torch.minimum(torch.ceil(step / channel).clamp(min=1), limit), zeros, channel, group_size)


def as_fp16(scale: Tensor) -> Tensor:
    """The nearest positive FP16 number, in float32."""
    return scale.clamp(FP16_TINY, torch.finfo(torch.float16).max).half().float()


def _range_to_step(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Step and zero-point (both [N, groups]) that map [low, high] onto the codes."""
    if grid.signed:
        step = torch.maximum(-low, high) / grid.qmax
        return torch.where(step > 0, step, torch.ones_like(step)), torch.zeros_like(step)
    step = (high - low) / grid.qmax
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, torch.clamp(torch.round(-low / step), grid.qmin, grid.qmax)


def _error(values: Tensor, step: Tensor, zero_point: Tensor, grid: Grid, weights: Tensor | None, norm: float) -> Tensor:
    """Weighted sum of the p-th powers of each group's rounding errors, [N, groups]."""
    step, zero_point = step[..., None], zero_point[..., None]
    codes = torch.clamp(torch.round(values / step) + zero_point, grid.qmin, grid.qmax)
    difference = (codes - zero_point) * step - values
    powers = difference.square() if norm == 2 else difference.abs().pow(norm)
    return (powers if weights is None else powers * weights).sum(-1)


def _largest_scale(zero_point: Tensor, grid: Grid) -> Tensor:
    """The largest integer group scale [N, groups] that keeps every product with a code in INT8."""
    farthest = torch.full_like(zero_point, grid.qmax)
    if not grid.signed:
        farthest = torch.maximum(zero_point, grid.qmax - zero_point)
    return torch.floor(INT8_MAX / farthest)


def _channel_step(values: Tensor, step: Tensor, limit: Tensor) -> Tensor:
    """The least channel scale [N, 1] with which no group needs a scale beyond its limit."""
    return torch.where(values.any(-1), step / limit, 0).amax(1, keepdim=True)  # a group of zeros takes any step


def _split_levels(
    values: Tensor, step: Tensor, zero_point: Tensor, grid: Grid, weights: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factor steps [N, groups] into integer group scales [N, groups] and FP16 channel scales [N, 1].

    The channel scale is searched over a few shrunken values, the integer beside it over both neighbours of the ratio.

    Returns:
        the error of each row [N, 1], group scales, the zero-points as given, channel scales.
    """
    limit = _largest_scale(zero_point, grid)
    full = _channel_step(values, step, limit)
    best = _Best(full)
    for ratio in CHANNEL_RATIOS:
        channel = as_fp16(full * ratio)
        of_group = _Best(step)
        for rounding in (torch.floor, torch.ceil):
            scale = torch.minimum(rounding(step / channel).clamp(min=1), limit)
            of_group.offer(_error(values, scale * channel, zero_point, grid, weights, norm), scale, channel)
        best.offer(of_group.error.sum(1, keepdim=True), channel, of_group.first)
    return best.error, best.second, zero_point, best.first


class _Best:
    """Elementwise running minimum of an error and two values that go with it."""

    def __init__(self, like: Tensor) -> None:
        self.error = torch.full_like(like, torch.inf)
        self.first = torch.ones_like(like)
        self.second = torch.zeros_like(like)

    def offer(self, error: Tensor, first: Tensor, second: Tensor) -> None:
        """Take `first` and `second` where `error` is less than what was seen before."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.first = torch.where(better, first, self.first)
        self.second = torch.where(better, second, self.second)
