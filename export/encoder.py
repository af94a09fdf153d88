"""The image encoder written for engines: the function of `samq.calib.parts.ImageEncoder`.

The feature pyramid of transformers works on maps [B, C, H, W]: the tokens are turned into maps, each map is convolved
with 1×1 kernels, once by the pyramid and, where it is fine, once more by the mask decoder. Exact:

    conv1×1(map(x)) = map(W x)                  so tokens are projected before they are moved, and fewer numbers are
    W₂ (W₁ x + b₁) + b₂ = (W₂ W₁) x + (W₂ b₁ + b₂)      so the two convolutions of a fine map become one product
    nearest(x) + y = x + y in cells of 2×2      so nothing is enlarged by itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samq.export.hiera import EngineHiera, Layout, on_grid

if TYPE_CHECKING:
    from transformers import Sam2Model

Stages = Sequence[tuple[Tensor, Layout]]


class EngineEncoder(nn.Module):
    """`ImageEncoder` of a model whose backbone is an `EngineHiera`.

    Args:
        model: its pyramid has 1×1 kernels, see `takes`.
    """

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def takes(model: Sam2Model) -> bool:
        """The convolutions of the pyramid, and those behind its fine maps, are products of single tokens."""
        decoder = model.mask_decoder
        convolutions = (*model.vision_encoder.neck.convs, decoder.conv_s0, decoder.conv_s1)
        return all(c.kernel_size == c.stride == (1, 1) and c.padding == (0, 0) for c in convolutions)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backbone, decoder = self.model.vision_encoder.backbone, self.model.mask_decoder
        assert isinstance(backbone, EngineHiera)
        stages = backbone.stages(pixel_values)
        coarse = self._level(stages, 2) + self.model.no_memory_embedding.reshape(-1)
        fine, middle = self._level(stages, 0, decoder.conv_s0), self._level(stages, 1, decoder.conv_s1)
        return _as_map(coarse), _as_map(fine), _as_map(middle)

    def _level(self, stages: Stages, level: int, behind: nn.Conv2d | None = None) -> Tensor:
        """A level of the pyramid and the 1×1 convolution behind it: [B, H, W, C].

        `Sam2VisionNeck.forward`: the convolutions stand from the coarsest level to the finest, and a level of
        `fpn_top_down_levels` adds the next coarser one, enlarged.
        """
        neck, coarsest = self.model.vision_encoder.neck, len(stages) - 1
        tokens, layout = stages[level]
        weight, bias = _as_linear(neck.convs[coarsest - level])
        adds_coarser = level != coarsest and level in neck.fpn_top_down_levels
        if behind is not None and not adds_coarser:
            weight, bias = _composed(weight, bias, behind)
        grid = on_grid(F.linear(tokens, weight, bias), layout)
        if not adds_coarser:
            return grid
        below = self._level(stages, level + 1)
        _, height, width, channels = below.shape
        cells = grid.reshape(-1, height, 2, width, 2, channels) + below.reshape(-1, height, 1, width, 1, channels)
        grid = cells.reshape(-1, 2 * height, 2 * width, channels)
        return grid if behind is None else F.linear(grid, *_as_linear(behind))


def _as_map(grid: Tensor) -> Tensor:
    """[B, H, W, C] → [B, C, H, W]."""
    return grid.permute(0, 3, 1, 2)


def _as_linear(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """A 1×1 convolution's weight [C', C] and bias [C']."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    return convolution.weight.flatten(1), convolution.bias


def _composed(weight: Tensor, bias: Tensor, behind: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1×1 convolution behind a product."""
    outer, outer_bias = _as_linear(behind)
    return outer @ weight, torch.mv(outer, bias) + outer_bias
