"""Traced graphs without weights: small files, so that they can be made where no GPU is and carried to one.

The parameters of the model are inputs of a shell; `fill` makes constants of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
from transformers import Sam2Model

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.trace import OPSET, StaticShape, trace
from samq.files import written_whole
from samq.tools.bench_gpu.code import digest_of
from samq.tools.bench_gpu.naive import ATTENTION_OPSET, export_naive

PROMPTS = 8  # of an image at once, with which masks are compared
OURS, NAIVE, ATTENTION = "ours", "naive", "attention"
DECODERS = {1: "decoder-click", 2: "decoder-box"}  # by points a prompt
NAIVE_CODE = ("samq.tools.bench_gpu.naive",)
TRACE_CODE = ("samq.export.trace",)
NOT_TRACED = ("samq.quant",)  # shells are traced from float models


def shell_of(model: Sam2Model, name: str, form: str, batch: int, folder: Path) -> ir.Model:
    """A shell, traced at the first call and kept in `folder`.

    Args:
        model: on the CPU.
        name: of the model.
        form: an encoder (`OURS`, `NAIVE`, `ATTENTION`) or one of `DECODERS`.
    """
    naive = form in (NAIVE, ATTENTION)
    code = digest_of(NAIVE_CODE) if naive else digest_of(TRACE_CODE, NOT_TRACED)
    path = folder / f"{name}-b{batch}-{form}-{code}.onnx"
    if not path.is_file():
        emptied = _emptied(_TRACES[form](model, batch), model)
        if naive:
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


_TRACES: dict[str, Callable[[Sam2Model, int], ir.Model]] = {
    OURS: _ours,
    NAIVE: partial(export_naive, opset=OPSET),
    ATTENTION: partial(export_naive, opset=ATTENTION_OPSET),
    **{form: partial(_decoder, points=points) for points, form in DECODERS.items()},
}
