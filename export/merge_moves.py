"""Moves of data that follow each other as one, exactly; ONNX Runtime 1.31 and 1.32 leave them as they are.

| moves                                             | become                                      |
|---------------------------------------------------|---------------------------------------------|
| Reshape behind Reshape, Squeeze or Unsqueeze      | the last one                                |
| Reshape to the shape that is there                | nothing                                     |
| Slice behind Slice, on other axes                 | one Slice, which copies what remains alone  |
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.fuse_attention import Rewrite
from samq.export.graph import REGROUPING, add_initializer, constant_of, int_attribute, remove_unused


def merge_moves(model: ir.Model) -> Rewrite:
    """Rewrite in place (the table above); counts the moves that are gone."""
    before = len(list(model.graph))
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _skip_regrouping(node)
        elif node.op_type == "Slice":
            _merge_slices(model.graph, node)
    remove_unused(model)
    return Rewrite("merge_moves", before - len(list(model.graph)))


def _skip_regrouping(reshape: ir.Node) -> None:
    """Read what the moves in front of a Reshape read, and let its readers read that where nothing changes."""
    sides = constant_of(reshape.inputs[1])
    source = reshape.inputs[0]
    if sides is None or source is None or not (int_attribute(reshape, "allowzero", 0) or sides.all()):
        return  # it copies sides of its input
    while (inner := source.producer()) is not None and inner.op_type in REGROUPING and inner.inputs[0] is not None:
        source = inner.inputs[0]
    reshape.replace_input_with(0, source)
    result = reshape.outputs[0]
    known = source.shape is not None and source.shape.is_static() and source.shape == result.shape
    if known and not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)


def _merge_slices(graph: ir.Graph, outer: ir.Node) -> None:
    source = outer.inputs[0]
    inner = None if source is None else source.producer()
    if source is None or inner is None or inner.op_type != "Slice" or len(source.uses()) > 1:
        return
    bounds = [_bounds(node) for node in (inner, outer)]
    if source.shape is None or source.is_graph_output() or not all(bounds):
        return
    merged = [np.concatenate([first, second]) for first, second in zip(*bounds, strict=True)]
    axes = [int(axis) % len(source.shape) for axis in merged[2]]
    if len(set(axes)) < len(axes):
        return
    outer.replace_input_with(0, inner.inputs[0])
    for index, (what, values) in enumerate(zip(("from", "to", "axes", "steps"), merged, strict=True), 1):
        outer.replace_input_with(index, add_initializer(graph, f"{outer.outputs[0].name}/{what}", values))


def _bounds(node: ir.Node) -> list[NDArray[np.int64]]:
    """Starts, ends, axes and steps of a Slice; nothing where one of them is not given or computed."""
    told = [constant_of(value) for value in node.inputs[1:]]
    known = [values.astype(np.int64) for values in told if values is not None]
    return known if len(known) == 4 else []
