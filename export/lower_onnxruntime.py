"""Canonical Q/DQ graph → the graph that ONNX Runtime executes on the CPU as asked for.

ONNX Runtime may run a Q/DQ graph in FP32 (MatMul+Add become a float Gemm first), and turns 4-bit weights into
MatMulNBits with INT8 activations unless told otherwise. So its kernels are named outright:

| requested                          | lowered to                                                                    |
|------------------------------------|-------------------------------------------------------------------------------|
| INT8 inputs, one scale a tensor    | QuantizeLinear → com.microsoft.MatMulIntegerToFloat, bias inside              |
| INT8 inputs, one scale a token     | Div → QuantizeLinear → MatMulIntegerToFloat → Mul                             |
| float inputs, 4- or 8-bit weights  | com.microsoft.MatMulNBits with accuracy_level 1: FP32 arithmetic, bias inside |
| low-rank branch                    | MatMul (down) → MatMul (up) → Add, in FP32                                    |

Signed input codes become unsigned ones around 128, which is the same grid and the form that VNNI multiplies. Two-level
weights become their INT8 product. Layers that read one tensor through equal scales share one QuantizeLinear.

What stands around the layers is rewritten for the CPU, exactly, each rewrite in a module of its own: queries, keys and
values get a GEMM each, attention becomes MultiHeadAttention, which is flash attention on the CPU too, maxima are taken
an axis at a time, bytes are moved instead of floats, windows stay in cache, images are not projected for a few tokens,
and the position embedding is enlarged by products. SkipLayerNormalization, which CUDA wants, is slower here than its
parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.add_unrepeated import add_unrepeated
from samq.export.axis_maxima import reduce_axis_by_axis
from samq.export.canonical import Gemm, GemmInputs, GemmWeight, read_gemms
from samq.export.cubic_resize import multiply_to_resize
from samq.export.few_tokens import absorb_projections
from samq.export.fuse_attention import Rewrite, fuse_attention
from samq.export.graph import Writer, constant_of, remove_unused, replace_value
from samq.export.in_cache import keep_in_cache
from samq.export.magnitudes import reduce_from_both_ends
from samq.export.merge_moves import merge_moves
from samq.export.quantize_early import quantize_early
from samq.export.split_projections import split_projections

CONTRIB = "com.microsoft"
FP32_ARITHMETIC = 1  # MatMulNBits accuracy_level; 4 would quantize the activations
BLOCK_SIZES = (128, 64, 32, 16)  # that MatMulNBits unpacks
FLOAT = ir.DataType.FLOAT

REWRITES: tuple[Callable[[ir.Model], Rewrite], ...] = (
    multiply_to_resize,
    absorb_projections,
    add_unrepeated,
    reduce_axis_by_axis,
    reduce_from_both_ends,
    quantize_early,
    merge_moves,
    keep_in_cache,
)

Codes = tuple[ir.Value, ir.Value, ir.Value]
"""Of inputs, with their scale and their zero-point."""
Shared = dict[tuple[object, ...], Codes]
"""Codes by what they are made of."""


def lower_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Lower a canonical model in place; float layers stay as they are.

    Raises:
        ValueError: a layer cannot be expressed exactly; the message names it and says why.
    """
    split_projections(model)
    fuse_attention(model)
    _lower_gemms(model)
    for rewrite in REWRITES:
        rewrite(model)
    return model


def requested_layers(model: ir.Model) -> dict[str, str]:
    """What each quantized layer of a canonical model is to be executed as, in the words of `samq.engines`."""
    return {gemm.layer: _requested(gemm) for gemm in read_gemms(model)}


def _requested(gemm: Gemm) -> str:
    return "INT8 GEMM" if gemm.inputs is not None else f"INT{_bits(gemm.weight)} weights, FP32 arithmetic"


class _PartWriter(Writer):
    """Names what it writes after its part of the layer, too: `_0` in `<layer>/MatMul_0` are its first columns."""

    def __init__(self, graph: ir.Graph, gemm: Gemm) -> None:
        super().__init__(graph, gemm.node, gemm.layer)
        self._part = str(gemm.node.name).removeprefix(f"{gemm.layer}/MatMul")

    def node(self, op: str, inputs: Any, name: str, **attributes: Any) -> ir.Value:
        return super().node(op, inputs, f"{name}{self._part}", **attributes)

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        return super().constant(array, f"{name}{self._part}")


