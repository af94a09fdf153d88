"""The backbone as engines like it is transformers' backbone."""

from __future__ import annotations

import pytest
import torch
from small_model import pixels, small_sam2
from torch import Tensor

from samq.calib.parts import IMAGE_ENCODER
from samq.export.hiera import EngineHiera, Layout, join, moved, pool, split
from samq.export.trace import trace

LAYOUTS = [Layout(6, 8), Layout(6, 8, 2), Layout(8, 8, 4), Layout(5, 7, 3), Layout(6, 8, 5)]


def _tokens(layout: Layout, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, layout.height * layout.width, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_joining_undoes_splitting(layout: Layout) -> None:
    tokens = _tokens(layout)
    assert torch.equal(join(split(tokens, layout), layout), tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_filling_is_zero_and_marked(layout: Layout) -> None:
    inside = layout.inside()
    assert inside.sum() == layout.height * layout.width
    ones = split(torch.ones_like(_tokens(layout)), layout)
    assert torch.equal(ones, inside.expand_as(ones[0]).expand_as(ones))
    assert layout.is_padded == bool((inside == 0).any())


def test_windows_stand_one_after_another_by_rows() -> None:
    numbers = torch.arange(16.0).reshape(1, 16, 1)
    windows = split(numbers, Layout(4, 4, 2)).reshape(4, 4).tolist()
    assert windows == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_moving_between_windows_goes_by_rows() -> None:
    tokens, old, new = _tokens(Layout(6, 8)), Layout(6, 8, 2), Layout(6, 8, 4)
    assert torch.equal(moved(split(tokens, old), old, new), split(tokens, new))


@pytest.mark.parametrize("window", [0, 2, 4])
def test_pooling_in_windows_is_pooling_the_grid(window: int) -> None:
    layout = Layout(4, 8, window)
    tokens = _tokens(layout)
    grid = tokens.reshape(2, 4, 8, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.max_pool2d(grid, 2).permute(0, 2, 3, 1).reshape(2, 8, 3)
    pooled = pool(split(tokens, layout), layout, (2, 2))
    assert torch.equal(join(pooled, layout.pooled((2, 2))), expected)


@pytest.mark.parametrize("carry_padding", [False, True])
def test_every_stage_is_that_of_transformers(carry_padding: bool) -> None:
    backbone = small_sam2().vision_encoder.backbone
    windows = [block.window_size for block in backbone.blocks]
    assert any(Layout(8, 8, window).is_padded for window in windows)
    with torch.no_grad():
        expected = backbone(pixels(2)).intermediate_hidden_states
        found = EngineHiera(backbone, carry_padding=carry_padding)(pixels(2)).intermediate_hidden_states
    assert found is not None
    for tokens, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_tokens_stay_in_windows_between_blocks() -> None:
    """Joining and splitting moves whole feature maps: 6-D transposes are counted, for they cost what they move."""
    graph = trace(small_sam2(), IMAGE_ENCODER).graph
    moves = [n for n in graph if n.op_type == "Transpose" and len(n.attributes["perm"].as_ints()) == 6]
    blocks = small_sam2().vision_encoder.backbone.blocks
    windowed = sum(block.window_size > 0 for block in blocks)
    assert 0 < len(moves) < 2 * windowed
