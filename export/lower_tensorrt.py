"""Canonical Q/DQ graph, or the float baseline → the graph that TensorRT executes as asked for.

TensorRT fuses Q/DQ patterns into kernels, and only some. So each layer gets exactly the pattern that it fuses:

| requested                                   | lowered to                                                           |
|---------------------------------------------|----------------------------------------------------------------------|
| INT8 inputs, one static symmetric scale     | x → Q → DQ → MatMul ← DQ ← INT8 weight, one scale an output channel  |
| float inputs, 4-bit weights (trt10, trt11)  | x → MatMul ← DQ ← INT4 weight in blocks of 128 or 64 inputs          |
| what the target has not                     | refused, or float weights, which `LoweredLayer.reason` explains      |

Two-level weights become their INT8 product, which is exact. Layers that read one tensor through equal scales share one
Q/DQ. Weights are constants [K, N], with nothing between DQ and MatMul. TensorRT 8.6 takes weights as float32 constants
in front of Q → DQ of one scale; (code · scale) / scale rounds to the code, as code · scale is exact in float32.
FP16 may round it: where a layer gets float weights, `LoweredLayer.reason` says by how much.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.errors import UsageError
from samq.export.canonical import Gemm, GemmInputs, read_gemms
from samq.export.fold import fold_constants
from samq.export.graph import (
    LAYER_KEY,
    LOW_RANK,
    ROLE_KEY,
    Writer,
    constant_of,
    producer,
    remove_unused,
    replace_value,
)
from samq.export.half import needing_float32, to_fp16
from samq.export.layer_norm import write_out_layer_norms
from samq.export.lowered_layer import FLOAT_GEMM, INT4_GEMM, INT8_GEMM, LoweredLayer
from samq.export.opset17 import to_opset17
from samq.export.placement import EVERYWHERE, RANKS, Form, Placement
from samq.export.tensorrt_operators import fit_operators
from samq.export.tensorrt_rewrites import rewrite
from samq.export.tensorrt_targets import SMALLEST_GEMM, TensorRtTarget
from samq.export.tensorrt_weights import fp16_error, int4_blocks, int4_weight, int8_weight, rounded_to_int8

FLOAT = ir.DataType.FLOAT
UNSIGNED_ZERO = 128  # the uint8 zero-point that is int8's 0
PLACED = "faster in FP16: placed there"

Branch = Literal["branch", "fold"]


@dataclass(frozen=True)
class Lowered:
    """A lowered model.

    Args:
        model: the graph.
        layers: every linear layer, in graph order.
        float32: names of nodes that a weakly typed build must keep in float32 (`samq.export.half` says why); empty for
            strongly typed targets, whose graph says it.
    """

    model: ir.Model
    layers: dict[str, LoweredLayer]
    float32: tuple[str, ...]


@dataclass(frozen=True)
class _LowRank:
    """The nodes x → down → up → sum of one layer."""

    down: ir.Node
    up: ir.Node
    sum: ir.Node

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """down [K, r] and up [r, N], the components that remove most first."""
        down, up = constant_of(self.down.inputs[1]), constant_of(self.up.inputs[1])
        assert down is not None
        assert up is not None
        return down, up

    def product(self, but: int = 0) -> NDArray[np.float64]:
        """down · up, [K, N], without the first components."""
        down, up = self.factors()
        product: NDArray[np.float64] = down[:, but:].astype(np.float64) @ up[but:].astype(np.float64)
        return product


def lower_for_tensorrt(
    model: ir.Model,
    target: TensorRtTarget,
    low_rank: Branch = "branch",
    *,
    placement: Placement = EVERYWHERE,
    rewrites: Collection[str] = (),
) -> Lowered:
    """Lower a canonical model or a float baseline in place.

    Args:
        model: opset 21, float32 arithmetic. TensorRT optimizes static shapes best.
        target: from `samq.export.tensorrt_targets.TARGETS`.
        low_rank: keep low-rank branches beside INT8 GEMMs, or add them to the INT8 weight and round that again.
        placement: which layers run in INT8 at all, and how much of their branch they keep; those in FP16 have it in the
            weight.
        rewrites: names of `samq.export.tensorrt_rewrites`; none of them changes what is computed.

    Raises:
        UsageError: the quantization of a layer cannot be expressed for this target; the message names layer and fix.
    """
    fold_constants(model)
    layers = _lower_layers(model, target, low_rank, placement)
    rewrite(model, rewrites)
    fit_operators(model.graph, target)
    exact: set[ir.Node] = set()
    if target.strongly_typed:
        to_fp16(model)
    else:
        exact = needing_float32(model.graph)
        if any(node.op_type == "QuantizeLinear" for node in model.graph):
            exact |= write_out_layer_norms(model)
        to_opset17(model)
    return Lowered(model, layers, tuple(str(node.name) for node in model.graph if node in exact))


def _lower_layers(
    model: ir.Model, target: TensorRtTarget, low_rank: Branch, placement: Placement
) -> dict[str, LoweredLayer]:
    graph = model.graph
    names = [n.metadata_props[LAYER_KEY] for n in graph if n.op_type == "MatMul" and LAYER_KEY in n.metadata_props]
    layers = {name: LoweredLayer(FLOAT_GEMM) for name in names}
    branches = _branches(graph)
    lowering = _Lowering(graph, target)
    for gemm in read_gemms(model):
        form = placement.form(gemm.layer)
        layers[gemm.layer] = lowering.lowered(gemm, branches.get(gemm.layer), low_rank if form == "int8" else form)
    remove_unused(model)
    return layers


def _branches(graph: ir.Graph) -> dict[str, _LowRank]:
    """The low-rank branch of each layer that has one."""
    found = {}
    for node in graph:
        if node.op_type == "Add" and ROLE_KEY in node.metadata_props:
            up = producer(node.inputs[1], "MatMul")
            down = producer(None if up is None else up.inputs[0], "MatMul")
            assert up is not None
            assert down is not None
            found[node.metadata_props[LAYER_KEY]] = _LowRank(down, up, node)
    return found


class _Lowering:
    """Writes the pattern of each layer and keeps the Q/DQ that layers share."""

    def __init__(self, graph: ir.Graph, target: TensorRtTarget) -> None:
        self.graph, self.target = graph, target
        self.shared: dict[tuple[ir.Value, float], ir.Value] = {}
        self.narrowed: dict[tuple[ir.Node, int], ir.Value] = {}

    def lowered(self, gemm: Gemm, branch: _LowRank | None, form: Form) -> LoweredLayer:
        """Rewrite one layer's MatMul."""
        writer = Writer(self.graph, gemm.node, gemm.layer)
        if form == "fp16":
            return self._placed_in_fp16(writer, gemm, branch)
        if gemm.inputs is not None:
            scale = _static_scale(gemm.layer, gemm.inputs)  # refuses what no engine has, whatever the size
            if min(gemm.weight.codes.shape) >= SMALLEST_GEMM:
                return self._int8(writer, gemm, gemm.inputs, scale, branch, form)
        layer = self._float_inputs(writer, gemm)
        return layer if branch is None else replace(layer, branch="kept")

    def _placed_in_fp16(self, writer: Writer, gemm: Gemm, branch: _LowRank | None) -> LoweredLayer:
        """Float inputs, and the weight with its branch as one."""
        weight = gemm.weight.dequantized()
        if branch is not None:
            weight = (weight + branch.product()).astype(np.float32)
            self._drop(branch)
        if gemm.inputs is not None:
            gemm.node.replace_input_with(0, gemm.inputs.source)
        gemm.node.replace_input_with(1, writer.constant(weight, "weight"))
        reason = PLACED + _rounding(weight, "the weights")
        return LoweredLayer(FLOAT_GEMM, reason, branch="" if branch is None else "folded")

    def _drop(self, branch: _LowRank) -> None:
        assert branch.sum.inputs[0] is not None
        replace_value(self.graph, branch.sum.outputs[0], branch.sum.inputs[0])

    def _narrow(self, writer: Writer, branch: _LowRank, rank: int) -> None:
        """Leave the first components of a branch; layers that share its down-projection go on sharing."""
        (down, up), x = branch.factors(), branch.down.inputs[0]
        key = branch.down, rank
        if key not in self.narrowed:
            assert x is not None
            shape = None if x.shape is None else ir.Shape([*x.shape[:-1], rank])
            owner = Writer(self.graph, branch.down, branch.down.metadata_props[LAYER_KEY])
            factor = owner.constant(down[:, :rank], f"{LOW_RANK}/down_weight_{rank}")
            self.narrowed[key] = owner.node(
                "MatMul", [x, factor], f"{LOW_RANK}/down_{rank}", dtype=FLOAT, shape=shape, role=LOW_RANK
            )
        branch.up.replace_input_with(0, self.narrowed[key])
        branch.up.replace_input_with(1, writer.constant(up[:rank], f"{LOW_RANK}/up_weight_{rank}"))

    def _int8(
        self, writer: Writer, gemm: Gemm, inputs: GemmInputs, scale: float, branch: _LowRank | None, form: Form
    ) -> LoweredLayer:
        weight = gemm.weight.int8()
        if weight is None:
            raise UsageError(
                f"{gemm.layer}: TensorRT multiplies INT8 inputs by INT8 weights with one scale an output channel; "
                "set wgts.dtype to sint4, or to sint8 with group_shapes: [[1, -1]]"
            )
        layer = LoweredLayer(INT8_GEMM)
        if branch is not None:
            all_of_it = len(branch.factors()[1])
            kept = 0 if form == "fold" else min(RANKS.get(form, all_of_it), all_of_it)
            layer = replace(layer, branch="kept" if kept else "folded")
            if kept < all_of_it:
                codes, scales, error = rounded_to_int8(gemm.weight.dequantized() + branch.product(but=kept))
                weight, layer = (codes, scales), replace(layer, fold_error=error, kept_rank=kept or None)
                if kept:
                    self._narrow(writer, branch, kept)
                else:
                    self._drop(branch)
        gemm.node.replace_input_with(0, self._quantized(writer, inputs, scale))
        gemm.node.replace_input_with(1, int8_weight(writer, *weight, self.target))
        return layer

    def _quantized(self, writer: Writer, inputs: GemmInputs, scale: float) -> ir.Value:
        """Q → DQ of the inputs, one for all layers that read them through the same scale."""
        key = (inputs.source, scale)
        if key not in self.shared:
            source, shape = inputs.source, inputs.source.shape
            parameters = [
                writer.constant(np.array(scale, np.float32), "int8_input_scale"),
                writer.constant(np.array(0, np.int8), "int8_input_zero"),
            ]
            codes = writer.node(
                "QuantizeLinear", [source, *parameters], "quantize_input", dtype=ir.DataType.INT8, shape=shape
            )
            self.shared[key] = writer.node(
                "DequantizeLinear", [codes, *parameters], "dequantize_input", dtype=FLOAT, shape=shape
            )
        return self.shared[key]

    def _float_inputs(self, writer: Writer, gemm: Gemm) -> LoweredLayer:
        """INT4 blocks where the target has them, else float weights."""
        if gemm.inputs is not None:
            gemm.node.replace_input_with(0, gemm.inputs.source)
            sizes = " × ".join(map(str, gemm.weight.codes.shape))
            reason = f"{sizes}: an INT8 GEMM wants {SMALLEST_GEMM} inputs and outputs or more"
        else:
            blocks = int4_blocks(gemm.weight, self.target)
            if not isinstance(blocks, str):
                gemm.node.replace_input_with(1, int4_weight(writer, blocks))
                return LoweredLayer(INT4_GEMM)
            reason = blocks
        weight = gemm.weight.dequantized()
        gemm.node.replace_input_with(1, writer.constant(weight, "weight"))
        product = "code · scale" if gemm.weight.zero_point is None else "(code − zero-point) · scale"
        return LoweredLayer(FLOAT_GEMM, f"weights dequantized: {reason}{_rounding(weight, product)}")


def _rounding(weight: NDArray[np.float32], what: str) -> str:
    """What FP16 does to a dequantized weight, to end a reason with; nothing where it is exact."""
    error = fp16_error(weight)
    return f"; FP16 rounds {what} by up to {100 * error:.3g} %" if error else ""


def _static_scale(layer: str, inputs: GemmInputs) -> float:
    """The one constant scale of symmetric INT8 inputs.

    Raises:
        UsageError: the scale is dynamic, or the zero-point is not int8's 0 (uint8's 128).
    """
    scale, zero_point = constant_of(inputs.scale), constant_of(inputs.zero_point)
    if scale is None or inputs.per_token:
        raise UsageError(
            f"{layer}: no TensorRT release computes INT8 scales while running; "
            "set ipts.granularity: per_tensor and ipts.mode: static"
        )
    assert zero_point is not None
    if int(zero_point) != (UNSIGNED_ZERO if zero_point.dtype == np.uint8 else 0):
        raise UsageError(
            f"{layer}: TensorRT's INT8 inputs are symmetric, and this zero-point is {int(zero_point)}; "
            "set ipts.dtype: sint8"
        )
    return float(scale)