def _lower_gemms(model: ir.Model) -> None:
    shared: Shared = {}
    for gemm in read_gemms(model):
        writer = _PartWriter(model.graph, gemm)
        if gemm.inputs is None:
            old, new = _weight_only(writer, gemm)
        elif gemm.inputs.per_token:
            old, new = gemm.node.outputs[0], _per_token(writer, gemm, gemm.inputs, shared)
        else:
            old, new = _per_tensor(writer, gemm, gemm.inputs, shared)
        replace_value(model.graph, old, new)
        for stale in (old.producer(), gemm.node):
            if stale is not None and stale.graph is not None and not stale.outputs[0].uses():
                model.graph.remove(stale, safe=True)
    model.graph.opset_imports[CONTRIB] = 1
    remove_unused(model)


def _int8_weight(gemm: Gemm) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    weight = gemm.weight.int8()
    if weight is None:
        raise ValueError(f"{gemm.layer}: its weight is no per-channel INT8 weight, so an INT8 GEMM cannot run it")
    return weight


def _per_tensor(writer: Writer, gemm: Gemm, inputs: GemmInputs, shared: Shared) -> tuple[ir.Value, ir.Value]:
    """MatMulIntegerToFloat; returns the value that it replaces (after the bias, where there is one) and itself."""
    add = _bias_add(gemm)
    codes = _unsigned_codes(writer, inputs, shared)
    if add is None:
        return gemm.node.outputs[0], _int8_gemm(writer, gemm, codes)
    return add.outputs[0], _int8_gemm(writer, gemm, codes, add.inputs[1])


def _per_token(writer: Writer, gemm: Gemm, inputs: GemmInputs, shared: Shared) -> ir.Value:
    """MatMulIntegerToFloat on codes of step 1, and the tokens' scales behind it."""
    product = _int8_gemm(writer, gemm, _token_codes(writer, inputs, shared))
    return writer.node("Mul", [product, inputs.scale], "token_scaled", dtype=FLOAT, shape=product.shape)


def _int8_gemm(writer: Writer, gemm: Gemm, codes: Codes, bias: ir.Value | None = None) -> ir.Value:
    values, scale, zero_point = codes
    integers, channel_scale = _int8_weight(gemm)
    operands: list[ir.Value | None] = [
        values,
        writer.constant(integers, "int8_weight"),
        scale,
        writer.constant(channel_scale, "int8_scale"),
        zero_point,
    ]
    if bias is not None:
        operands += [None, bias]
    return writer.node(
        "MatMulIntegerToFloat", operands, "MatMul", domain=CONTRIB, dtype=FLOAT, shape=gemm.node.outputs[0].shape
    )


def _bias_add(gemm: Gemm) -> ir.Node | None:
    """The Add of a constant [N] that alone reads the GEMM's result."""
    users = gemm.node.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    bias = constant_of(users[0].inputs[1])
    return users[0] if bias is not None and bias.ndim == 1 else None


def _unsigned_codes(writer: Writer, inputs: GemmInputs, shared: Shared) -> Codes:
    """Input codes as uint8 around a zero-point."""
    zero = constant_of(inputs.zero_point)
    assert zero is not None
    offset = int(zero) + (128 if zero.dtype == np.int8 else 0)
    static_scale = constant_of(inputs.scale)
    key = (inputs.source, inputs.scale if static_scale is None else float(static_scale), offset)
    if key not in shared:
        shared[key] = _quantized(writer, inputs.source, inputs.scale, offset)
    return shared[key]


