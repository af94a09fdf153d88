"""Wider heads give the same numbers, whatever the layers around them are made of."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, largest_error
from lowered import feeds, noted_and_inferred, static_form

from samq.calib.parts import IMAGE_ENCODER
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.pad_heads import pad_heads
from samq.export.tensorrt_targets import TRT8

FLIPS = 2e-3  # an INT8 code flips when its input moves by the last bit of float32


def lowered(name: str, width: int | None = None) -> ir.Model:
    model = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT8, rewrites=("split_qkv",)).model
    if width is not None:
        pad_heads(model, lambda own, keys: max(own, width))
    return model


@pytest.mark.parametrize("name", ["float", "int8_w8a8", "int4_svdquant"])
def test_wider_heads_are_equal(name: str) -> None:
    plain, wide = lowered(name), lowered(name, 64)
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    widths = {node.outputs[0].shape[-1] for node in wide.graph if node.op_type == "MatMul" and _reads_softmax(node)}
    assert 64 in widths
    given = feeds(plain)
    for found, expected in zip(as_written(wide, given), as_written(plain, given), strict=True):
        assert largest_error(found, expected) < (1e-5 if name == "float" else FLIPS)


def _reads_softmax(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.producer() is not None and source.producer().op_type == "Softmax"


@pytest.mark.parametrize("name", ["float", "int8_w8a8"])
def test_shapes_are_those_of_shape_inference(name: str) -> None:
    noted, inferred = noted_and_inferred(lowered(name, 64))
    assert noted == inferred


def test_which_heads_were_widened() -> None:
    model = lowered("float")
    attentions = [node.name for node in model.graph if node.op_type == "Softmax"]
    seen: list[tuple[int, int]] = []

    def rule(width: int, keys: int) -> int:
        seen.append((width, keys))
        return 64 if keys == 64 else width

    widened = pad_heads(model, rule)
    assert set(widened) < set(attentions)
    assert (48, 64) in seen, "the global block: 8 × 8 tokens"
    assert len(seen) < len(attentions), "pooled queries are left alone"


def test_as_wide_as_they_are_changes_nothing() -> None:
    model = lowered("float")
    before = [node.name for node in model.graph]
    assert pad_heads(model, lambda width, keys: width) == ()
    assert [node.name for node in model.graph] == before


def test_codes_are_filled_up_with_zeros_and_scales_stay_positive() -> None:
    """TensorRT refuses a scale of 0 (seen on 8.6.0)."""
    model = lowered("int8_w8a8", 64)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1] is not None:
            scale = node.inputs[1].const_value
            assert scale is not None
            assert np.all(scale.numpy() > 0)
