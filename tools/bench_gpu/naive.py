"""The image encoder as transformers writes it and PyTorch exports it: what every peer starts from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import onnx_ir as ir
import torch
from transformers import Sam2Model

from samq.calib.parts import ENCODER_INPUTS, ENCODER_OUTPUTS, ImageEncoder

ATTENTION_OPSET = 23  # the first in which attention is one operator


def export_naive(model: Sam2Model, batch: int, opset: int) -> ir.Model:
    """Export the encoder with static shapes, without the exporter's own optimization.

    Args:
        model: on the CPU.
        batch: images at once.
        opset: of the graph; from `ATTENTION_OPSET` on the exporter writes attention as one operator.
    """
    config: Any = model.config
    size = config.prompt_encoder_config.image_size
    pixels = torch.zeros(batch, 3, size, size)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                ImageEncoder(model).eval(),
                (pixels,),
                dynamo=True,
                opset_version=opset,
                input_names=list(ENCODER_INPUTS),
                output_names=list(ENCODER_OUTPUTS),
                optimize=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model
