"""Lowered graphs break no rule; for every rule there is a graph that breaks it and no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from lowered import static_form
from numpy.typing import NDArray

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.engines.lint import RULES, lint, require_clean
from samq.errors import BadInput
from samq.export.graph import add_initializer, producer
from samq.export.lower_tensorrt import INT4_GEMM, lower_for_tensorrt
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS, TRT8, TRT10, TensorRtTarget
from samq.export.trace import ANY_SHAPE, StaticShape

SIGNED = {"wgts": {"dtype": "sint4"}}
ROTATED = {"rotation": {"enabled": True, "online": True}}
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("float", {}), ("half", {}), ("int8_w8a8", {}), ("int4_w4a8_rtn", {}), ("int4_w4only_rtn", {}),
    ("int4_w4only_rtn", SIGNED),
]  # fmt: skip
GEMM = "vision_encoder.backbone.blocks.1.attn.proj/MatMul"  # [64, 64]
OPSETS = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
Break = Callable[[ir.Model], Any]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "changes"), FORMS)
@pytest.mark.parametrize("rewrites", [(), tuple(REWRITES)], ids=["as it is", "rewritten"])
def test_lowered_graphs_are_clean(
    name: str, changes: dict[str, Any], part: str, target: TensorRtTarget, rewrites: tuple[str, ...]
) -> None:
    lowered = lower_for_tensorrt(static_form(name, part, **changes), target, rewrites=rewrites)
    assert lint(lowered.model, target) == []
    if changes and target.int4_blocks and part == IMAGE_ENCODER:
        assert INT4_GEMM in {layer.compute for layer in lowered.layers.values()}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("shapes", [StaticShape(), StaticShape(1, 8, None), ANY_SHAPE])
def test_lowered_decoders_of_other_shapes_are_clean(shapes: StaticShape, target: TensorRtTarget) -> None:
    lowered = lower_for_tensorrt(static_form("float", MASK_DECODER, shapes), target, rewrites=REWRITES)
    assert lint(lowered.model, target) == []


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("low_rank", ["branch", "fold"])
def test_lowered_branches_are_clean(target: TensorRtTarget, low_rank: Any) -> None:
    lowered = lower_for_tensorrt(static_form("int4_svdquant", IMAGE_ENCODER), target, low_rank)
    assert lint(lowered.model, target) == []


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["int8_w8a8", "int4_svdquant", "int4_w4only_rtn"])
def test_lowered_rotations_are_clean(name: str, part: str, target: TensorRtTarget) -> None:
    lowered = lower_for_tensorrt(static_form(name, part, **ROTATED), target, rewrites=REWRITES)
    assert "rotated" in {str(node.name).rpartition("/")[2] for node in lowered.model.graph}
    assert lint(lowered.model, target) == []


@cache
def _lowered(name: str, target: TensorRtTarget) -> onnx.ModelProto:
    return ir.to_proto(lower_for_tensorrt(static_form(name, IMAGE_ENCODER, **SIGNED), target).model)


def lowered(name: str, target: TensorRtTarget) -> ir.Model:
    """The lowered image encoder, to be broken."""
    return ir.from_proto(_lowered(name, target))


def parsed(text: str) -> ir.Model:
    """A model in ONNX's own notation, constants as initializers, types inferred."""
    graph = onnx.parser.parse_graph(text)
    proto = onnx.helper.make_model(graph, opset_imports=OPSETS, ir_version=8)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def quantizers(model: ir.Model, operand: int) -> list[ir.Node]:
    """Q (if there) and DQ in front of an operand of GEMM."""
    dequantize = producer(node(model, GEMM).inputs[operand], "DequantizeLinear")
    assert dequantize is not None
    quantize = producer(dequantize.inputs[0], "QuantizeLinear")
    return [dequantize] if quantize is None else [quantize, dequantize]


def set_parameter(model: ir.Model, operand: int, index: int, array: NDArray[Any]) -> None:
    """Give Q and DQ of an operand of GEMM another scale (1) or zero-point (2)."""
    value = add_initializer(model.graph, "another", array)
    for found in quantizers(model, operand):
        found.replace_input_with(index, value)


def rename(model: ir.Model) -> None:
    model.graph[1].name = model.graph[0].name


def drop_zero_point(model: ir.Model) -> None:
    for found in quantizers(model, 0):
        found.resize_inputs(2)


def compute_scale(model: ir.Model) -> None:
    for found in quantizers(model, 0):
        found.replace_input_with(1, ir.Value(name="computed", type=ir.TensorType(ir.DataType.FLOAT)))


def set_axis(model: ir.Model) -> None:
    """64 scales along 64 inputs instead of 64 outputs: only the axis tells."""
    for found in quantizers(model, 1):
        found.attributes["axis"] = ir.AttrInt64("axis", 0)


def set_block_size(model: ir.Model) -> None:
    quantizers(model, 1)[-1].attributes["block_size"] = ir.AttrInt64("block_size", 32)


def set_block_axis(model: ir.Model) -> None:
    codes = quantizers(model, 1)[-1].inputs[0]
    assert codes is not None
    codes.shape = ir.Shape([65, 64])


