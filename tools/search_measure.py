"""Measuring one configuration for a search: it is really quantized, and its simulation's masks are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Sam2Model

from samq.calib.parts import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    ENCODER_INPUTS,
    ENCODER_OUTPUTS,
    ImageEncoder,
    MaskDecoder,
)
from samq.engines.base import Arrays
from samq.engines.predictor import Predictor
from samq.tools.evaluate import Record, summarize


@dataclass
class TorchPart:
    """One part of a model as PyTorch simulates it: an engine, which all others are held against."""

    module: nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]
    shapes: Mapping[str, Sequence[int | str]]
    device: torch.device

    @torch.no_grad()
    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """As `samq.engines.base.Engine.run`."""
        answers = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[n])).to(self.device) for n in self.inputs))
        return {name: answer.cpu().numpy() for name, answer in zip(self.outputs, answers, strict=True)}


def predictor_of(model: Sam2Model) -> Predictor:
    """Both parts of a float or a simulated model, ready to be prompted."""
    device = next(model.parameters()).device
    prompts: dict[str, Sequence[int | str]] = {"point_coords": ("batch", "prompts", "points", 2)}
    return Predictor(
        TorchPart(ImageEncoder(model), ENCODER_INPUTS, ENCODER_OUTPUTS, {}, device),
        TorchPart(MaskDecoder(model), DECODER_INPUTS, DECODER_OUTPUTS, prompts, device),
    )


@dataclass(frozen=True)
class Accuracy:
    """How near a configuration's masks come to what they should be.

    Args:
        miou_relative: mIoU / the float model's mIoU; without annotations, the agreement.
        standard_error: of `miou_relative`, images being the independent observations; None of one image.
        agreement: mean IoU of its masks with the float model's.
    """

    miou_relative: float
    standard_error: float | None
    agreement: float


def accuracy_of(records: list[Record]) -> Accuracy:
    """The accuracy that one record a prompt tells; there is one at least."""
    summary = summarize(records)
    if summary["miou_relative"] is None:
        found, expected = np.array([record.agreement for record in records]), np.ones(len(records))
    else:
        annotated = [record for record in records if record.iou_baseline is not None]
        records = annotated
        found = np.array([record.iou_quantized for record in annotated])
        expected = np.array([record.iou_baseline for record in annotated])
    ratio = float(found.sum() / expected.sum())
    error = _error_of_ratio(found, expected, [record.image for record in records])
    return Accuracy(ratio, error, float(summary["agreement_iou"]))


def _error_of_ratio(found: NDArray[Any], expected: NDArray[Any], images: Sequence[str]) -> float | None:
    """Standard error of Σ found / Σ expected, linearized, with prompts of one image as one observation."""
    residuals = found - found.sum() / expected.sum() * expected
    _, index = np.unique(np.array(images), return_inverse=True)
    of_images = np.bincount(index, residuals)
    count = len(of_images)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.square(of_images).sum()) / expected.sum())
