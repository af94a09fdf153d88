"""Walking calibration images through the encoder block by block, for quantizing each behind its quantized forerunners.

The tokens that enter a block are kept for all images. They run through it twice: to gather statistics of its layers,
and, once these are quantized, to become what enters the next one. So all blocks together cost two runs of the encoder,
and the Hessians of one block at a time are in memory. Of SAM2.1-large, the tokens of an image take 38 MB at most; what
`samq.calib.spool` does not keep in memory goes to files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import calibrate, require_finite
from samq.calib.parts import BACKBONE
from samq.calib.spool import Spool, memory_budget
from samq.calib.statistics import InputStatistics, Recorder


class BlockWalk:
    """The walk of one model; its layers may be replaced between two steps.

    Args:
        model: a `Sam2Model` in eval mode.
        pixels: pixel values [B, 3, S, S].
        with_hessian: also gather Σ x xᵀ.
        with_histogram: also count the values.
    """

    def __init__(self, model: Sam2Model, pixels: Spool, with_hessian: bool, with_histogram: bool = False) -> None:
        self.model, self.pixels = model, pixels
        self.with_hessian, self.with_histogram = with_hessian, with_histogram
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def steps(self, layers: Collection[str]) -> Iterator[dict[str, InputStatistics]]:
        """Statistics of the layers, in the order in which the model runs: a block's at a time, the decoder's at last.

        The caller quantizes the layers of each step before it asks for the next one.

        Args:
            layers: names of linear layers in the encoder's blocks and in the decoder.

        Raises:
            BadInput: an activation became infinite or NaN.
            MachineLacks: the tokens fit neither in memory nor on the disk.
        """
        blocks = self.model.get_submodule(f"{BACKBONE}.blocks")
        assert isinstance(blocks, nn.ModuleList)
        inside = [[name for name in layers if name.startswith(f"{BACKBONE}.blocks.{i}.")] for i in range(len(blocks))]
        last = max((index for index, names in enumerate(inside) if names), default=-1)
        with Spool(memory_budget(self.device)) as tokens:
            for batch in self.pixels:
                tokens.append(self._first_tokens(batch.to(self.device)))
            for block, names in zip(blocks[: last + 1], inside, strict=False):
                if names:
                    yield self._observed(block, names, tokens)
                for index, batch in enumerate(tokens):
                    tokens[index] = block(batch.to(self.device))
        others = [name for name in layers if not any(name in names for names in inside)]
        if others:
            yield calibrate(
                self.model,
                self._modules(others),
                self.pixels,
                self.with_hessian,
                with_decoder=True,
                with_histogram=self.with_histogram,
            )

    def _first_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, h, w, C] of the patches with their positions, as `Sam2HieraDetModel.forward` makes them."""
        backbone = self.model.vision_encoder.backbone
        patches = backbone.patch_embed(pixel_values)
        tokens: Tensor = patches + backbone._get_pos_embed(patches.shape[1:3])
        return tokens

    def _observed(self, block: nn.Module, names: list[str], tokens: Spool) -> dict[str, InputStatistics]:
        with Recorder(self._modules(names), self.with_hessian, self.with_histogram).recording() as statistics:
            for batch in tokens:
                block(batch.to(self.device))
        require_finite(statistics)
        return statistics

    def _modules(self, names: list[str]) -> dict[str, nn.Linear]:
        modules = {}
        for name in names:
            module = self.model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            modules[name] = module
        return modules