def odd_outputs(model: ir.Model) -> None:
    codes = quantizers(model, 1)[-1].inputs[0]
    assert codes is not None
    codes.shape = ir.Shape([64, 63])


def convolve(model: ir.Model) -> None:
    node(model, GEMM).op_type = "Conv"


def three_dimensions(model: ir.Model) -> None:
    for found in quantizers(model, 1):
        found.attributes["axis"] = ir.AttrInt64("axis", 2)
    stored = quantizers(model, 1)[0].inputs[0]
    assert stored is not None
    stored.shape = ir.Shape([1, 64, 64])


def computed_weight(model: ir.Model) -> None:
    """The first operand, activations, stands where the weight should."""
    gemm = node(model, GEMM)
    gemm.replace_input_with(1, gemm.inputs[0])


def product_of_activations(model: ir.Model) -> None:
    """The weight becomes something that is computed, without Q/DQ of its own."""
    gemm = node(model, GEMM)
    computed = ir.node("Transpose", [quantizers(model, 0)[0].inputs[0]], name="computed")
    model.graph.insert_before(gemm, computed)
    gemm.replace_input_with(1, computed.outputs[0])


def store_codes(model: ir.Model) -> None:
    codes = add_initializer(model.graph, "codes", np.ones((64, 64), np.int8))
    quantizers(model, 1)[-1].replace_input_with(0, codes)


def transpose_weight(model: ir.Model) -> None:
    gemm = node(model, GEMM)
    transpose = ir.node("Transpose", [gemm.inputs[1]], name="transpose")
    model.graph.insert_before(gemm, transpose)
    gemm.replace_input_with(1, transpose.outputs[0])


def narrow(model: ir.Model) -> None:
    weight = node(model, GEMM).inputs[1]
    assert weight is not None
    weight.shape = ir.Shape([64, 8])


def quantize_again(model: ir.Model) -> None:
    quantize, dequantize = quantizers(model, 0)
    gemm = node(model, GEMM)
    again = ir.node("QuantizeLinear", quantize.inputs, name="again")
    back = ir.node("DequantizeLinear", [again.outputs[0], *dequantize.inputs[1:]], name="back")
    model.graph.insert_before(gemm, [again, back])
    gemm.replace_input_with(0, back.outputs[0])


