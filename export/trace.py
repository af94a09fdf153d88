"""One trace of a part: an ONNX skeleton in which each linear layer is a single `samq.Linear` node without weights.

The skeleton is traced once; `samq.export.linear` then fills the same nodes with float or quantized weights. The tokens
behind each block of the backbone pass through a `samq.Boundary`. Backbone and prompt encoder are traced in forms of
our own, and shapes are settled as far as they are known. Constant folding is kept small, so that tables that are cheap
to compute (the bicubic position embedding) stay computed instead of stored.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from samq.calib.parts import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    ENCODER_INPUTS,
    ENCODER_OUTPUTS,
    IMAGE_ENCODER,
    ImageEncoder,
    MaskDecoder,
)
from samq.export.encoder import EngineEncoder
from samq.export.hiera import EngineHiera
from samq.export.prompts import for_engines
from samq.export.settle_shapes import settle_shapes
from samq.quant.layers import QuantizedLinear, replace_module

if TYPE_CHECKING:
    from transformers import Sam2Model

OPSET = 21  # the first with INT4, UINT4 and blocked DequantizeLinear
SITE_DOMAIN = "samq"
SITE_OP = "Linear"
BOUNDARY_OP = "Boundary"
LARGEST_FOLDED_CONSTANT = 4096  # elements


@dataclass(frozen=True)
class StaticShape:
    """Fixed sizes for an engine that wants them: images, prompts an image, points a prompt; None for any number."""

    batch: int | None = 1
    prompts: int | None = 1
    points: int | None = 2


ANY_SHAPE = StaticShape(None, None, None)
ANY_PROMPTS = StaticShape(1, None, None)  # one image, with as many prompts of as many points as there are
_TRACED_WITH = {"batch": 2, "prompts": 3, "points": 4}  # where any number is to be taken: different, and above 1


class _Site(nn.Module):
    """Stands in for a linear layer while tracing."""

    def __init__(self, name: str, layer: nn.Linear | QuantizedLinear) -> None:
        super().__init__()
        self.name, self.out_features = name, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = torch.onnx.ops.symbolic(
            f"{SITE_DOMAIN}::{SITE_OP}",
            (x,),
            {"layer": self.name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return answer


def _boundary(tokens: Tensor, block: int) -> Tensor:
    """Mark the tokens behind a block, so that the block can be found, timed and placed by itself."""
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{SITE_DOMAIN}::{BOUNDARY_OP}",
        (tokens,),
        {"block": f"vision_encoder.backbone.blocks.{block}"},
        dtype=tokens.dtype,
        shape=tokens.shape,
        version=1,
    )
    return marked


def trace(model: Sam2Model, part: str, static: StaticShape = ANY_SHAPE) -> ir.Model:
    """Trace one part of a `Sam2Model`.

    Args:
        model: float or quantized, in eval mode; not changed. Only its float tensors outside linear layers are used.
        part: "image_encoder" or "mask_decoder".
        static: which numbers of images, prompts and points are fixed.

    Returns:
        opset-21 model; its initializers are called like the model's parameters where they are parameters.
    """
    module, inputs, outputs = _prepare(model, part, static)
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=_dynamic_dimensions(part, static),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        traced = program.model
        _tidy(traced, part)
        with _parameters_hidden(traced, set(model.state_dict())):
            onnxscript.optimizer.optimize(
                traced,
                input_size_limit=LARGEST_FOLDED_CONSTANT,
                output_size_limit=LARGEST_FOLDED_CONSTANT,
            )
    return settle_shapes(traced)


def set_parameters(skeleton: ir.Model, model: nn.Module) -> ir.Model:
    """A copy of the skeleton with the float parameters of `model`.

    Raises:
        RuntimeError: a parameter that the trace shares with the model has another shape there (a bug).
    """
    filled = skeleton.clone()
    state = model.state_dict()
    for name, value in filled.graph.initializers.items():
        if name not in state:
            continue
        array = state[name].detach().cpu().numpy()
        if tuple(value.shape or ()) != array.shape:
            raise RuntimeError(f"{name}: the trace has shape {value.shape}, the model {array.shape}")
        value.const_value = ir.Tensor(array, name=name)
    return filled


def _prepare(model: Sam2Model, part: str, static: StaticShape) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    shell = _shell_of(model)
    batch, prompts, points = (getattr(static, side) or size for side, size in _TRACED_WITH.items())
    config: Any = model.config
    size = config.prompt_encoder_config.image_size
    if part == IMAGE_ENCODER:
        pixels = torch.zeros(batch, 3, size, size)
        encoder = EngineEncoder(shell) if EngineEncoder.takes(shell) else ImageEncoder(shell)
        return encoder.eval(), dict(zip(ENCODER_INPUTS, (pixels,), strict=True)), ENCODER_OUTPUTS
    with torch.no_grad():
        features = [
            torch.zeros(batch, channels, *shape)
            for channels, shape in zip(
                feature_channels(config), config.vision_config.backbone_feature_sizes, strict=True
            )
        ]
    fine, middle, coarse = features
    side = shell.prompt_encoder.mask_input_size
    values = (
        coarse,
        fine,
        middle,
        torch.rand(batch, prompts, points, 2) * size,
        torch.ones(batch, prompts, points, dtype=torch.int64),
        torch.zeros(batch, prompts, 1, *side),
        torch.zeros(batch, prompts),
    )
    return MaskDecoder(shell).eval(), dict(zip(DECODER_INPUTS, values, strict=True)), DECODER_OUTPUTS


def feature_channels(config: Any) -> tuple[int, int, int]:
    """Channels of high_res_features_0, high_res_features_1 and image_embeddings."""
    width: int = config.mask_decoder_config.hidden_size
    return width // 8, width // 4, width


def _shell_of(model: Sam2Model) -> Sam2Model:
    """A copy of the model, its linear layers replaced by sites, parts of it in an engine's form, weights shared."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, memo)
    shell.vision_encoder.backbone = EngineHiera(shell.vision_encoder.backbone, mark=_boundary)
    shell.prompt_encoder = for_engines(shell.prompt_encoder)
    for name, module in list(shell.named_modules()):
        if isinstance(module, nn.Linear | QuantizedLinear):
            replace_module(shell, name, _Site(name, module))
    return shell


