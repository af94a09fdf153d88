"""Sums with what is repeated for every prompt, exactly, without repeating it: features of an image are large.

y + flat(repeat(x)) = flat(y by image + x)          flat: [images, prompts, …] → [images · prompts, …]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from samq.export.fuse_attention import Rewrite
from samq.export.graph import Writer, constant_of, producer, remove_unused, replace_value


@dataclass(frozen=True)
class _Repeated:
    """x of images, repeated for prompts.

    Args:
        source: x [images, 1, …].
        times: how often, an integer vector of one element.
        sides: the others.
    """

    source: ir.Value
    times: ir.Value
    sides: tuple[int, ...]

    @staticmethod
    def of(value: ir.Value | None) -> _Repeated | None:
        """What is repeated and flattened to a value [images · prompts, …], or None where none is."""
        reshape = producer(value, "Reshape")
        expand = None if reshape is None else producer(reshape.inputs[0], "Expand")
        sides = None if reshape is None else constant_of(reshape.inputs[1])
        shape = None if expand is None else producer(expand.inputs[1], "Concat")
        if expand is None or shape is None or sides is None or sides[0] != -1 or (sides[1:] <= 0).any():
            return None
        source, parts = expand.inputs[0], shape.inputs
        others = [constant_of(part) for index, part in enumerate(parts) if index != 1]
        known = tuple(int(side) for side in sides[1:])
        if source is None or source.shape is None or source.shape.dims[1:] != (1, *known):
            return None
        if len(parts) != len(source.shape) or any(part is None or part.tolist() != [1] for part in others):
            return None
        times = parts[1]
        return None if times is None else _Repeated(source, times, known)


def add_unrepeated(model: ir.Model) -> Rewrite:
    """Rewrite every such sum in place."""
    count = 0
    for node in [node for node in model.graph if node.op_type == "Add"]:
        for repeated, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            found = _Repeated.of(repeated)
            if found is not None and other is not None and other.shape == node.outputs[0].shape:
                _add(Writer(model.graph, node, str(node.name)), node, found, other)
                count += 1
                break
    remove_unused(model)
    return Rewrite("add_unrepeated", count)


def _add(writer: Writer, node: ir.Node, repeated: _Repeated, other: ir.Value) -> None:
    dtype, result = other.dtype, node.outputs[0]
    first, last = (
        writer.constant(np.array(part), name) for part, name in (([-1], "images"), (repeated.sides, "sides"))
    )
    sides = writer.node("Concat", [first, repeated.times, last], "sides_by_image", dtype=ir.DataType.INT64, axis=0)
    by_image = writer.node("Reshape", [other, sides], "by_image", dtype=dtype)
    total = writer.node("Add", [by_image, repeated.source], "sum", dtype=dtype)
    flat = writer.constant(np.array([-1, *repeated.sides]), "flat_sides")
    replace_value(writer.graph, result, writer.node("Reshape", [total, flat], "flat", dtype=dtype, shape=result.shape))
