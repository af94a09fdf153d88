"""The small model's ONNX parts, traced and quantized once for all tests."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from small_model import pixels, small_sam2
from torch import nn
from transformers import Sam2Model

from samq.calib.parts import PARTS
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import Predictor
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.trace import SITE_DOMAIN, SITE_OP, trace
from samq.quant.config import Recipe
from samq.quant.layers import LayerCodes
from samq.quant.quantize import Quantized, quantize

STABILITY = 0.98  # of the released models: an unstable single mask is replaced by the best of the others


@cache
def float_model() -> Sam2Model:
    """The small model, with the released models' choice of the single mask; not to be changed."""
    model = copy.deepcopy(small_sam2())
    model.mask_decoder.dynamic_multimask_stability_thresh = STABILITY
    model.config.mask_decoder_config.dynamic_multimask_stability_thresh = STABILITY  # type: ignore[union-attr]
    return model


@cache
def skeleton(part: str) -> ir.Model:
    """The trace of one part, without linear layers; not to be changed."""
    return trace(float_model(), part)


def quantized(recipe: Recipe) -> Quantized:
    """The small model quantized on one image."""
    return _quantized(json.dumps(recipe.model_dump()))


@cache
def _quantized(recipe: str) -> Quantized:
    return quantize(float_model(), Recipe.model_validate_json(recipe), [pixels(1)])


def canonical(recipe: Recipe, part: str) -> ir.Model:
    """The canonical Q/DQ form of one part."""
    result = quantized(recipe)
    return quantized_part(skeleton(part), result.model, result.codes)


def float_predictor(folder: Path) -> Predictor:
    """The float parts as engines."""
    paths = [folder / f"{part}.onnx" for part in PARTS]
    for part, path in zip(PARTS, paths, strict=True):
        save_part(float_part(skeleton(part), float_model(), half=False), path)
    return Predictor(*(OnnxRuntimeEngine(path) for path in paths))


def one_layer(layer: nn.Linear | LayerCodes, name: str = "a.layer") -> tuple[ir.Model, dict[str, Any]]:
    """A graph x → site → y around one layer, and the `layers` to fill it with."""
    inputs, outputs = (
        layer.weight.codes.shape[::-1] if isinstance(layer, LayerCodes) else (layer.in_features, layer.out_features)
    )
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", "columns", inputs]))
    site = ir.node(SITE_OP, [x], {"layer": name}, domain=SITE_DOMAIN, name="site")
    y = site.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", "columns", outputs])
    graph = ir.Graph([x], [y], nodes=[site], opset_imports={"": 21, SITE_DOMAIN: 1}, name="one_layer")
    return ir.Model(graph, ir_version=10), {name: layer}


def as_written(model: ir.Model | onnx.ModelProto, feeds: dict[str, NDArray[Any]], *outputs: str) -> list[NDArray[Any]]:
    """What the graph says, node by node: ONNX Runtime without any optimization."""
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers: list[NDArray[Any]] = session.run(list(outputs) or None, feeds)
    return answers


def largest_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
