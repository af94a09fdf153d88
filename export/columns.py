"""Columns of a linear layer, picked or rearranged: (x W + b)[:, c] = x W[:, c] + b[c].

Each column of a product depends on the same column of W alone, so weights, their scales and zero-points, biases and the
second factor of a low-rank branch are taken along N, and whatever reads x stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.graph import add_initializer, constant_of

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
Take = Callable[[NDArray[Any], float], NDArray[Any]]


def is_projection(value: ir.Value, width: int) -> bool:
    """A MatMul with a weight of this width, or sums of such, constants [width] and products with numbers, read once."""
    node = value.producer()
    if node is None or len(value.consumers()) != 1 or value.is_graph_output():
        return False
    if node.op_type == "MatMul":
        return _is_weight(node.inputs[1], width)
    if node.op_type == "Mul":
        return all(v is not None and (_is_number(v) or is_projection(v, width)) for v in node.inputs)
    return node.op_type == "Add" and all(
        v is not None and (_is_row(v, width) or is_projection(v, width)) for v in node.inputs
    )


def _is_row(value: ir.Value, width: int) -> bool:
    return value.const_value is not None and value.const_value.shape.dims == (width,)


def _is_number(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def _is_weight(value: ir.Value | None, width: int) -> bool:
    """A constant whose last axis is N, or Q/DQ of one by constants."""
    array = constant_of(value)
    if array is not None:
        return array.ndim == 2 and array.shape[-1] == width
    node = None if value is None else value.producer()
    if node is None or node.op_type not in QUANTIZERS or any(constant_of(v) is None for v in node.inputs[1:]):
        return False
    return _is_weight(node.inputs[0], width)


class Columns:
    """Copies what computes some columns of a projection.

    Args:
        graph: where it stands.
        anchor: copies go in front of this node.
        suffix: added to every name, so that copies are told from the originals.
        width: number of columns taken.
        take: them from an array [..., N]; its second argument fills columns that are new.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, suffix: str, width: int, take: Take) -> None:
        self.graph, self.anchor, self.suffix, self.width, self.take = graph, anchor, suffix, width, take

    def of(self, value: ir.Value, fill: float = 0.0) -> ir.Value:
        """The columns of a value for which `is_projection` holds; they stand in for `value`, which stays."""
        if value.const_value is not None:
            return value if _is_number(value) else self._constant(value, fill)
        node = value.producer()
        assert node is not None
        kept = 1 if node.op_type == "MatMul" else 0
        fills = (0.0, 1.0, 0.0) if node.op_type in QUANTIZERS else (0.0, 0.0, 0.0)  # a scale of 0 is no scale
        inputs = [v if v is None or index < kept else self.of(v, fills[index]) for index, v in enumerate(node.inputs)]
        return self._copy(node, inputs, value)

    def _constant(self, value: ir.Value, fill: float) -> ir.Value:
        array = constant_of(value)
        assert array is not None
        name = f"{value.name}_{self.suffix}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return add_initializer(self.graph, name, np.ascontiguousarray(self.take(array, fill)))

    def _copy(self, node: ir.Node, inputs: list[ir.Value | None], like: ir.Value) -> ir.Value:
        name = f"{node.name}_{self.suffix}"
        copied = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=name)
        copied.metadata_props.update(node.metadata_props)
        output = copied.outputs[0]
        output.name, output.type = f"{like.name}_{self.suffix}", like.type
        output.shape = None if like.shape is None else ir.Shape([*like.shape[:-1], self.width])
        self.graph.insert_before(self.anchor, copied)
        return output
