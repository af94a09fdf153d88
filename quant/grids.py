"""Integer grids: which codes a weight may take, how they pack, and what they mean.

One level:   w[n, k] = scale[n, k//G] · (code[n, k] − zero_point[n, k//G])
Two levels:  w[n, k] = channel_scale[n] · scale[n, k//G] · (code[n, k] − zero_point[n, k//G])
             with integer `scale` and |scale · (code − zero_point)| ≤ 127, so that the product is a per-channel INT8
             weight without a second rounding (QServe, arXiv 2405.04532, section 4.2, progressive quantization).

N output channels, K inputs, G the group size; the last group is shorter where G does not divide K. Every real scale is
representable in FP16 and every product above fits FP32's 24 bits, so that each engine computes the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127


@dataclass(frozen=True)
class Grid:
    """The codes of one weight format.

    Args:
        bits: 4 or 8.
        signed: two's complement codes around an implied zero; otherwise unsigned codes with a zero-point.
        two_level: integer group scales times one real scale per output channel.
    """

    bits: int
    signed: bool
    two_level: bool = False

    @property
    def qmin(self) -> int:
        """Lowest code. INT8 weights and two-level codes are kept symmetric, as INT8 GEMMs want them."""
        if not self.signed:
            return 0
        symmetric = self.two_level or self.bits == 8
        return -self.qmax if symmetric else -self.qmax - 1

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Type that holds one unpacked code."""
        return torch.int8 if self.signed else torch.uint8


@dataclass(frozen=True)
class Scales:
    """Scales and zero-points of one weight matrix; see the module's docstring for their meaning.

    Args:
        scale: [N, groups] float32; integers where the grid has two levels.
        zero_point: [N, groups] float32 holding codes, or None for a signed grid.
        channel_scale: [N, 1] float32, or None for one level.
        group_size: inputs that share a scale.
    """

    scale: Tensor
    zero_point: Tensor | None
    channel_scale: Tensor | None
    group_size: int

    def of_rows(self, rows: slice) -> Scales:
        """The scales of some output channels."""
        zero_point, channel_scale = (
            None if tensor is None else tensor[rows] for tensor in (self.zero_point, self.channel_scale)
        )
        return Scales(self.scale[rows], zero_point, channel_scale, self.group_size)

    def step(self) -> Tensor:
        """Distance between neighbouring weights, [N, groups]."""
        return self.scale if self.channel_scale is None else self.scale * self.channel_scale

    def per_input(self, inputs: int) -> tuple[Tensor, Tensor]:
        """`step` and zero-point spread over the inputs, both [N, K]."""
        step = spread(self.step(), self.group_size, inputs)
        if self.zero_point is None:
            return step, torch.zeros_like(step)
        return step, spread(self.zero_point, self.group_size, inputs)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of one weight matrix with their scales.

    Args:
        codes: [N, K], int8 for signed grids and uint8 for unsigned ones.
        scales: the scales they are measured in.
        grid: the format.
    """

    codes: Tensor
    scales: Scales
    grid: Grid

    def of_rows(self, rows: slice) -> QuantizedWeight:
        """The weight of some output channels."""
        return QuantizedWeight(self.codes[rows], self.scales.of_rows(rows), self.grid)

    def dequantize(self) -> Tensor:
        """The weight that every engine computes with, [N, K] float32, exact."""
        step, zero_point = self.scales.per_input(self.codes.shape[1])
        return (self.codes.float() - zero_point) * step

    def as_int8(self) -> Tensor:
        """The INT8 weight of a two-level or an INT8 grid, [N, K]; the real one is this times the per-channel scale."""
        if self.scales.channel_scale is None:
            return self.codes
        scale = spread(self.scales.scale, self.scales.group_size, self.codes.shape[1])
        zero_point = 0 if self.scales.zero_point is None else self.scales.per_input(self.codes.shape[1])[1]
        return ((self.codes.float() - zero_point) * scale).to(torch.int8)

    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero-points as they are stored."""
        rows, inputs = self.codes.shape
        groups = self.scales.scale.shape[1]
        group_scale_bytes = 1 if self.grid.two_level else 2
        zero_point_bits = 0 if self.grid.signed else self.grid.bits
        channel_bytes = 2 * rows if self.grid.two_level else 0
        bits = rows * inputs * self.grid.bits + rows * groups * zero_point_bits
        return -(-bits // 8) + rows * groups * group_scale_bytes + channel_bytes


def groups_of(inputs: int, group_size: int) -> int:
    """Number of groups along K; the last one may be short."""
    return -(-inputs // group_size)


def spread(per_group: Tensor, group_size: int, inputs: int) -> Tensor:
    """[N, groups] → [N, K], each value repeated over its group."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :inputs]


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] → [N, groups, G], the last group filled up with zeros, which every grid represents exactly."""
    rows, inputs = weight.shape
    groups = groups_of(inputs, group_size)
    return F.pad(weight, (0, groups * group_size - inputs)).view(rows, groups, group_size)


def round_to_grid(weight: Tensor, scales: Scales, grid: Grid) -> QuantizedWeight:
    """Round-to-nearest (ties to even): code = clamp(round(w / step) + zero_point).

    Args:
        weight: [N, K] float32.
    """
    step, zero_point = scales.per_input(weight.shape[1])
    codes = torch.clamp(torch.round(weight / step) + zero_point, grid.qmin, grid.qmax)
    return QuantizedWeight(codes.to(grid.dtype), scales, grid)


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the low half, as ONNX stores INT4 and UINT4.

    Args:
        codes: any shape, int8 in [-8, 7] or uint8 in [0, 15].

    Returns:
        uint8 [ceil(numel / 2)].
    """
    flat = codes.flatten().to(torch.int16) & 0xF
    flat = F.pad(flat, (0, flat.numel() % 2))
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, shape: tuple[int, ...], signed: bool) -> Tensor:
    """Inverse of `pack_int4`: int8 (signed) or uint8 codes of the given shape."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[: torch.Size(shape).numel()]
    if not signed:
        return halves.view(shape)
    return ((halves.to(torch.int8) ^ 8) - 8).view(shape)
