"""Windows that attend together answer as they do one by one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, largest_error
from lowered import feeds, noted_and_inferred, static_form

from samq.calib.parts import IMAGE_ENCODER
from samq.export.attention import Attention
from samq.export.graph import constant_of
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.merge_windows import FORBIDDEN, TILE, merge_windows
from samq.export.tensorrt_targets import TRT8

FLIPS = 2e-3  # an INT8 code flips when its input moves by the last bit of float32


def lowered(name: str) -> ir.Model:
    return lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT8, rewrites=("split_qkv", "pair_max")).model


def attentions(model: ir.Model) -> list[Attention]:
    found = [Attention.of(node) for node in model.graph if node.op_type == "Softmax"]
    return [attention for attention in found if attention is not None]


@pytest.mark.parametrize("name", ["float", "int8_w8a8"])
def test_the_answers_are_equal(name: str) -> None:
    plain, merged = lowered(name), lowered(name)
    assert merge_windows(merged) > 0
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    given = feeds(plain)
    for found, expected in zip(as_written(merged, given), as_written(plain, given), strict=True):
        assert largest_error(found, expected) < (1e-6 if name == "float" else FLIPS)


def test_tiles_are_filled_and_windows_kept_apart() -> None:
    model = lowered("float")
    before = [(a.batch, a.queries, a.keys) for a in attentions(model)]
    assert any(batch > 1 and keys <= TILE // 2 for batch, _, keys in before), "there are small windows"
    merge_windows(model)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    for (batch, queries, keys), softmax in zip(before, softmaxes, strict=True):
        windows = int(np.gcd(batch, TILE // keys)) if keys <= TILE else 1
        value = softmax.inputs[0]
        assert value is not None
        assert tuple(value.shape or ())[0::2] == (batch // windows, queries * windows)
        assert tuple(value.shape or ())[3] == keys * windows <= max(TILE, keys)
    masks = [constant_of(v) for v in model.graph.initializers.values() if "between_windows" in str(v.name)]
    assert masks
    for mask in masks:
        assert mask is not None
        assert set(np.unique(mask)) == {0.0, FORBIDDEN}
        assert len(set((mask == 0).sum(1))) == 1, "every token attends to as many"


def test_shapes_are_those_of_shape_inference() -> None:
    model = lowered("float")
    merge_windows(model)
    noted, inferred = noted_and_inferred(model)
    assert noted == inferred
