"""Paddings of two neighbouring axes as paddings of planes, exactly, for ONNX Runtime's CUDA provider.

    y = Pad(x [B, H, W, C], h and w behind)
    becomes z = Pad(x as [B, H, W·C], h and w·C behind), y = z as [B, H + h, W + w, C]

The provider has a kernel for tensors of at most four axes of which the last two alone grow (tensor/pad.cc). Its other
one copies tables of all axes for every element: 15 paddings of windows took 2.9 of 7.2 ms of SAM2.1 base+'s encoder
(docs/onnxruntime-cuda.md). The Reshapes move nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.fuse_attention import Rewrite
from samq.export.graph import Writer, constant_of, pads_with_a_constant, remove_unused, replace_value

MOST_AXES = 4  # of the fast kernel


def pad_planes(model: ir.Model) -> Rewrite:
    """Rewrite in place (see above); what the fast kernel takes already, or cannot take, stays."""
    count, refused = 0, []
    for pad in [node for node in model.graph if node.op_type == "Pad" and not node.domain]:
        value, pads = pad.inputs[0], constant_of(pad.inputs[1])
        if value is None or value.shape is None or pads is None or len(pad.inputs) > 3 or not pads_with_a_constant(pad):
            refused.append(f"{pad.outputs[0].name}: paddings that are not known, or with more than one value")
            continue
        shape = value.shape
        grown = np.flatnonzero(pads.reshape(2, -1).any(0)).tolist()
        first = min(grown[0], len(shape) - 2) if grown else 0
        if not grown or (first == len(shape) - 2 and len(shape) <= MOST_AXES):
            continue
        sides = [side for side in shape[first:] if isinstance(side, int)]
        unknown_outside = sum(not isinstance(side, int) for side in shape[:first])
        if grown[-1] > first + 1 or len(sides) < len(shape) - first or unknown_outside > 1:
            refused.append(f"{pad.outputs[0].name}: other axes grow than two neighbouring ones of known sides")
            continue
        _as_planes(Writer(model.graph, pad, str(pad.name)), pad, shape[:first], sides, pads)
        count += 1
    remove_unused(model)
    return Rewrite("pad_planes", count, tuple(refused))


def _as_planes(
    writer: Writer, pad: ir.Node, outer: Sequence[int | ir.SymbolicDim], sides: Sequence[int], pads: NDArray[np.int64]
) -> None:
    """Write it anew.

    Args:
        outer: sides in front of the two axes that grow; one of them may be unknown.
        sides: from these two on.
    """
    height, width, *rest = sides
    (top, left), (bottom, right) = (half[len(outer) : len(outer) + 2] for half in np.split(pads, 2))
    inner = math.prod(rest)
    planes = _reshaped(writer, pad.inputs[0], [-1, height, width * inner], "planes")
    amounts = np.array([0, top, left * inner, 0, bottom, right * inner], np.int64)
    inputs = [planes, writer.constant(amounts, "amounts"), *pad.inputs[2:]]
    padded = writer.node("Pad", inputs, "padded", dtype=pad.outputs[0].dtype)
    grown = [int(height + top + bottom), int(width + left + right), *rest]
    known = [side if isinstance(side, int) else -1 for side in outer]
    result = pad.outputs[0]
    shape = result.shape or ir.Shape([*outer, *grown])
    replace_value(writer.graph, result, _reshaped(writer, padded, [*known, *grown], "result", shape))


def _reshaped(
    writer: Writer, value: ir.Value | None, sides: Sequence[int], name: str, shape: ir.Shape | None = None
) -> ir.Value:
    assert value is not None
    wanted = writer.constant(np.array(sides, np.int64), f"{name}_sides")
    return writer.node("Reshape", [value, wanted], name, dtype=value.dtype, shape=shape)
