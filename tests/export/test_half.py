"""FP16 arithmetic: valid, close to float32, and float32 where FP16 would spoil the result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, canonical, float_model, largest_error, skeleton
from lowered import FLIPPED_CODES, HALF_ERROR, distance, feeds
from numpy.typing import NDArray
from small_model import recipe_of
from test_linear import PER_TENSOR, PER_TOKEN, STATIC_S8, codes, filled, simulated, tokens

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.errors import BadInput
from samq.export.canonical import read_gemms
from samq.export.graph import producer
from samq.export.half import to_fp16
from samq.export.parts import float_part
from samq.quant.inputs import InputGrid

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def form(name: str, part: str) -> ir.Model:
    """The float part, that with FP16 weights, or the canonical form of a preset; dynamic shapes."""
    if name in ("float", "half"):
        return float_part(skeleton(part), float_model(), half=name == "half")
    return canonical(recipe_of(name), part)


def small_graph(*nodes: ir.Node, x: ir.Value, opset: int = 21) -> ir.Model:
    """A model x → … → y of these nodes."""
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), x.shape
    return ir.Model(ir.Graph([x], [y], nodes=nodes, opset_imports={"": opset}, name="small"), ir_version=10)


def typed(node: ir.Node, dtype: ir.DataType = FLOAT) -> ir.Node:
    """The node, its output's type set."""
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def float_input(*shape: int) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(shape))


def constant(array: NDArray[Any], name: str) -> ir.Node:
    return typed(ir.node("Constant", [], {"value": ir.tensor(array, name=name)}), ir.DataType.from_numpy(array.dtype))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["float", "half", "int8_w8a8", "int4_w4a8", "int4_w4only", "int4_svdquant"])
def test_every_form_is_valid_and_close_to_float32(name: str, part: str) -> None:
    model = form(name, part)
    inputs = feeds(model)
    expected = as_written(model, inputs)
    half = to_fp16(model)
    onnx.checker.check_model(ir.to_proto(half), full_check=True)
    allowed = FLIPPED_CODES if any(gemm.inputs for gemm in read_gemms(half)) else HALF_ERROR
    for found, exact in zip(as_written(half, inputs), expected, strict=True):
        assert found.dtype == np.float32
        assert distance(found, exact) < allowed


@pytest.mark.parametrize("name", ["half", "int4_svdquant"])
def test_arithmetic_is_fp16_but_for_inputs_outputs_angles_and_counts(name: str) -> None:
    encoder, decoder = (to_fp16(form(name, part)) for part in (IMAGE_ENCODER, MASK_DECODER))
    assert {node.op_type for node in encoder.graph if node.outputs[0].dtype == FLOAT} == {"Cast"}
    assert [node.op_type for node in encoder.graph].count("Cast") == len(encoder.graph.inputs) + len(
        encoder.graph.outputs
    )
    in_float = {node.op_type for node in decoder.graph if node.outputs[0].dtype == FLOAT}
    assert {"Sin", "Cos", "Cast", "Div"} <= in_float
    assert not in_float & {"LayerNormalization", "Softmax", "Conv", "Gelu", "DequantizeLinear"}
    assert [node.op_type for node in decoder.graph if node.op_type == "MatMul" and node.outputs[0].dtype == FLOAT] == [
        "MatMul"  # of the coordinates with the random frequencies
    ]


@pytest.mark.parametrize("name", ["int8_w8a8", "int4_w4a8", "int4_w4only"])
def test_quantized_weights_and_scales_stay_as_they_are(name: str) -> None:
    before = {gemm.layer: gemm for gemm in read_gemms(form(name, IMAGE_ENCODER))}
    after = {gemm.layer: gemm for gemm in read_gemms(to_fp16(form(name, IMAGE_ENCODER)))}
    assert before.keys() == after.keys()
    for layer, gemm in after.items():
        assert gemm.weight.scale.dtype == np.float16
        np.testing.assert_array_equal(gemm.weight.codes, before[layer].weight.codes)
        np.testing.assert_array_equal(gemm.weight.scale.astype(np.float32), before[layer].weight.scale)
        assert gemm.node.outputs[0].dtype == FLOAT16


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR, PER_TOKEN])
def test_one_layer_with_a_branch(inputs: InputGrid | None) -> None:
    """Its input holds a token of zeros, whose dynamic scale FP16 would round to zero."""
    layer = codes(4, True, 16, inputs, rank=4)
    half = to_fp16(filled(layer))
    onnx.checker.check_model(ir.to_proto(half), full_check=True)
    assert largest_error(as_written(half, {"x": tokens()})[0], simulated(layer, tokens())) < 5e-3


