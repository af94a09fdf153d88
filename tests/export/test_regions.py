"""Blocks cut out of an encoder compute what they compute in it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exported import as_written, canonical, float_model, skeleton
from small_model import pixels, recipe_of

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.parts import float_part
from samq.export.regions import TOKENS, cut_blocks, structure
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TRT8


def _encoder(name: str) -> ir.Model:
    if name == "float":
        return float_part(skeleton(IMAGE_ENCODER), float_model(), half=False)
    model = canonical(recipe_of("int4_svdquant"), IMAGE_ENCODER)
    return lower_for_tensorrt(model, TRT8, rewrites=REWRITES).model if name == "trt8" else model


@pytest.mark.parametrize("name", ["float", "canonical", "trt8"])
def test_blocks_one_after_another_are_the_backbone(name: str) -> None:
    model = _encoder(name)
    blocks = list(cut_blocks(model))
    assert len(blocks) == len(float_model().vision_encoder.backbone.blocks)
    whole = model.clone()
    last = next(v for node in whole.graph for v in node.outputs if v.name == f"{blocks[-1][0]}{TOKENS}")
    whole.graph.outputs.clear()
    whole.graph.outputs.append(last)
    feeds = {"pixel_values": pixels(1).numpy()}
    (expected,) = as_written(whole, feeds)
    for block, graph in blocks:
        (tokens,) = as_written(graph, feeds)
        feeds = {f"{block}{TOKENS}": tokens}
    np.testing.assert_array_equal(tokens, expected)


def test_blocks_of_one_structure_are_known() -> None:
    blocks = dict(cut_blocks(_encoder("float")))
    assert {name: structure(graph) for name, graph in blocks.items()} == {
        name: structure(graph) for name, graph in cut_blocks(_encoder("float"))
    }
    assert len({structure(graph) for graph in blocks.values()}) == len(blocks)  # the small model has no two alike


def test_structure_is_all_but_weights_and_names() -> None:
    """Wiring and whole numbers count, for they decide what is computed."""

    def graph(weight: float = 1.0, name: str = "w", *, axis: int = 0, swapped: bool = False) -> ir.Model:
        x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
        constants = {name: np.array(weight, np.float32), "axes": np.array([axis], np.int64)}
        values = [
            ir.Value(name=key, const_value=ir.Tensor(array), shape=ir.Shape(array.shape),
                     type=ir.TensorType(ir.DataType.FLOAT if key == name else ir.DataType.INT64))
            for key, array in constants.items()
        ]  # fmt: skip
        total = ir.node("ReduceSum", [x, values[1]], name="sum")
        operands = [total.outputs[0], x]
        last = ir.node("Sub", operands[::-1] if swapped else operands, name="sub")
        scaled = ir.node("Mul", [last.outputs[0], values[0]], name="mul")
        made = ir.Graph([x], scaled.outputs, nodes=[total, last, scaled], initializers=values, opset_imports={"": 17})
        return ir.Model(made, ir_version=8)

    assert structure(graph()) == structure(graph(2.0, "v"))
    digests = {structure(graph()), structure(graph(axis=1)), structure(graph(swapped=True))}
    assert len(digests) == 3


def test_a_part_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no value is called"):
        next(cut_blocks(float_part(skeleton(MASK_DECODER), float_model(), half=False)))