def unname_side(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([None, 3, 128, 128])


def forget_shape(model: ir.Model) -> None:
    model.graph.inputs[0].shape = None


def newer_opset(model: ir.Model) -> None:
    model.opset_imports[""] += 1


IF = """
agraph (float[2] x, bool c) => (float[2] y) {
    y = If (c) <then_branch = a () => (float[2] p) { p = Abs (x) }, else_branch = b () => (float[2] q) { q = Neg (x) }>
}
"""
RESIZE = """
agraph (float[1,2,4,4] x) => (float[1,2,8,8] y) {
    sizes = Constant <value_ints = [1, 2, 8, 8]> ()
    y = Resize <mode = "cubic"> (x, , , sizes)
}
"""
NORMALIZATION = """
agraph (float[2,8] x) => (float[2,8] y) { m = ReduceMean <axes = [-1]> (x)
    d = Sub (x, m) v = Mul (d, d) s = ReduceMean <axes = [-1]> (v) r = Sqrt (s) y = Div (d, r) }
"""
SLICE = """
agraph (float[5] x) => (float[3] y) { start = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [9223372036854775807]> () y = Slice (x, start, end) }
"""
FOLDED = (
    "agraph (float[2] x) => (float[2] y) { c = Constant <value_floats = [1.0, 2.0]> () n = Neg (c) y = Add (x, n) }"
)
FP16 = "agraph (float[2] x) => (float[2] y) { h = Cast <to = 10> (x) y = Cast <to = 1> (h) }"
UINT8 = "agraph (float[2] x) => (float[2] y) { h = Cast <to = 2> (x) y = Cast <to = 1> (h) }"
COUNT = "agraph (int64[2,3] x) => (int64[2,1] y) { a = Constant <value_ints = [1]> () y = ReduceSum (x, a) }"
CLIP = "agraph (int64[2] x) => (int64[2] y) { a = Constant <value_int = 1> () y = Clip (x, a) }"
TRUTH = "agraph (bool[2] x, bool[2] z) => (bool[2] y) { y = Equal (x, z) }"
SQUEEZE = "agraph (float[1,2] x, int64[1] a) => (float[2] y) { y = Squeeze (x, a) }"
SHAPE = "agraph (float[N,2] x) => (int64[1] y) { y = Shape <start = 0, end = 1> (x) }"
GELU = "agraph (float[2] x) => (float[2] y) { y = Gelu (x) }"
FOREIGN = "agraph (float[2] x) => (float[2] y) { y = com.microsoft.FastGelu (x) }"
PRESET, INT4 = "int8_w8a8", "int4_w4only_rtn"


def of(text: str, target: TensorRtTarget = TRT8) -> Callable[[], tuple[ir.Model, TensorRtTarget]]:
    return lambda: (parsed(text), target)


def broken(name: str, target: TensorRtTarget, change: Break) -> Callable[[], tuple[ir.Model, TensorRtTarget]]:
    def make() -> tuple[ir.Model, TensorRtTarget]:
        model = lowered(name, target)
        change(model)
        return model, target

    return make


BROKEN: list[tuple[str, str, Callable[[], tuple[ir.Model, TensorRtTarget]]]] = [
    ("opset", "image_encoder", broken(PRESET, TRT8, newer_opset)),
    ("opset", "image_encoder", broken(PRESET, TRT10, newer_opset)),
    ("flat", "node_0", of(IF)),
    ("names", "node_conv2d", broken(PRESET, TRT8, rename)),
    ("operator", "node_0", of(GELU)),
    ("operator", "node_0", of(FOREIGN)),
    ("operator-types", "node_1", of(COUNT)),
    ("operator-types", "node_1", of(CLIP, TRT10)),
    ("operator-types", "node_0", of(TRUTH)),
    ("tensor-types", "h", of(FP16)),
    ("tensor-types", "h", of(UINT8, TRT10)),
    ("known-shapes", "pixel_values", broken(PRESET, TRT8, unname_side)),
    ("known-shapes", "pixel_values", broken(PRESET, TRT10, forget_shape)),
    ("folded", "node_1", of(FOLDED)),
    ("constant-axes", "node_0", of(SQUEEZE)),
    ("int64-range", "end", of(SLICE)),
    ("whole-shape", "node_0", of(SHAPE)),
    ("resize", "node_1", of(RESIZE)),
    ("layer-normalization", "node_1", of(NORMALIZATION)),
    ("explicit-zero-point", "quantize_input", broken(PRESET, TRT8, drop_zero_point)),
    ("zero-point", "quantize_input", broken(PRESET, TRT8, lambda m: set_parameter(m, 0, 2, np.array(3, np.int8)))),
    ("zero-point", "quantize_weight", broken(PRESET, TRT8, lambda m: set_parameter(m, 1, 2, np.zeros(1, np.int8)))),
    ("scale", "quantize_input", broken(PRESET, TRT8, lambda m: set_parameter(m, 0, 1, np.array(0, np.float32)))),
    ("scale", "quantize_input", broken(PRESET, TRT8, compute_scale)),
    ("scale-type", "quantize_input", broken(PRESET, TRT10, lambda m: set_parameter(m, 0, 1, np.array(1, np.float32)))),
    ("channel-axis", "quantize_weight", broken(PRESET, TRT8, set_axis)),
    ("int4-blocks", "dequantize_weight", broken(INT4, TRT10, set_block_size)),
    ("int4-blocks", "dequantize_weight", broken(INT4, TRT10, set_block_axis)),
    ("int4-blocks", "dequantize_weight", broken(INT4, TRT10, odd_outputs)),
    ("int4-gemm", "dequantize_weight", broken(INT4, TRT10, convolve)),
    ("weight-matrix", "MatMul", broken(PRESET, TRT8, three_dimensions)),
    ("weight-matrix", "MatMul", broken(PRESET, TRT10, computed_weight)),
    ("attention-product", "MatMul", broken(PRESET, TRT8, product_of_activations)),
    ("attention-product", "MatMul", broken(PRESET, TRT10, product_of_activations)),
    ("stored-codes", "dequantize_weight", broken(PRESET, TRT8, store_codes)),
    ("fusable", "dequantize_weight", broken(PRESET, TRT8, transpose_weight)),
    ("gemm-size", "MatMul", broken(PRESET, TRT8, narrow)),
    ("shared-quantization", "again", broken(PRESET, TRT8, quantize_again)),
]


def several_scales(model: ir.Model) -> None:
    set_parameter(model, 0, 1, np.ones(64, np.float32))
    zeros = add_initializer(model.graph, "zeros", np.zeros(64, np.int8))
    for found in quantizers(model, 0):
        found.replace_input_with(2, zeros)


BROKEN.append(("input-scale", "quantize_input", broken(PRESET, TRT8, several_scales)))


@pytest.mark.parametrize(("rule", "name", "make"), BROKEN)
def test_a_broken_graph_breaks_one_rule(
    rule: str, name: str, make: Callable[[], tuple[ir.Model, TensorRtTarget]]
) -> None:
    model, target = make()
    found = lint(model, target)
    assert {violation.rule for violation in found} == {rule}
    assert found[0].node.endswith(name)


def test_int8_weights_may_be_those_of_a_convolution() -> None:
    for target in (TRT8, TRT10):
        model = lowered(PRESET, target)
        convolve(model)
        assert lint(model, target) == []


def test_every_rule_can_be_broken() -> None:
    assert [rule.name for rule in RULES if rule.name not in {name for name, _, _ in BROKEN}] == []
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_the_first_violation_is_named() -> None:
    model = lowered(PRESET, TRT8)
    drop_zero_point(model)
    with pytest.raises(BadInput, match=rf"^{GEMM.rpartition('/')[0]}/quantize_input breaks trt8's rule explicit-zero-"):
        require_clean(model, TRT8)
    require_clean(lowered(PRESET, TRT8), TRT8)
