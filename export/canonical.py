"""Reading the canonical Q/DQ graph: one `Gemm` for each quantized layer. Every lowering starts here.

Needs neither torch nor transformers, so that graphs can be lowered where engines are built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.graph import LAYER_KEY, constant_of, int_attribute, producer


@dataclass(frozen=True)
class GemmInputs:
    """How the activations are quantized.

    Args:
        source: the float activations.
        codes: what QuantizeLinear gives.
        scale, zero_point: its parameters; `scale` has a constant when static. No zero-point per token.
        per_token: one dynamic scale a token.
    """

    source: ir.Value
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    per_token: bool


@dataclass(frozen=True)
class GemmWeight:
    """The weight as stored, [K, N] with blocks along K.

    Args:
        codes: int4, uint4, int8 or uint8.
        scale: [groups, N] float32; integers when there are two levels.
        zero_point: [groups, N] or None.
        channel_scale: [N] float32 when there are two levels, else None.
        group_size: inputs that share a scale.
    """

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    zero_point: NDArray[Any] | None
    channel_scale: NDArray[np.float32] | None
    group_size: int

    def integers(self) -> NDArray[np.int32]:
        """(code − zero_point), times the integer group scale when there are two levels, [K, N]."""
        values = self.codes.astype(np.int32)
        if self.zero_point is not None:
            values = values - self._spread(self.zero_point.astype(np.int32))
        return values if self.channel_scale is None else values * self._spread(self.scale.astype(np.int32))

    def int8(self) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """The exact per-channel INT8 weight [K, N] and its scale [N], or None where there is none."""
        integers = self.integers()
        scale = self.channel_scale if self.channel_scale is not None else self.scale[0]
        if (self.channel_scale is None and self.scale.shape[0] > 1) or np.abs(integers).max(initial=0) > 127:
            return None
        return integers.astype(np.int8), scale

    def dequantized(self) -> NDArray[np.float32]:
        """The real weight [K, N], as DequantizeLinear computes it."""
        if self.channel_scale is not None:
            return self.integers().astype(np.float32) * self.channel_scale
        scale: NDArray[np.float32] = self._spread(self.scale)
        return self.integers().astype(np.float32) * scale

    def _spread(self, per_group: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(per_group, self.group_size, axis=0)[: self.codes.shape[0]]


@dataclass(frozen=True)
class Gemm:
    """One quantized layer of a canonical graph.

    Args:
        layer: its name.
        node: the MatMul.
        inputs: quantized activations, or None for float ones.
        weight: the stored weight.
    """

    layer: str
    node: ir.Node
    inputs: GemmInputs | None
    weight: GemmWeight


def read_gemms(model: ir.Model) -> Iterator[Gemm]:
    """Every quantized layer of a canonical graph, in graph order."""
    for node in list(model.graph):
        if node.op_type != "MatMul" or LAYER_KEY not in node.metadata_props:
            continue
        weight = _read_weight(node.inputs[1])
        if weight is not None:
            yield Gemm(node.metadata_props[LAYER_KEY], node, _read_inputs(node.inputs[0]), weight)


def _read_weight(value: ir.Value | None) -> GemmWeight | None:
    last = producer(value, "DequantizeLinear")
    if last is None:
        return None
    channel_scale = None
    requantized = producer(last.inputs[0], "QuantizeLinear")
    if requantized is not None:
        channel_scale = _required(last.inputs[1])
        first = producer(requantized.inputs[0], "DequantizeLinear")
        assert first is not None
        last = first
    codes, scale = _required(last.inputs[0]), _required(last.inputs[1])
    zero_point = constant_of(last.inputs[2]) if len(last.inputs) > 2 else None
    if "block_size" in last.attributes:
        return GemmWeight(codes, scale, zero_point, channel_scale, int_attribute(last, "block_size", 0))
    zero_row = None if zero_point is None else zero_point[None]
    return GemmWeight(codes, scale[None], zero_row, channel_scale, codes.shape[0])


def _required(value: ir.Value | None) -> NDArray[Any]:
    array = constant_of(value)
    if array is None:
        raise ValueError(f"{value}: a quantized weight must be constant")
    return array


def _read_inputs(value: ir.Value | None) -> GemmInputs | None:
    dequantize = producer(value, "DequantizeLinear")
    quantize = None if dequantize is None else producer(dequantize.inputs[0], "QuantizeLinear")
    if quantize is None:
        return None
    source, scale = quantize.inputs[0], quantize.inputs[1]
    assert source is not None
    assert scale is not None
    zero_point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    return GemmInputs(source, quantize.outputs[0], scale, zero_point, "block_size" in quantize.attributes)