def _dynamic_dimensions(part: str, static: StaticShape) -> dict[str, dict[int, Any]]:
    """By input, the number of each side that is not fixed, and its name."""
    sides = dict(enumerate(_TRACED_WITH))
    free = {number: torch.export.Dim(name) for number, name in sides.items() if getattr(static, name) is None}
    ranks = dict.fromkeys(ENCODER_INPUTS if part == IMAGE_ENCODER else ENCODER_OUTPUTS, 1)
    if part != IMAGE_ENCODER:
        ranks |= {"point_coords": 3, "point_labels": 3, "mask_input": 2, "has_mask_input": 2}
    return {name: {number: side for number, side in free.items() if number < rank} for name, rank in ranks.items()}


def _tidy(traced: ir.Model, part: str) -> None:
    """Parameter names as in the model, no traces of the exporter's own bookkeeping."""
    graph = traced.graph
    graph.name = part
    traced.doc_string = None
    for name in list(graph.initializers):
        if name.startswith("model."):
            value = graph.initializers.pop(name)
            value.name = name.removeprefix("model.")
            graph.initializers[value.name] = value
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    traced.metadata_props.clear()
    traced.producer_name, traced.producer_version = "samq", None


@contextlib.contextmanager
def _parameters_hidden(traced: ir.Model, names: set[str]) -> Iterator[None]:
    """Keep constant folding away from parameters, so that `set_parameters` reaches every use of them."""
    hidden = {name: value for name, value in traced.graph.initializers.items() if name in names}
    tensors = {name: value.const_value for name, value in hidden.items()}
    for value in hidden.values():
        value.const_value = None
    try:
        yield
    finally:
        for name, value in hidden.items():
            value.const_value = tensors[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its warnings (no torchvision, hidden parameters) do not concern the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
