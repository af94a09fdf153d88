"""Constants enlarged by two matrix products instead of a Resize, which ONNX Runtime is slow at.

Cubic interpolation (Keys, 1981) is linear in the values and works on each axis by itself: y = A x Bᵀ, with four weights
in each row of A and B. The encoder's position embedding is stored small and enlarged to its grid when a session is
made: at 1024×1024 that takes ONNX Runtime 1.32 half a second by Resize, and few milliseconds by the products. The
numbers are the same but for the last bits, as they are between PyTorch's interpolation and Resize.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.fuse_attention import Rewrite
from samq.export.graph import Writer, constant_of, remove_unused, replace_value

SIZES = 3  # input of Resize
RANK = 4  # images, channels, height, width
TAPS = (-1, 0, 1, 2)  # neighbours that a value is made of
SHARPNESS = -0.75  # `cubic_coeff_a` where none is given
LIKE_TORCH = {
    "mode": "cubic",
    "coordinate_transformation_mode": "half_pixel",
    "antialias": 0,
    "exclude_outside": 0,
}
DEFAULTS = {**LIKE_TORCH, "mode": "nearest"}  # of Resize


def multiply_to_resize(model: ir.Model) -> Rewrite:
    """Replace, in place, every cubic Resize of a constant [images, channels, h, w] to constant h and w."""
    count = 0
    for node in [node for node in model.graph if node.op_type == "Resize"]:
        sides = _sides(node)
        if sides is None or not _interpolates_like_torch(node):
            continue
        (height, width), shape = sides
        given = node.attributes.get("cubic_coeff_a")
        sharpness = SHARPNESS if given is None else given.as_float()
        writer = Writer(model.graph, node, str(node.outputs[0].name))
        down = writer.constant(cubic_weights(height, shape[-2], sharpness), "down")
        across = writer.constant(cubic_weights(width, shape[-1], sharpness).T, "across")
        value, dtype = node.inputs[0], ir.DataType.FLOAT
        tall = writer.node("MatMul", [down, value], "tall", dtype=dtype, shape=ir.Shape([*shape[:-1], width]))
        resized = writer.node("MatMul", [tall, across], "resized", dtype=dtype, shape=ir.Shape(shape))
        replace_value(model.graph, node.outputs[0], resized)
        count += 1
    remove_unused(model)
    return Rewrite("multiply_to_resize", count)


def cubic_weights(before: int, after: int, sharpness: float) -> NDArray[np.float32]:
    """The matrix [after, before] that resizes an axis; values beyond its ends are those at the ends.

    Args:
        before, after: sides.
        sharpness: a in Keys' kernel.
    """
    at = (np.arange(after) + 0.5) * (before / after) - 0.5
    left = np.floor(at).astype(np.int64)
    weights = np.zeros((after, before))
    for tap in TAPS:
        neighbour = left + tap
        weight = _kernel(np.abs(at - neighbour), sharpness)
        np.add.at(weights, (np.arange(after), neighbour.clip(0, before - 1)), weight)
    return weights.astype(np.float32)


def _kernel(distance: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, far)


def _sides(resize: ir.Node) -> tuple[tuple[int, int], list[int]] | None:
    """Height and width before, and all sides after a Resize of the last two axes of a constant."""
    source = constant_of(resize.inputs[0])
    sizes = constant_of(resize.inputs[SIZES]) if len(resize.inputs) > SIZES else None
    if source is None or sizes is None or "axes" in resize.attributes or source.ndim != RANK:
        return None
    after = [int(side) for side in sizes]
    images, channels, height, width = source.shape
    return ((height, width), after) if after[:2] == [images, channels] else None


def _interpolates_like_torch(resize: ir.Node) -> bool:
    """As PyTorch's bicubic `interpolate`, neither with aligned corners nor with antialiasing."""
    found = {name: resize.attributes[name].value for name in LIKE_TORCH if name in resize.attributes}
    return {**DEFAULTS, **found} == LIKE_TORCH
