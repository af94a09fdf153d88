"""Operators that importers do not take with every type: the replacements compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from exported import as_written
from numpy.typing import NDArray

from samq.export.tensorrt_operators import fit_operators
from samq.export.tensorrt_targets import TARGETS, TRT8, TRT10, TensorRtTarget

CLIP = "agraph (int64[5] x) => (int64[5] y) {{ {constants} y = Clip({operands}) }}"
COUNT = """
agraph (float[2,70000] x) => (float[2] y) {
    zero = Constant <value_float = 0.0> ()
    axes = Constant <value_ints = [1]> ()
    above = Greater(x, zero)
    ones = Cast <to = 7> (above)
    total = ReduceSum <keepdims = 0> (ones, axes)
    y = Cast <to = 1> (total)
}
"""
SLICE = """
agraph (float[5] x) => (float[3] y) {
    start = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    y = Slice(x, start, end)
}
"""


def parsed(text: str) -> ir.Model:
    """A model of opset 21 from ONNX's own notation, constants as initializers, types inferred."""
    graph = onnx.parser.parse_graph(text)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def answers(model: ir.Model, target: TensorRtTarget, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Before and after."""
    before = as_written(model, {"x": x})[0]
    fit_operators(model.graph, target)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return before, as_written(model, {"x": x})[0]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize(("bounds", "operators"), [("lh", ["Max", "Min"]), ("l", ["Max"]), ("h", ["Min"])])
def test_integers_are_clipped_by_max_and_min(target: TensorRtTarget, bounds: str, operators: list[str]) -> None:
    constants = " ".join(f"{b} = Constant <value_int = {'-1' if b == 'l' else '3'}> ()" for b in bounds)
    operands = ", ".join(["x", bounds[0] if "l" in bounds else "", *(["h"] if "h" in bounds else [])])
    model = parsed(CLIP.format(constants=constants, operands=operands))
    before, after = answers(model, target, np.array([-9, -1, 0, 3, 9]))
    np.testing.assert_array_equal(after, before)
    assert [node.op_type for node in model.graph] == operators


def test_pixels_are_counted_in_float32_where_integers_are_not_summed() -> None:
    x = np.random.default_rng(0).standard_normal((2, 70000)).astype(np.float32)
    x[0] = 1
    model = parsed(COUNT)
    before, after = answers(model, TRT8, x)
    np.testing.assert_array_equal(after, before)
    assert before[0] == 70000
    total = next(node for node in model.graph if node.op_type == "ReduceSum")
    assert total.outputs[0].dtype == ir.DataType.FLOAT
    untouched = parsed(COUNT)
    fit_operators(untouched.graph, TRT10)
    assert len(untouched.graph) == len(model.graph) + 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("bounds", "operators"),
    [
        ("", ["Shape"]),
        ("<start=0, end=3>", ["Shape"]),
        ("<start=1>", ["Shape", "Slice"]),
        ("<end=-1>", ["Shape", "Slice"]),
        ("<start=-2, end=9>", ["Shape", "Slice"]),
    ],
)
def test_some_sides_are_cut_out_of_all(bounds: str, operators: list[str], target: TensorRtTarget) -> None:
    model = parsed(f"agraph (float[A,B,7] x) => (int64[N] y) {{ y = Shape {bounds} (x) }}")
    before, after = answers(model, target, np.zeros((2, 5, 7), np.float32))
    np.testing.assert_array_equal(after, before)
    assert [node.op_type for node in model.graph] == operators
    assert not model.graph[0].attributes


@pytest.mark.parametrize(("target", "end"), [(TRT8, 2**31 - 1), (TRT10, 2**63 - 1)])
def test_an_end_beyond_32_bits_is_shortened_where_integers_are(target: TensorRtTarget, end: int) -> None:
    model = parsed(SLICE)
    before, after = answers(model, target, np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(after, before)
    ends = model.graph[0].inputs[2]
    assert ends is not None
    assert ends.const_value is not None
    assert ends.const_value.numpy().tolist() == [end]
