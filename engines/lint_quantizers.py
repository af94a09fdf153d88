"""What a TensorRT target asks of Q/DQ; `samq.engines.lint` has the table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from samq.engines.lint_nodes import QUANTIZERS, Findings
from samq.export.graph import constant_of, int_attribute, producer
from samq.export.tensorrt_targets import SMALLEST_GEMM, TensorRtTarget

QUANTIZED = ("MatMul", "Gemm", "Conv", "ConvTranspose")  # what TensorRT fuses with a DequantizeLinear
GEMMS = ("MatMul", "Gemm")


def _quantizers(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type in QUANTIZERS)


def _parameter(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def explicit_zero_point(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        if _parameter(node, 2) is None:
            yield str(node.name), f"{node.op_type} has no zero-point"


def zero_point(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        value, scale = _parameter(node, 2), constant_of(node.inputs[1])
        if value is None:
            continue
        zeros = constant_of(value)
        if zeros is None or np.any(zeros.astype(np.int32)):
            yield str(node.name), "its zero-point is not 0"
        elif scale is not None and zeros.size != scale.size:
            yield str(node.name), f"it has {zeros.size} zero-points and {scale.size} scales"


def scale_constant(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        scale = constant_of(node.inputs[1])
        if scale is None:
            yield str(node.name), "its scale is computed while running"
        elif not (scale > 0).all():
            yield str(node.name), "a scale is not positive"


def scale_type(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        scale = node.inputs[1]
        if scale is not None and scale.dtype != target.scale_type:
            yield str(node.name), f"its scale is {scale.dtype}, not {target.scale_type}"


def input_scale(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        scale = constant_of(node.inputs[1])
        if scale is not None and scale.size > 1 and _stored(node) is None:
            yield str(node.name), f"activations have one scale, not {scale.size}"


def _stored(node: ir.Node) -> ir.Value | None:
    """The constant that a chain of Q/DQ starts from, if it does."""
    value = node.inputs[0]
    while value is not None and value.const_value is None:
        before = value.producer()
        value = before.inputs[0] if before is not None and before.op_type in QUANTIZERS else None
    return value


def channel_axis(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        scale, stored = constant_of(node.inputs[1]), _stored(node)
        if stored is None or stored.shape is None or scale is None or scale.size == 1 or scale.ndim != 1:
            continue
        rank, axis = len(stored.shape), int_attribute(node, "axis", 1)
        if axis % rank != rank - 1 or stored.shape[axis] != scale.size:
            yield str(node.name), f"{scale.size} scales along axis {axis} of {stored.shape}, not along the outputs"


def int4_blocks(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        codes = node.inputs[0]
        if codes is None or codes.dtype != ir.DataType.INT4 or codes.shape is None:
            continue
        size, axis, rank = int_attribute(node, "block_size", 0), int_attribute(node, "axis", 1), len(codes.shape)
        side, last = codes.shape[axis], codes.shape[rank - 1]
        if size not in target.int4_blocks:
            yield str(node.name), f"INT4 in blocks of {size}, not of {' or '.join(map(str, target.int4_blocks))}"
        elif axis % rank < rank - 2 or not isinstance(side, int) or side % size:
            yield str(node.name), f"blocks of {size} do not divide axis {axis} of {codes.shape}"
        elif isinstance(last, int) and last % 2:
            yield str(node.name), f"INT4 is packed in pairs along the last axis, and {last} is odd"


def int4_gemm(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        codes = node.inputs[0]
        if codes is None or codes.dtype != ir.DataType.INT4:
            continue
        for user in node.outputs[0].consumers():
            if user.op_type not in GEMMS:
                yield str(node.name), f"{user.op_type} takes no INT4 weights; {' and '.join(GEMMS)} do"


def weight_matrix(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        dequantize = producer(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
        if dequantize is not None:
            stored = _stored(dequantize)
            if stored is None or stored.shape is None or len(stored.shape) != 2:
                yield str(node.name), "its quantized weight is no constant matrix"


def attention_products(model: ir.Model, target: TensorRtTarget) -> Findings:
    """Those with Q/DQ at the first operand; `weight_matrix` finds the others."""
    for node in model.graph:
        if node.op_type != "MatMul" or producer(node.inputs[0], "DequantizeLinear") is None:
            continue
        other = node.inputs[1]
        if producer(other, "DequantizeLinear") is None and _varies(other):
            yield str(node.name), "a product of two activations, as attention has them, with Q/DQ; leave it float"


def _varies(value: ir.Value | None) -> bool:
    """It depends on an input of the graph."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one is None or one in seen or one.const_value is not None:
            continue
        seen.add(one)
        before = one.producer()
        if before is None:
            return True
        waiting += before.inputs
    return False


def stored_codes(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        if node.op_type == "DequantizeLinear" and constant_of(node.inputs[0]) is not None:
            yield str(node.name), "an INT8 constant; weights are float32 constants in front of Q → DQ"


def fusable(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in _quantizers(model):
        wanted = QUANTIZED if node.op_type == "DequantizeLinear" else ("DequantizeLinear",)
        for user in node.outputs[0].consumers():
            if user.op_type not in wanted:
                yield str(node.name), f"{user.op_type} stands between it and the {wanted[0]}"


def gemm_size(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        if node.op_type != "MatMul" or any(producer(value, "DequantizeLinear") is None for value in node.inputs):
            continue
        shape = None if node.inputs[1] is None else node.inputs[1].shape
        if shape is not None and any(isinstance(side, int) and side < SMALLEST_GEMM for side in shape[-2:]):
            yield str(node.name), f"an INT8 GEMM of {shape}; below {SMALLEST_GEMM} leave it float"


def shared(model: ir.Model, target: TensorRtTarget) -> Findings:
    seen = set()
    for node in model.graph:
        scale = constant_of(node.inputs[1]) if node.op_type == "QuantizeLinear" else None
        if scale is None or scale.size > 1 or _stored(node) is not None:
            continue
        key = (node.inputs[0], float(scale))
        if key in seen:
            yield str(node.name), "the same tensor is quantized twice by one scale"
        seen.add(key)
