"""Finding attention in a lowered graph: softmax(q kᵀ) v with heads split off and joined again around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from samq.export.graph import add_initializer, producer


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention whose layout is [batch, tokens, heads, width].

    Args:
        splits: the Reshape to [b, n, heads, width] of queries, keys and values.
        scores, softmax, product: q kᵀ, what is made of it, and its product with the values.
        joined: the Reshape back behind the product.
    """

    splits: tuple[ir.Node, ir.Node, ir.Node]
    scores: ir.Node
    softmax: ir.Node
    product: ir.Node
    joined: ir.Node

    @staticmethod
    def of(softmax: ir.Node) -> Attention | None:
        """What belongs to a Softmax, or None where it does not look like that or a side is not known."""
        scores, product = producer(softmax.inputs[0], "MatMul"), only_reader(softmax.outputs[0], "MatMul")
        if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
            return None
        query, key, value = (_split_heads(value) for value in (*scores.inputs, product.inputs[1]))
        moved = only_reader(product.outputs[0], "Transpose")
        joined = None if moved is None else only_reader(moved.outputs[0], "Reshape")
        if joined is None or query is None or key is None or value is None:
            return None
        return Attention((query, key, value), scores, softmax, product, joined)

    @property
    def batch(self) -> int:
        """How many attentions there are side by side, heads aside: images times windows."""
        return sides_of(self.splits[0].outputs[0])[0]

    @property
    def queries(self) -> int:
        """Tokens that attend."""
        return sides_of(self.splits[0].outputs[0])[1]

    @property
    def keys(self) -> int:
        """Tokens attended to."""
        return sides_of(self.splits[1].outputs[0])[1]


def only_reader(value: ir.Value, op: str) -> ir.Node | None:
    """The node of type `op` that alone reads a value."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type == op and not value.is_graph_output() else None


def sides_of(value: ir.Value) -> tuple[int, ...]:
    """Static sides of a value; none where one is dynamic."""
    sides = () if value.shape is None else tuple(value.shape)
    return tuple(s for s in sides if isinstance(s, int)) if all(isinstance(s, int) for s in sides) else ()


def reshape_to(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...]) -> None:
    """Give a Reshape other sides."""
    name = f"{node.name}/sides_" + "x".join(map(str, shape))
    node.replace_input_with(1, add_initializer(graph, name, np.array(shape, np.int64)))


def _split_heads(value: ir.Value | None) -> ir.Node | None:
    """The Reshape to [b, n, heads, width] in front of a Transpose."""
    moved = producer(value, "Transpose")
    node = None if moved is None else producer(moved.inputs[0], "Reshape")
    if moved is None or node is None or len(sides_of(node.outputs[0])) != 4 or len(node.outputs[0].consumers()) != 1:
        return None
    return node if only_reader(moved.outputs[0], "MatMul") is not None else None
