"""Traced graphs without weights: small files, so that they can be made where no GPU is and carried to one.

The parameters of the model are inputs of a shell; `fill` makes constants of them again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from transformers import Sam2Model

from samq.calib.parts import ENCODER_INPUTS, ENCODER_OUTPUTS, IMAGE_ENCODER, MASK_DECODER, ImageEncoder
from samq.export.trace import OPSET, StaticShape, trace
from samq.files import written_whole
from samq.tools.bench_gpu.record import digest_of
from samq.tools.bench_gpu.subject import image_size

PROMPTS = 8  # of an image at once, with which masks are compared
OURS, NAIVE = "ours", "naive"
DECODERS = {1: "decoder-click", 2: "decoder-box"}  # by points a prompt
CODE = ("calib", "export")


def shell_of(model: Sam2Model, name: str, form: str, batch: int, folder: Path) -> ir.Model:
    """A shell, traced at the first call and kept in `folder`.

    Args:
        model: on the CPU.
        name: of the model.
        form: an encoder (`OURS`, `NAIVE`) or one of `DECODERS`.
    """
    path = folder / f"{name}-b{batch}-{form}-{digest_of(CODE)}.onnx"
    if not path.is_file():
        emptied = _emptied(_TRACES[form](model, batch), model)
        if form == NAIVE:
            onnxscript.optimizer.optimize(emptied)  # what the exporter does, but that it leaves parameters alone
        with written_whole(path) as temporary:
            ir.save(emptied, temporary)
    return ir.load(path)


def fill(shell: ir.Model, model: Sam2Model) -> ir.Model:
    """Make constants of the parameters, in place."""
    state = model.state_dict()
    for value in [value for value in shell.graph.inputs if value.name in state]:
        shell.graph.inputs.remove(value)
        value.const_value = ir.Tensor(state[str(value.name)].detach().cpu().numpy(), name=value.name)
        shell.graph.register_initializer(value)
    return shell


def _emptied(traced: ir.Model, model: Sam2Model) -> ir.Model:
    """Make inputs of the parameters, in place."""
    names = set(model.state_dict())
    for key, value in list(traced.graph.initializers.items()):
        name = key.removeprefix("model.")
        if name in names:
            del traced.graph.initializers[key]
            value.name, value.const_value = name, None
            traced.graph.inputs.append(value)
    return traced


def _ours(model: Sam2Model, batch: int) -> ir.Model:
    return trace(model, IMAGE_ENCODER, StaticShape(batch=batch))


def _decoder(model: Sam2Model, batch: int, points: int) -> ir.Model:
    return trace(model, MASK_DECODER, StaticShape(batch=batch, prompts=PROMPTS, points=points))


def _naive(model: Sam2Model, batch: int) -> ir.Model:
    """The encoder as it stands in transformers."""
    size = image_size(model)
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
                opset_version=OPSET,
                input_names=list(ENCODER_INPUTS),
                output_names=list(ENCODER_OUTPUTS),
                optimize=False,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


_TRACES: dict[str, Callable[[Sam2Model, int], ir.Model]] = {
    OURS: _ours,
    NAIVE: _naive,
    **{form: partial(_decoder, points=points) for points, form in DECODERS.items()},
}
