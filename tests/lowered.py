"""Canonical forms of the small model with the shapes that TensorRT gets, static but for prompts; inputs for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from exported import float_model, quantized
from numpy.typing import NDArray
from small_model import IMAGE_SIZE, pixels, recipe_of

from samq.export.parts import float_part, quantized_part
from samq.export.trace import ANY_PROMPTS, StaticShape, trace

SIZES = {"batch": 1, "prompts": 2, "points": 3}  # of dynamic sides
HALF_ERROR = 3e-3  # relative; a few dozen FP16 layers
FLIPPED_CODES = 4e-2  # INT8 codes that flip when their input moves by the last bit of FP16


@cache
def static_skeleton(part: str, shapes: StaticShape = ANY_PROMPTS) -> ir.Model:
    """The trace of one part for one image, or other shapes; not to be changed."""
    return trace(float_model(), part, shapes)


def static_form(name: str, part: str, shapes: StaticShape = ANY_PROMPTS, **changes: Any) -> ir.Model:
    """The float part ("float"), that with FP16 weights ("half"), or the canonical form of a preset with changes."""
    if name in ("float", "half"):
        return float_part(static_skeleton(part, shapes), float_model(), half=name == "half")
    result = quantized(recipe_of(name, **changes))
    return quantized_part(static_skeleton(part, shapes), result.model, result.codes)


def feeds(model: ir.Model, sizes: Mapping[str, int] = SIZES) -> dict[str, NDArray[Any]]:
    """Random inputs of one part: an image, or prompts with a mask."""
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        shape = [side if isinstance(side, int) else sizes[str(side)] for side in value.shape or ()]
        if value.dtype == ir.DataType.INT64:
            found[name] = np.ones(shape, np.int64)
        elif name == "point_coords":
            found[name] = random.uniform(0, IMAGE_SIZE, shape).astype(np.float32)
        elif name == "pixel_values":
            found[name] = pixels(1, seed=3).numpy()
        else:
            found[name] = random.standard_normal(shape).astype(np.float32)
    return found


def noted_and_inferred(model: ir.Model) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Static shapes of results by name: as noted in a graph, which loses them, and as ONNX infers them.

    Both are of the values that have a shape in both, more than a hundred.
    """
    noted = {str(v.name): tuple(v.shape.numpy()) for node in model.graph for v in node.outputs if v.shape is not None}
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True)
    inferred = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.value_info}
    shared = noted.keys() & inferred.keys()
    assert len(shared) > 100
    return {name: noted[name] for name in shared}, {name: inferred[name] for name in shared}


def distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
