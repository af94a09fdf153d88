"""Attention between few tokens and an image: the same answers, and no projection of the image is left."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exported import as_written, float_model, largest_error, skeleton
from test_fuse_attention import feeds_of, fused

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.few_tokens import absorb_projections
from samq.export.fuse_attention import Rewrite, fuse_attention
from samq.export.parts import float_part
from samq.export.trace import StaticShape, trace

IMAGE = 64  # tokens of the small model's image


def decoder(static: StaticShape | None = None) -> ir.Model:
    """The small mask decoder, its attention fused."""
    traced = skeleton(MASK_DECODER) if static is None else trace(float_model(), MASK_DECODER, static)
    model = float_part(traced, float_model(), half=False)
    fuse_attention(model)
    return model


def absorbed(model: ir.Model) -> Rewrite:
    return absorb_projections(model, many=IMAGE)


@pytest.mark.parametrize("static", [None, StaticShape()], ids=["dynamic", "static"])
def test_the_decoder_projects_no_image(static: StaticShape | None) -> None:
    model = decoder(static)
    done, operators = fused(model, absorbed)
    assert done.count == 5  # two layers look both ways, and the tokens once more
    assert operators["MultiHeadAttention"] == 2  # of the tokens among themselves


def test_each_projection_is_still_told() -> None:
    """The GEMM with a layer's weight keeps the layer's name, by which engines tell what they execute."""
    model = decoder()
    before = {node.name for node in model.graph if str(node.name).endswith("/MatMul")}
    absorbed(model)
    assert before == {node.name for node in model.graph if str(node.name).endswith("/MatMul")}


@pytest.mark.parametrize("points", [1, 40])
def test_any_number_of_points_is_answered_the_same(points: int) -> None:
    model = decoder()
    feeds = feeds_of(model)
    generator = np.random.default_rng(1)
    feeds["point_coords"] = generator.uniform(0, 128, (2, 3, points, 2)).astype(np.float32)
    feeds["point_labels"] = generator.integers(0, 2, (2, 3, points))
    before = as_written(model, feeds)
    absorbed(model)
    for found, expected in zip(as_written(model, feeds), before, strict=True):
        assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("part", [IMAGE_ENCODER, MASK_DECODER])
def test_attention_among_equals_stays(part: str) -> None:
    """Nothing is an image where that takes more tokens than there are."""
    model = float_part(skeleton(part), float_model(), half=False)
    fuse_attention(model)
    done, _ = fused(model, absorb_projections)
    assert done.count == 0
