"""A projection cut into its parts gives the same numbers, whatever its weight is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, largest_error
from test_linear import STATIC_S8, codes, filled, tokens
from torch import nn

from samq.export.graph import add_initializer
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.split_projections import split_projections
from samq.export.tensorrt_targets import TRT8, TRT10, TensorRtTarget
from samq.quant.layers import LayerCodes

WIDTHS = (16, 16, 32)
FP16_STEP = 2.0**-10  # ONNX Runtime on a CPU rounds intermediate FP16 values or not, as kernels go
FLOAT = ir.DataType.FLOAT
LAYERS = {
    "float": nn.Linear(128, 64),
    "float, no bias": nn.Linear(128, 64, bias=False),
    "INT8": codes(8, True, 0, STATIC_S8, sizes=(128, 64)),
    "two levels and a branch": codes(4, True, 16, STATIC_S8, sizes=(128, 64), rank=4),
    "INT4 and a branch": codes(4, True, 64, sizes=(128, 64), rank=4),
}


def with_split(layer: LayerCodes | nn.Linear, axis: int = -1, **observed: Any) -> ir.Model:
    """x → layer → Split, its three parts the outputs; `observed` asks for the projection as an output too."""
    model = filled(layer)
    graph, whole = model.graph, model.graph.outputs[0]
    sizes = add_initializer(graph, "sizes", np.array(WIDTHS if axis == -1 else (1, 2, 2)))
    split = ir.Node("", "Split", [whole, sizes], [ir.AttrInt64("axis", axis)], num_outputs=3, name="split")
    assert whole.shape is not None
    for index, (value, width) in enumerate(zip(split.outputs, WIDTHS, strict=True)):
        shape = ir.Shape([*whole.shape[:-1], width]) if axis == -1 else ir.Shape(["rows", None, 64])
        value.name, value.type, value.shape = f"part_{index}", ir.TensorType(FLOAT), shape
    graph.append(split)
    graph.outputs[:] = [*split.outputs, *([whole] if observed else [])]
    return model


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
@pytest.mark.parametrize("name", LAYERS)
def test_parts_are_equal(name: str, target: TensorRtTarget) -> None:
    whole = lower_for_tensorrt(with_split(LAYERS[name]), target).model
    parts = lower_for_tensorrt(with_split(LAYERS[name]), target, rewrites=("split_qkv",)).model
    onnx.checker.check_model(ir.to_proto(parts), full_check=True)
    assert "Split" not in [node.op_type for node in parts.graph]
    gemms = [node for node in parts.graph if node.name and node.name.startswith("a.layer/MatMul_")]
    assert [node.inputs[1].shape.dims for node in gemms if node.inputs[1] and node.inputs[1].shape] == [
        (128, width) for width in WIDTHS
    ]
    feeds = {"x": tokens(128)}
    for found, expected in zip(as_written(parts, feeds), as_written(whole, feeds), strict=True):
        assert largest_error(found, expected) < (FP16_STEP if target.strongly_typed else 1e-6)


def test_the_names_of_what_was_cut() -> None:
    assert split_projections(with_split(LAYERS["float"])) == ("a.layer/MatMul",)


@pytest.mark.parametrize("model", [with_split(LAYERS["float"], observed=True), with_split(LAYERS["float"], axis=1)])
def test_a_projection_that_others_read_or_that_is_cut_elsewhere_stays(model: ir.Model) -> None:
    before = [node.name for node in model.graph]
    assert split_projections(model) == ()
    assert [node.name for node in model.graph] == before
