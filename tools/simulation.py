"""A float or a simulated model in PyTorch as an engine, which all others are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Sam2Model

from samq.calib.float32 import without_tf32
from samq.calib.parts import DECODER_INPUTS, DECODER_OUTPUTS, ENCODER_INPUTS, ENCODER_OUTPUTS, ImageEncoder, MaskDecoder
from samq.engines.base import Arrays
from samq.engines.predictor import Predictor


class TorchPart:
    """A part of a model in PyTorch, where its parameters are, as an engine (`samq.engines.base.Engine`)."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._module, self.inputs, self.outputs = module.eval(), inputs, outputs
        self._device = next(module.parameters()).device
        self.shapes: Mapping[str, Sequence[int | str]] = {"point_coords": ("batch", "prompts", "points", 2)}

    @torch.no_grad()
    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """As `samq.engines.base.Engine.run`, without TF32."""
        given = (torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self._device) for name in self.inputs)
        with without_tf32():
            answers = self._module(*given)
        return {name: answer.cpu().numpy() for name, answer in zip(self.outputs, answers, strict=True)}


def torch_predictor(model: Sam2Model) -> Predictor:
    """Both parts of a float or a simulated model, ready to be prompted."""
    return Predictor(
        TorchPart(ImageEncoder(model), ENCODER_INPUTS, ENCODER_OUTPUTS),
        TorchPart(MaskDecoder(model), DECODER_INPUTS, DECODER_OUTPUTS),
    )