def _token_codes(writer: Writer, inputs: GemmInputs, shared: Shared) -> Codes:
    """Input codes of step 1 as uint8 around 128.

    Inputs are divided by the scales of their tokens first: QuantizeLinear with a scale a token is many times slower
    than a division and a QuantizeLinear with one scale, which give the same codes.
    """
    key = (inputs.source, inputs.scale)
    if key not in shared:
        step = writer.constant(np.array(1, np.float32), "token_step")
        divided = writer.node(
            "Div", [inputs.source, inputs.scale], "token_divided", dtype=FLOAT, shape=inputs.source.shape
        )
        shared[key] = _quantized(writer, divided, step, 128)
    return shared[key]


def _quantized(writer: Writer, source: ir.Value, scale: ir.Value, offset: int) -> Codes:
    zero_point = writer.constant(np.array(offset, np.uint8), "input_offset")
    codes = writer.node(
        "QuantizeLinear", [source, scale, zero_point], "QuantizeLinear", dtype=ir.DataType.UINT8, shape=source.shape
    )
    return codes, scale, zero_point


def _weight_only(writer: Writer, gemm: Gemm) -> tuple[ir.Value, ir.Value]:
    """MatMulNBits; returns the value that it replaces and itself, as `_per_tensor`."""
    weight = gemm.weight
    inputs, outputs = weight.codes.shape
    bits = _bits(weight)
    block = _block_size(gemm)
    blocks = -(-inputs // block)
    packed, zero_points = packed_codes(weight, bits, block, blocks)
    scale = np.repeat(weight.scale, max(1, weight.group_size // block), axis=0)[:blocks]
    if weight.scale.shape[0] == 1:
        scale = np.repeat(weight.scale, blocks, axis=0)
    operands: list[ir.Value | None] = [
        gemm.node.inputs[0],
        writer.constant(packed, "packed"),
        writer.constant(scale.T, "block_scale"),
        None if zero_points is None else writer.constant(zero_points, "block_zero_point"),
    ]
    old, add = gemm.node.outputs[0], _bias_add(gemm)
    if add is not None:
        operands += [None, add.inputs[1]]
        old = add.outputs[0]
    while operands[-1] is None:
        operands.pop()
    new = writer.node(
        "MatMulNBits", operands, "MatMul", domain=CONTRIB, dtype=FLOAT, shape=gemm.node.outputs[0].shape,
        K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=FP32_ARITHMETIC,
    )  # fmt: skip
    return old, new


def _bits(weight: GemmWeight) -> int:
    return 4 if weight.codes.dtype.name in ("int4", "uint4") else 8


def _block_size(gemm: Gemm) -> int:
    """Largest block of MatMulNBits that stays within one group."""
    if gemm.weight.scale.shape[0] == 1:
        return next((b for b in BLOCK_SIZES if b <= gemm.weight.codes.shape[0]), BLOCK_SIZES[-1])
    for block in BLOCK_SIZES:
        if gemm.weight.group_size % block == 0:
            return block
    raise ValueError(f"{gemm.layer}: groups of {gemm.weight.group_size} are no multiple of {BLOCK_SIZES[-1]}")


def packed_codes(
    weight: GemmWeight, bits: int, block: int, blocks: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """MatMulNBits' codes [N, blocks, block·bits/8] and zero-points [N, ceil(blocks·bits/8)]; unsigned throughout.

    Signed codes are shifted by half the range, which is MatMulNBits' zero-point where none is given. A short last
    block is filled up with codes that nothing reads.
    """
    inputs, outputs = weight.codes.shape
    signed = weight.codes.dtype.name.startswith("int")
    half = 1 << (bits - 1)
    codes = weight.codes.astype(np.int16) + (half if signed else 0)
    codes = np.pad(codes, ((0, blocks * block - inputs), (0, 0)), constant_values=half)
    rows = _pack(codes.T.reshape(outputs, blocks, block), bits)
    if weight.zero_point is None:
        return rows, None
    zero_point = np.repeat(weight.zero_point.astype(np.int16), max(1, weight.group_size // block), axis=0)[:blocks]
    if weight.zero_point.shape[0] == 1:
        zero_point = np.repeat(weight.zero_point.astype(np.int16), blocks, axis=0)
    return rows, _pack(zero_point.T, bits)


def _pack(codes: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    """Codes of the last axis into bytes, the first in the low half."""
    if bits == 8:
        return codes.astype(np.uint8)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
