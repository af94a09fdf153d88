"""The encoder as engines like it answers as transformers' modules do."""

from __future__ import annotations

import pytest
import torch
from small_model import pixels, small_sam2
from torch import nn

from samq.calib.parts import IMAGE_ENCODER, ImageEncoder
from samq.export.encoder import EngineEncoder
from samq.export.hiera import EngineHiera
from samq.export.trace import StaticShape, trace


@pytest.mark.parametrize("top_down", [[2, 3], [3], [0, 1, 2, 3], []], ids=str)
def test_every_output_is_that_of_transformers(top_down: list[int]) -> None:
    model = small_sam2()
    model.vision_encoder.neck.fpn_top_down_levels = top_down
    with torch.no_grad():
        expected = ImageEncoder(model)(pixels(2))
        model.vision_encoder.backbone = EngineHiera(model.vision_encoder.backbone)
        found = EngineEncoder(model)(pixels(2))
    for answer, exact in zip(found, expected, strict=True):
        assert answer.shape == exact.shape
        torch.testing.assert_close(answer, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_a_level_that_adds_the_coarser_one_is_another() -> None:
    """Which levels add is no matter of chance: the cases above differ."""
    model = small_sam2()
    with torch.no_grad():
        before = ImageEncoder(model)(pixels(1))[0]
        model.vision_encoder.neck.fpn_top_down_levels = []
        assert not torch.allclose(ImageEncoder(model)(pixels(1))[0], before, rtol=1e-3)


def test_other_kernels_are_left_to_transformers() -> None:
    model = small_sam2()
    assert EngineEncoder.takes(model)
    first = model.vision_encoder.neck.convs[0]
    model.vision_encoder.neck.convs[0] = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1)
    assert not EngineEncoder.takes(model)
    graph = trace(model, IMAGE_ENCODER, StaticShape()).graph
    assert [node.op_type for node in graph].count("Conv") == 1 + len(model.vision_encoder.neck.convs) + 2


def test_the_only_convolution_left_embeds_the_patches() -> None:
    graph = trace(small_sam2(), IMAGE_ENCODER, StaticShape()).graph
    assert [node.op_type for node in graph].count("Conv") == 1
    enlarging = [
        node for node in graph if node.op_type == "Resize" and node.attributes["mode"].as_string() == "nearest"
    ]
    assert not enlarging, "the coarser level is added in cells; the position embedding is cubic"
