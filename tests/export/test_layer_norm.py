"""LayerNormalization written out equals the operator, and says what must stay in float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, largest_error
from lowered import feeds, static_form

from samq.calib.parts import IMAGE_ENCODER
from samq.export.fold import fold_constants
from samq.export.layer_norm import write_out_layer_norms
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.placement import Placement
from samq.export.tensorrt_targets import TRT8, TRT10, TensorRtTarget

KEPT = {"mean", "deviation", "squares", "variance", "raised", "spread", "normalized"}


def norms(model: ir.Model) -> int:
    return sum(node.op_type == "LayerNormalization" for node in model.graph)


def test_the_encoder_answers_as_before() -> None:
    model = static_form("float", IMAGE_ENCODER)
    fold_constants(model)
    given = feeds(model)
    expected, count = as_written(model, given), norms(model)
    exact = write_out_layer_norms(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert count > 0
    assert norms(model) == 0
    assert len(exact) == count * len(KEPT)
    assert {str(node.name).rpartition("/")[2] for node in exact} == KEPT
    for found, wanted in zip(as_written(model, given), expected, strict=True):
        assert largest_error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("name", "target", "placement", "stays"),
    [
        ("int8_w8a8", TRT8, Placement(), False),
        ("int8_w8a8", TRT8, Placement(layers={"*": "fp16"}), True),
        ("float", TRT8, Placement(), True),
        ("int8_w8a8", TRT10, Placement(), True),
    ],
)
def test_where_layer_norms_are_written_out(
    name: str, target: TensorRtTarget, placement: Placement, stays: bool
) -> None:
    """Beside Q/DQ of a weakly typed version alone."""
    lowered = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), target, placement=placement)
    assert (norms(lowered.model) > 0) == stays
    assert any(node.endswith("/variance") for node in lowered.float32) == (not stays)


def test_without_gain_and_bias_of_its_own() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 5, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="g")
    gain = ir.Value(name="gain", shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.FLOAT))
    gain.const_value = ir.Tensor(np.full(8, 3, np.float32), name="gain")
    graph.register_initializer(gain)
    node = ir.node("LayerNormalization", [x, gain], {"axis": -1, "epsilon": 1e-3}, name="n")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=9)
    given = {"x": np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)}
    expected = as_written(model, given)
    write_out_layer_norms(model)
    assert largest_error(as_written(model, given)[0], expected[0]) < 1e-6
