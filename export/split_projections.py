"""One GEMM for each part of a fused projection: Split(x W + b) = (x W₁ + b₁, x W₂ + b₂, …), exactly.

A column of a product depends on the same column of W alone, so weights, their scales and zero-points, biases and the
second factor of a low-rank branch are cut along N. Whether three GEMMs (query, key, value) beat one is for measurement.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from samq.export.graph import add_initializer, constant_of, int_attribute, remove_unused, replace_value

WEIGHT_CHAIN = ("QuantizeLinear", "DequantizeLinear")


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
        if sizes is None or not _is_projection(source, sum(sizes)):
            continue
        start = 0
        for index, (size, output) in enumerate(zip(sizes, node.outputs, strict=True)):
            piece = _Piece(model.graph, node, start, start + size, index).of(source)
            replace_value(model.graph, output, piece)
            start += size
        cut.append(_gemm_name(source))
    remove_unused(model)
    return tuple(cut)


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


def _is_projection(value: ir.Value, width: int) -> bool:
    """A MatMul with a weight of this width, or sums of such and of constants [width], with a single reader."""
    node = value.producer()
    if node is None or len(value.consumers()) != 1 or value.is_graph_output():
        return False
    if node.op_type == "MatMul":
        return _is_weight(node.inputs[1], width)
    return node.op_type == "Add" and all(
        v is not None and (_is_row(v, width) or _is_projection(v, width)) for v in node.inputs
    )


def _is_row(value: ir.Value, width: int) -> bool:
    return value.const_value is not None and value.const_value.shape.dims == (width,)


def _is_weight(value: ir.Value | None, width: int) -> bool:
    """A constant whose last axis is N, or Q/DQ of one by constants."""
    array = constant_of(value)
    if array is not None:
        return array.ndim == 2 and array.shape[-1] == width
    node = None if value is None else value.producer()
    if node is None or node.op_type not in WEIGHT_CHAIN or any(constant_of(v) is None for v in node.inputs[1:]):
        return False
    return _is_weight(node.inputs[0], width)


def _gemm_name(value: ir.Value) -> str:
    """The MatMul behind sums, the first operand first."""
    node = value.producer()
    while node is not None and node.op_type == "Add":
        node = next(v.producer() for v in node.inputs if v is not None and v.producer() is not None)
    assert node is not None
    return str(node.name)


class _Piece:
    """Copies what computes columns `start` to `stop` of a projection, in front of the Split."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, start: int, stop: int, index: int) -> None:
        self.graph, self.anchor, self.columns, self.index = graph, anchor, slice(start, stop), index
        self.width = stop - start

    def of(self, value: ir.Value) -> ir.Value:
        """The columns of a value."""
        if value.const_value is not None:
            return self._constant(value)
        node = value.producer()
        assert node is not None
        inputs = list(node.inputs)
        whole = inputs[:1] if node.op_type == "MatMul" else []
        pieces = [self.of(v) if v is not None else None for v in inputs[len(whole) :]]
        return self._copy(node, [*whole, *pieces], value)

    def _constant(self, value: ir.Value) -> ir.Value:
        array = constant_of(value)
        assert array is not None
        name = f"{value.name}_{self.index}"
        if array.ndim == 0:
            return value
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return add_initializer(self.graph, name, np.ascontiguousarray(array[..., self.columns]))

    def _copy(self, node: ir.Node, inputs: list[ir.Value | None], like: ir.Value) -> ir.Value:
        copied = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=f"{node.name}_{self.index}")
        copied.metadata_props.update(node.metadata_props)
        output = copied.outputs[0]
        output.name, output.type = f"{like.name}_{self.index}", like.type
        output.shape = None if like.shape is None else ir.Shape([*like.shape[:-1], self.width])
        self.graph.insert_before(self.anchor, copied)
        return output
