"""Operators that are valid ONNX, and that TensorRT's importers do not take with every type; each rewrite is exact.

| graph                                            | becomes                                        | for              |
|--------------------------------------------------|------------------------------------------------|------------------|
| Clip of integers                                 | Max → Min                                      | all              |
| Cast(bool → int64) → ReduceSum → Cast(→ float)   | Cast(bool → float) → ReduceSum, exact to 2²⁴   | no integer sums  |
| Slice to 2⁶³ − 1, which says "to the end"        | to 2³¹ − 1                                     | 32-bit integers  |
| Shape of some sides (its `start`, `end`)         | Shape → Slice; 8.6 reads neither attribute     | all              |
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from samq.export.graph import add_initializer, constant_of, int_attribute, producer, replace_value
from samq.export.tensorrt_targets import TensorRtTarget

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def fit_operators(graph: ir.Graph, target: TensorRtTarget) -> None:
    """Rewrite in place what the target's importer does not take (the table above)."""
    for node in list(graph):
        if node.op_type == "Clip" and node.outputs[0].dtype in INTEGERS:
            _clip_as_max_min(graph, node)
        elif node.op_type == "ReduceSum" and not target.integer_sums:
            _sum_truth_as_float(graph, node)
        elif node.op_type == "Shape":
            _slice_behind(graph, node)
        elif node.op_type == "Slice" and target.widest_integer == ir.DataType.INT32:
            _short_ends(graph, node)


def _clip_as_max_min(graph: ir.Graph, clip: ir.Node) -> None:
    value, result = clip.inputs[0], clip.outputs[0]
    for op, bound in zip(("Max", "Min"), clip.inputs[1:], strict=False):
        if bound is None:
            continue
        node = ir.node(op, [value, bound], name=f"{clip.name}/{op}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{clip.name}/{op}_out", result.type, result.shape
        graph.insert_before(clip, node)
    assert value is not None
    replace_value(graph, result, value)
    graph.remove(clip, safe=True)


def _sum_truth_as_float(graph: ir.Graph, total: ir.Node) -> None:
    truth = producer(total.inputs[0], "Cast")
    casts = total.outputs[0].consumers()
    if truth is None or truth.inputs[0] is None or truth.inputs[0].dtype != BOOL:
        return
    if len(truth.outputs[0].consumers()) > 1 or any(int_attribute(cast, "to", 0) != FLOAT for cast in casts):
        return
    truth.attributes["to"] = ir.AttrInt64("to", FLOAT)
    truth.outputs[0].type = total.outputs[0].type = ir.TensorType(FLOAT)
    for cast in casts:
        replace_value(graph, cast.outputs[0], total.outputs[0])
        graph.remove(cast, safe=True)


def _short_ends(graph: ir.Graph, node: ir.Node) -> None:
    limits = np.iinfo(np.int32)
    ends = constant_of(node.inputs[2])
    if ends is not None and (ends.min() < limits.min or ends.max() > limits.max):
        node.replace_input_with(
            2, add_initializer(graph, f"{node.name}/ends", np.clip(ends, limits.min, limits.max).astype(np.int64))
        )


def _slice_behind(graph: ir.Graph, shape: ir.Node) -> None:
    part = shape.outputs[0]
    bounds = [shape.attributes.pop(name, None) for name in ("start", "end")]
    assert shape.inputs[0] is not None
    assert shape.inputs[0].shape is not None
    rank = len(shape.inputs[0].shape)
    start, end, _ = slice(*(None if bound is None else bound.as_int() for bound in bounds)).indices(rank)
    if (start, end) == (0, rank):
        return
    whole = ir.node("Shape", [shape.inputs[0]], name=f"{shape.name}/whole")
    whole.outputs[0].name, whole.outputs[0].type = f"{shape.name}/whole_out", part.type
    whole.outputs[0].shape = ir.Shape([rank])
    limits = [
        add_initializer(graph, f"{shape.name}/{name}", np.array([number]))
        for name, number in (("start", start), ("end", end))
    ]
    node = ir.node("Slice", [whole.outputs[0], *limits], name=f"{shape.name}/part")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{shape.name}/part_out", part.type, part.shape
    for written in (whole, node):
        graph.insert_before(shape, written)
    replace_value(graph, part, node.outputs[0])
    graph.remove(shape, safe=True)
