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

from samq.export.attention import Attention, reshape_to, sides_of
from samq.export.columns import QUANTIZERS, Columns, is_projection
from samq.export.graph import constant_of, remove_unused

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
        attention = Attention.of(softmax)
        heads = None if attention is None else _Heads.of(attention)
        if attention is None or heads is None:
            continue
        wanted = width(heads.width, attention.keys)
        if wanted > heads.width:
            heads.widen(model.graph, wanted)
            widened.append(str(softmax.name))
    remove_unused(model)
    return tuple(widened)


@dataclass(frozen=True)
class _Heads:
    """The heads of one attention.

    Args:
        heads, width: how many, and how wide.
        attention: whose they are.
        layers: the nodes whose second input has a row for each column of what the attention joins.
    """

    heads: int
    width: int
    attention: Attention
    layers: tuple[ir.Node, ...]

    @staticmethod
    def of(attention: Attention) -> _Heads | None:
        """The heads, or None where queries, keys or values are more than a projection."""
        shapes = {sides_of(node.outputs[0])[2:] for node in attention.splits}
        layers = _layers_behind(attention.joined.outputs[0])
        if len(shapes) != 1 or not layers:
            return None
        heads, width = shapes.pop()
        if not all(is_projection(v, heads * width) for node in attention.splits if (v := node.inputs[0]) is not None):
            return None
        return _Heads(heads, width, attention, layers)

    def widen(self, graph: ir.Graph, wanted: int) -> None:
        """Rewrite the graph for heads of this width."""
        padding = wanted - self.width
        whole = self.heads * wanted

        def take(array: NDArray[Any], fill: float) -> NDArray[Any]:
            heads = array.reshape(*array.shape[:-1], self.heads, self.width)
            sides = [(0, 0)] * (heads.ndim - 1) + [(0, padding)]
            return np.pad(heads, sides, constant_values=fill).reshape(*array.shape[:-1], whole)

        for node in self.attention.splits:
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, Columns(graph, node, f"heads_{wanted}", whole, take).of(source))
            reshape_to(graph, node, (*sides_of(node.outputs[0])[:2], self.heads, wanted))
            _widen(node.outputs[0], self.width, wanted)
        product, joined = self.attention.product, self.attention.joined
        _widen(product.outputs[0], self.width, wanted)
        reshape_to(graph, joined, (*sides_of(joined.outputs[0])[:-1], whole))
        _widen(joined.outputs[0], self.heads * self.width, whole)
        for layer in self.layers:
            weight = layer.inputs[1]
            assert weight is not None
            _pad_rows(graph, weight, lambda rows: take(rows.T, 0.0).T)


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


def _widen(value: ir.Value, before: int, after: int) -> None:
    """Give the new width to the shape of a value and of all that is moved or quantized from it."""
    shape = sides_of(value)
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