def test_weights_stored_in_fp16_need_no_cast() -> None:
    graph = to_fp16(form("half", IMAGE_ENCODER)).graph
    assert all(producer(value, "Cast") is None for node in graph if node.op_type == "MatMul" for value in node.inputs)
    assert {v.dtype for v in graph.initializers.values()} == {FLOAT16, ir.DataType.INT64}


def test_angles_keep_float32() -> None:
    x = float_input(3)
    two_pi = constant(np.float32(2 * math.pi), "two_pi")
    angle = typed(ir.node("Mul", [x, two_pi.outputs[0]]))
    sine = typed(ir.node("Sin", [angle.outputs[0]]))
    model = to_fp16(small_graph(two_pi, angle, sine, x=x))
    value = np.array([100.05, 1000.3, 1023.8], np.float32)
    assert np.abs(as_written(model, {"x": value})[0] - np.sin(np.float32(2 * math.pi) * value)).max() < 1e-3


def test_counts_keep_float32() -> None:
    """A mask of 65,536 pixels: the count is infinite in FP16, and a share of it no number."""
    x = float_input(1, 1 << 16)
    zero, axes = constant(np.float32(0), "zero"), constant(np.array([1]), "axes")
    above = typed(ir.node("Greater", [x, zero.outputs[0]]), ir.DataType.BOOL)
    ones = typed(ir.node("Cast", [above.outputs[0]], {"to": ir.DataType.INT64}), ir.DataType.INT64)
    total = typed(ir.node("ReduceSum", [ones.outputs[0], axes.outputs[0]]), ir.DataType.INT64)
    count = typed(ir.node("Cast", [total.outputs[0]], {"to": FLOAT}))
    share = typed(ir.node("Div", [count.outputs[0], count.outputs[0]]))
    same = typed(ir.node("Add", [share.outputs[0], zero.outputs[0]]))
    model = small_graph(zero, axes, above, ones, total, count, share, same, x=x)
    model.graph.outputs[0].shape = ir.Shape([1, 1])
    assert as_written(to_fp16(model), {"x": np.ones((1, 1 << 16), np.float32)})[0] == 1


def test_float32_shapes_of_resize_and_range() -> None:
    x = float_input(4)
    start, limit, step = (constant(np.float32(number), f"n{number}") for number in (0, 4, 1))
    ramp = typed(ir.node("Range", [node.outputs[0] for node in (start, limit, step)]))
    total = typed(ir.node("Add", [x, ramp.outputs[0]]))
    model = to_fp16(small_graph(start, limit, step, ramp, total, x=x))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_array_equal(as_written(model, {"x": np.ones(4, np.float32)})[0], [1, 2, 3, 4])


def test_a_constant_beyond_fp16_is_refused_by_name() -> None:
    x = float_input(2)
    large = ir.Value(
        name="large",
        type=ir.TensorType(FLOAT),
        const_value=ir.tensor(np.float32(1e6), name="large"),
        shape=ir.Shape([]),
    )
    model = small_graph(typed(ir.node("Add", [x, large])), x=x)
    model.graph.register_initializer(large)
    with pytest.raises(BadInput, match=r"large: it holds 1e\+06"):
        to_fp16(model)


def test_infinite_constants_stay() -> None:
    x = float_input(2)
    masked = constant(np.array([0, -np.inf], np.float32), "masked")
    model = to_fp16(small_graph(masked, typed(ir.node("Add", [x, masked.outputs[0]])), x=x))
    np.testing.assert_array_equal(as_written(model, {"x": np.ones(2, np.float32)})[0], [1, -np.inf])


def test_an_opset_without_fp16_scales_is_a_bug() -> None:
    x = float_input(2)
    with pytest.raises(ValueError, match="opset 17"):
        to_fp16(small_graph(typed(ir.node("Relu", [x])), x=x, opset=17))
