"""Windows that run a few at a time: the same numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, canonical, float_model, skeleton
from small_model import recipe_of
from test_fuse_attention import feeds_of, graph

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.engines.onnxruntime import executed_layers
from samq.export.fuse_attention import fuse_attention
from samq.export.in_cache import keep_in_cache
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import float_part, save_part
from samq.export.trace import StaticShape, trace

SMALL_CACHE = 1 << 14  # bytes; the first hidden layer of the small encoder takes 512 KiB


def scans(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Scan"]


def same_bits(model: ir.Model, cache: int = SMALL_CACHE) -> int:
    """Put it into Scans, check that nothing changes, and count the operators that went there."""
    feeds = feeds_of(model)
    before = as_written(model, feeds)
    done = keep_in_cache(model, cache)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for found, expected in zip(as_written(model, feeds), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    return done.count


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_w4only_rtn", "int4_svdquant"])
def test_a_lowered_encoder_gives_the_same_bits(preset: str) -> None:
    model = lower_for_onnxruntime(canonical(recipe_of(preset), IMAGE_ENCODER))
    assert not scans(model)  # everything is small here
    assert same_bits(model) > 30
    assert scans(model)
    assert not any(node.op_type == "MultiHeadAttention" for node in list(model.graph)[:20])  # they run within


def test_scales_of_tokens_are_found_within() -> None:
    ipts = {"mode": "dynamic", "granularity": "per_token"}
    model = lower_for_onnxruntime(canonical(recipe_of("int8_w8a8", ipts=ipts), IMAGE_ENCODER))
    assert same_bits(model) > 60
    within = [node for scan in scans(model) for node in scan.attributes["body"].as_graph()]
    operators = {node.op_type for node in within}
    assert {"ReduceMax", "ReduceMin", "QuantizeLinear", "MatMulIntegerToFloat", "MultiHeadAttention"} <= operators


@pytest.mark.parametrize("static", [None, StaticShape()], ids=["any number of images", "one image"])
def test_a_float_encoder_gives_the_same_bits(static: StaticShape | None) -> None:
    traced = skeleton(IMAGE_ENCODER) if static is None else trace(float_model(), IMAGE_ENCODER, static)
    model = float_part(traced, float_model(), half=False)
    fuse_attention(model)
    assert same_bits(model) > 30


def test_layers_within_are_told(tmp_path: Path) -> None:
    model = lower_for_onnxruntime(canonical(recipe_of("int4_w4a8"), IMAGE_ENCODER))
    save_part(model, tmp_path / "before.onnx")
    assert keep_in_cache(model, SMALL_CACHE).count
    save_part(model, tmp_path / "after.onnx")
    assert executed_layers(tmp_path / "after.onnx") == executed_layers(tmp_path / "before.onnx")


def test_what_fits_the_cache_stays() -> None:
    model = lower_for_onnxruntime(canonical(recipe_of("int4_w4a8"), IMAGE_ENCODER))
    assert same_bits(model, 1 << 20) == 0


def test_a_decoder_stays() -> None:
    assert same_bits(float_part(skeleton(MASK_DECODER), float_model(), half=False)) == 0


NORM = """
    gain = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
    normed = LayerNormalization <axis = -1> (x, gain)
    wide = Gelu (normed)
    hidden = Add (wide, wide)
"""
INPUT = "float[b, 1024, 4] x"

# What stands behind three operators that each take 16 KiB an image, the result's sides, and how many run within.
ENDS = {
    "tokens alone": ("y = Tanh (hidden)", "b, 1024, 4", 3),
    "a move of tokens": ("moved = Transpose <perm = [1, 0, 2]> (hidden) y = Tanh (moved)", "1024, b, 4", 3),
    "a softmax over tokens": ("weights = Softmax <axis = 1> (hidden) y = Tanh (weights)", "b, 1024, 4", 3),
    "a maximum over tokens": (
        "axes = Constant <value_ints = [1]> () most = ReduceMax <keepdims = 0> (hidden, axes) y = Tanh (most)",
        "b, 4", 3,
    ),
    "a constant for each token": (
        "more = ConstantOfShape (sides) placed = Add (hidden, more) y = Tanh (placed)", "b, 1024, 4", 3,
    ),
    "a maximum within windows": (
        "axes = Constant <value_ints = [1]> () s = Constant <value_ints = [-1, 4, 4]> () w = Reshape (hidden, s)"
        " most = ReduceMax <keepdims = 0> (w, axes) y = Tanh (most)", "m, 4", 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_what_sees_other_tokens_ends_the_scan(case: str) -> None:
    body, sides, count = ENDS[case]
    model = graph(f"sides = Constant <value_ints = [1, 1024, 1]> () {NORM} {body}", INPUT, f"float[{sides}] y")
    assert same_bits(model, 1 << 10) == count


def test_a_result_for_the_caller_is_not_grouped() -> None:
    outputs = "float[b, 1024, 4] y, float[b, 1024, 4] normed"
    assert same_bits(graph(f"{NORM} y = Tanh (hidden)", INPUT, outputs), 1 << 10) == 0
