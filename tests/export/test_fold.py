"""What depends on constants alone is computed once; Q/DQ and what reads inputs stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from exported import as_written, canonical, float_model, skeleton
from lowered import distance, feeds
from small_model import recipe_of

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.export.canonical import read_gemms
from samq.export.fold import fold_constants
from samq.export.parts import float_part


def test_both_parts_compute_the_same_with_fewer_nodes() -> None:
    for part in PARTS:
        model = float_part(skeleton(part), float_model(), half=True)
        inputs = feeds(model)
        expected, nodes = as_written(model, inputs), len(model.graph)
        found = as_written(fold_constants(model), inputs)
        assert len(model.graph) < nodes
        assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < 1e-6
        for node in model.graph:
            constant = [value is None or value.const_value is not None for value in node.inputs]
            assert not all(constant) or not constant, node.name


def test_the_position_embedding_is_a_constant() -> None:
    graph = fold_constants(float_part(skeleton(IMAGE_ENCODER), float_model(), half=False)).graph
    assert "cubic" not in [node.attributes["mode"].as_string() for node in graph if node.op_type == "Resize"]


def test_quantized_weights_stay_quantized() -> None:
    model = canonical(recipe_of("int4_w4a8_rtn"), MASK_DECODER)
    before = {gemm.layer: gemm.weight for gemm in read_gemms(model)}
    after = {gemm.layer: gemm.weight for gemm in read_gemms(fold_constants(model))}
    assert before.keys() == after.keys()
    for layer, weight in after.items():
        assert weight.codes.dtype.name == "int4"
        np.testing.assert_array_equal(weight.integers(), before[layer].integers())


def test_a_graph_output_keeps_its_node() -> None:
    one = ir.node("Constant", [], {"value": ir.tensor(np.float32([1, 2]), name="one")})
    two = ir.node("Neg", [one.outputs[0]], name="negative")
    two.outputs[0].name, two.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    two.outputs[0].shape = ir.Shape([2])
    graph = ir.Graph([], [two.outputs[0]], nodes=[one, two], opset_imports={"": 21}, name="constant")
    model = fold_constants(ir.Model(graph, ir_version=10))
    assert [node.name for node in model.graph] == ["negative"]
    np.testing.assert_array_equal(as_written(model, {})[0], [-1, -2])
