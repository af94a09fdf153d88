"""One GEMM for each part of a fused projection: Split(x W + b) = (x W₁ + b₁, x W₂ + b₂, …), exactly.

Whether three GEMMs (query, key, value) beat one is for measurement.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.columns import Columns, is_projection
from samq.export.graph import int_attribute, remove_unused, replace_value


def split_projections(model: ir.Model) -> tuple[str, ...]:
    """Cut, in place, every GEMM that only a Split along its last axis reads; the names of the GEMMs that were cut.

    Args:
        model: float32, weights as constants or behind Q/DQ along N or blocked along K, as `lower_for_tensorrt` writes.
    """
    cut = []
    for node in [node for node in model.graph if node.op_type == "Split"]:
        source = node.inputs[0]
        assert source is not None
        sizes = _sizes(node)
        if sizes is None or not is_projection(source, sum(sizes)):
            continue
        start = 0
        for index, (size, output) in enumerate(zip(sizes, node.outputs, strict=True)):
            piece = _columns(model.graph, node, index, start, size).of(source)
            replace_value(model.graph, output, piece)
            start += size
        cut.append(_gemm_name(source))
    remove_unused(model)
    return tuple(cut)


def _columns(graph: ir.Graph, split: ir.Node, index: int, start: int, size: int) -> Columns:
    def take(array: NDArray[Any], _: float) -> NDArray[Any]:
        return array[..., start : start + size]

    return Columns(graph, split, str(index), size, take)


def _sizes(split: ir.Node) -> list[int] | None:
    """Widths of the parts, or None where the Split is not along the last axis or not static."""
    source = split.inputs[0]
    if source is None or source.shape is None:
        return None
    rank = len(source.shape)
    if int_attribute(split, "axis", 0) % rank != rank - 1:
        return None
    sizes = [output.shape[rank - 1] if output.shape is not None else None for output in split.outputs]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(size, int) for size in sizes) else None


def _gemm_name(value: ir.Value) -> str:
    """The MatMul behind sums, the first operand first."""
    node = value.producer()
    while node is not None and node.op_type != "MatMul":
        node = next(v.producer() for v in node.inputs if v is not None and v.producer() is not None)
    assert node is not None
    return str(node.name)
