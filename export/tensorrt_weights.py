"""Quantized weights in the forms that TensorRT fuses with a MatMul; all [K, N], all zero-points 0."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.canonical import GemmWeight
from samq.export.graph import Writer
from samq.export.tensorrt_targets import TensorRtTarget

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8
INT4_MIN, INT4_MAX = -8, 7
FP16_TINY = 2.0**-24  # smallest positive FP16 number
FP16_NORMAL = 2.0**-14  # below it, FP16 numbers are FP16_TINY apart


@dataclass(frozen=True)
class Int4Blocks:
    """A weight [K, N] as INT4 codes around zero, with scales [K / size, N]."""

    codes: NDArray[np.int32]
    scale: NDArray[np.float32]
    size: int


def int8_weight(
    writer: Writer, codes: NDArray[np.int8], scale: NDArray[np.float32], target: TensorRtTarget
) -> ir.Value:
    """DequantizeLinear of an INT8 constant, or of QuantizeLinear of a float32 one where the target stores no INT8."""
    shape = ir.Shape(codes.shape)
    parameters = [writer.constant(scale, "int8_scale"), writer.constant(np.zeros(scale.shape, np.int8), "int8_zeros")]
    if target.stored_int8:
        stored = writer.constant(codes, "int8_weight")
    else:
        real = writer.constant(codes.astype(np.float32) * scale, "weight")
        stored = writer.node("QuantizeLinear", [real, *parameters], "quantize_weight", dtype=INT8, shape=shape, axis=1)
    return writer.node("DequantizeLinear", [stored, *parameters], "dequantize_weight", dtype=FLOAT, shape=shape, axis=1)


def int4_weight(writer: Writer, blocks: Int4Blocks) -> ir.Value:
    """DequantizeLinear of an INT4 constant, blocked along K."""
    operands = [
        writer.constant(blocks.codes.astype(ml_dtypes.int4), "int4_weight"),
        writer.constant(blocks.scale, "block_scale"),
        writer.constant(np.zeros(blocks.scale.shape, ml_dtypes.int4), "block_zeros"),
    ]
    shape = ir.Shape(blocks.codes.shape)
    return writer.node(
        "DequantizeLinear", operands, "dequantize_weight", dtype=FLOAT, shape=shape, axis=0, block_size=blocks.size
    )


def int4_blocks(weight: GemmWeight, target: TensorRtTarget) -> Int4Blocks | str:
    """The same weight in INT4 blocks, or why the target has no such form."""
    codes = weight.integers()
    inputs, outputs = codes.shape
    if not target.int4_blocks:
        return f"TensorRT {target.version} has no 4-bit weights"
    if weight.codes.dtype.name not in ("int4", "uint4"):
        return "TensorRT has no INT8 weights without INT8 inputs"
    if codes.min() < INT4_MIN or codes.max() > INT4_MAX:
        return f"TensorRT's INT4 has no zero-points, and without them the codes reach {codes.min()} to {codes.max()}"
    smallest = target.int4_blocks[-1]
    fitting = [size for size in target.int4_blocks if _fits(weight, size)]
    if not fitting and inputs % smallest:
        return f"{inputs} inputs are no multiple of {smallest}, TensorRT's smallest INT4 block"
    if not fitting:
        return f"groups of {weight.group_size} are no multiple of {smallest}, TensorRT's smallest INT4 block"
    if outputs % 2:
        return f"TensorRT packs INT4 in pairs along the outputs, and {outputs} is odd"
    size = fitting[0]
    scale = np.repeat(weight.scale, -(-weight.group_size // size), axis=0)[: inputs // size]
    return Int4Blocks(codes, scale, size)


def _fits(weight: GemmWeight, size: int) -> bool:
    """Whether blocks of `size` divide the inputs, and none reaches over two groups."""
    return weight.codes.shape[0] % size == 0 and (weight.scale.shape[0] == 1 or weight.group_size % size == 0)


def rounded_to_int8(weight: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float32], float]:
    """A real weight [K, N] rounded to nearest on one FP16 scale a column: codes, scales [N], relative error.

    The error is ‖rounded − weight‖ / ‖weight‖ (Frobenius), 0 for a weight of zeros.
    """
    scale = np.maximum((np.abs(weight).max(axis=0) / 127).astype(np.float16), np.float16(FP16_TINY)).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    size = float(np.linalg.norm(weight))
    return codes, scale, float(np.linalg.norm(codes * scale.astype(np.float64) - weight)) / size if size else 0.0


def fp16_error(weight: NDArray[np.float32]) -> float:
    """Largest |w rounded to FP16 − w| / |w| of all weights, 0 where FP16 holds each.

    A weight below `FP16_NORMAL` counts as one of that size, for FP16 may lose all of it.
    """
    with np.errstate(over="ignore"):
        lost = np.abs(weight.astype(np.float16) - weight)
    return float((lost / np.maximum(np.abs(weight), FP16_NORMAL)).max(initial=0.0))
