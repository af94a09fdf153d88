"""Attention heads as wide as fused kernels like them, filled up with zeros, which change nothing:

    [q 0] [k 0]ᵀ = q kᵀ        softmax(…) [v 0] = [softmax(…) v  0]        [a 0] [W; 0] = a W

The scale of the scores stays that of the true width. Symmetric codes of 0 stand for 0, so quantized weights are filled
up as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.columns import QUANTIZERS, Columns, is_projection
from samq.export.graph import add_initializer, constant_of, producer, remove_unused

Width = Callable[[int, int], int]


def pad_heads(model: ir.Model, width: Width) -> tuple[str, ...]:
    """Widen the heads of each attention in place; the names of the Softmax nodes whose heads were widened.

    Left alone: heads that are wide enough, queries that are pooled, layouts other than [batch, tokens, heads, width].

    Args:
        model: lowered, static, with a GEMM for each of query, key and value.
        width: (head's width, number of keys) → the width wanted, at least the first.
    """
    widened = []
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        attention = _Attention.of(softmax)
        if attention is None:
            continue
        wanted = width(attention.width, attention.keys)
        if wanted > attention.width:
            attention.widen(model.graph, wanted)
            widened.append(str(softmax.name))
    remove_unused(model)
    return tuple(widened)


@dataclass(frozen=True)
class _Attention:
    """The parts of one attention.

    Args:
        heads, width, keys: how many heads, how wide, and over how many keys they attend.
        inputs: the Reshape [B, N, heads · width] → [b, n, heads, width] of queries, keys and values.
        product: the MatMul with the values.
        joined: the Reshape back behind it.
        layers: the nodes whose second input has a row for each column of `joined`.
    """

    heads: int
    width: int
    keys: int
    inputs: tuple[ir.Node, ...]
    product: ir.Node
    joined: ir.Node
    layers: tuple[ir.Node, ...]

    @staticmethod
    def of(softmax: ir.Node) -> _Attention | None:
        """What belongs to a Softmax, or None where it does not look like that."""
        scores, product = producer(softmax.inputs[0], "MatMul"), _only_reader(softmax.outputs[0], "MatMul")
        if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
            return None
        inputs = tuple(_split_heads(value) for value in (*scores.inputs, product.inputs[1]))
        moved = _only_reader(product.outputs[0], "Transpose")
        joined = None if moved is None else _only_reader(moved.outputs[0], "Reshape")
        if joined is None or any(node is None for node in inputs):
            return None
        reshapes = tuple(node for node in inputs if node is not None)
        shapes = {_sides(node.outputs[0])[2:] for node in reshapes}
        layers = _layers_behind(joined.outputs[0])
        if len(shapes) != 1 or not layers:
            return None
        heads, width = shapes.pop()
        if not all(is_projection(v, heads * width) for node in reshapes if (v := node.inputs[0]) is not None):
            return None
        return _Attention(heads, width, _sides(reshapes[1].outputs[0])[1], reshapes, product, joined, layers)

    def widen(self, graph: ir.Graph, wanted: int) -> None:
        """Rewrite the graph for heads of this width."""
        padding = wanted - self.width
        whole = self.heads * wanted

        def take(array: NDArray[Any], fill: float) -> NDArray[Any]:
            heads = array.reshape(*array.shape[:-1], self.heads, self.width)
            sides = [(0, 0)] * (heads.ndim - 1) + [(0, padding)]
            return np.pad(heads, sides, constant_values=fill).reshape(*array.shape[:-1], whole)

        for node in self.inputs:
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, Columns(graph, node, f"heads_{wanted}", whole, take).of(source))
            _reshape_to(graph, node, (*_sides(node.outputs[0])[:2], self.heads, wanted))
            _widen(node.outputs[0], self.width, wanted)
        _widen(self.product.outputs[0], self.width, wanted)
        _reshape_to(graph, self.joined, (*_sides(self.joined.outputs[0])[:-1], whole))
        _widen(self.joined.outputs[0], self.heads * self.width, whole)
        for layer in self.layers:
            weight = layer.inputs[1]
            assert weight is not None
            _pad_rows(graph, weight, lambda rows: take(rows.T, 0.0).T)


def _only_reader(value: ir.Value, op: str) -> ir.Node | None:
    """The node of type `op` that alone reads a value."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type == op and not value.is_graph_output() else None


def _split_heads(value: ir.Value | None) -> ir.Node | None:
    """The Reshape to [b, n, heads, width] in front of a Transpose."""
    moved = producer(value, "Transpose")
    node = None if moved is None else producer(moved.inputs[0], "Reshape")
    if node is None or len(_sides(node.outputs[0])) != 4 or len(node.outputs[0].consumers()) != 1:
        return None
    return node if _only_reader(moved.outputs[0], "MatMul") is not None else None  # type: ignore[union-attr]


def _sides(value: ir.Value) -> tuple[int, ...]:
    """Static sides of a value; none where one is dynamic."""
    sides = () if value.shape is None else tuple(value.shape)
    return tuple(s for s in sides if isinstance(s, int)) if all(isinstance(s, int) for s in sides) else ()


def _layers_behind(value: ir.Value) -> tuple[ir.Node, ...]:
    """MatMuls that read a value, through Q/DQ or not; none when anything else reads it."""
    found: list[ir.Node] = []
    for node in value.consumers():
        if node.op_type in QUANTIZERS:
            behind = _layers_behind(node.outputs[0])
            if not behind:
                return ()
            found += behind
        elif node.op_type == "MatMul" and node.inputs[0] is value and _rows(node.inputs[1]) is not None:
            found.append(node)
        else:
            return ()
    return () if value.is_graph_output() else tuple(found)


def _rows(value: ir.Value | None) -> int | None:
    """How many rows a constant weight has that is not blocked along them."""
    array = constant_of(value)
    if array is not None:
        return int(array.shape[0])
    node = None if value is None else value.producer()
    blocked = node is not None and "block_size" in node.attributes
    return None if node is None or node.op_type not in QUANTIZERS or blocked else _rows(node.inputs[0])


def _reshape_to(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...]) -> None:
    name = f"{node.name}/sides_" + "x".join(map(str, shape))
    node.replace_input_with(1, add_initializer(graph, name, np.array(shape, np.int64)))


def _widen(value: ir.Value, before: int, after: int) -> None:
    """Give the new width to the shape of a value and of all that is moved or quantized from it."""
    shape = _sides(value)
    value.shape = ir.Shape(
        [after if side == before and index == len(shape) - 1 else side for index, side in enumerate(shape)]
    )
    for node in value.consumers():
        if node.op_type in QUANTIZERS:
            _widen(node.outputs[0], before, after)
        elif node.op_type == "Transpose":
            order = node.attributes["perm"].as_ints()
            node.outputs[0].shape = ir.Shape([value.shape[index] for index in order])


def _pad_rows(graph: ir.Graph, value: ir.Value, pad: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Replace a constant weight [K, N], or the one that Q/DQ read, by one with more rows."""
    node = value.producer()
    if node is not None:
        assert node.inputs[0] is not None
        _pad_rows(graph, node.inputs[0], pad)
        value.shape = node.inputs[0].shape if node.op_type in QUANTIZERS else None
        return
    array = constant_of(value)
    assert array is not None
    tensor = ir.Tensor(np.ascontiguousarray(pad(array)), name=value.name)
    value.const_value, value.shape = tensor, tensor.shape
