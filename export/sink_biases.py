"""Biases move with the data until another operator takes them, exact but for the order of float sums.

CUDA adds a bias in a pass of its own over the whole result of a layer. Of what reads x + b

| this                                                  | leaves b                                                     |
|-------------------------------------------------------|--------------------------------------------------------------|
| Reshape, Transpose, Slice, ReduceMax (last axis kept) | behind it: max(x + b) = max(x) + b, of fewer elements        |
| Add of something else                                 | behind it                                                    |
| Add of a constant                                     | in that constant                                             |
| SkipLayerNormalization                                | in its own bias                                              |
| linear layers, one or several                         | behind each: (x + b) W = x W + b W                           |
| MultiHeadAttention, as keys                           | nowhere: all scores of a query rise by q · b, which softmax  |
|                                                       | does not see                                                 |
| … as values                                           | behind it: the weights of a query sum up to 1                |
| anything else, as queries, Pad or Gelu                | where it is                                                  |

So of the three biases of q, k and v one remains: that of v becomes one with the projection's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.fuse_attention import Rewrite
from samq.export.graph import add_initializer, constant_of, remove_unused, replace_value
from samq.export.unpack_at_load import weight_of

KEYS, VALUES = 1, 2  # inputs of MultiHeadAttention
NORM_BIAS = 4  # input of SkipLayerNormalization

Bias = NDArray[np.float32]


def sink_biases(model: ir.Model) -> Rewrite:
    """Move every Add of a constant over the last axis as far as it goes, in place; counts those that are gone."""
    before = sum(_biased(node) is not None for node in model.graph)
    waiting = [node for node in model.graph if _biased(node) is not None]
    while waiting:
        add = waiting.pop()
        moved = _sink(model.graph, add)
        if moved is not None:
            model.graph.remove(add, safe=True)
            waiting += moved
    remove_unused(model)
    return Rewrite("sink_biases", before - sum(_biased(node) is not None for node in model.graph))


def _biased(node: ir.Node) -> tuple[ir.Value, Bias] | None:
    """The x [.., N] and the bias [N] that a node adds."""
    if node.op_type != "Add":
        return None
    for source, other in (node.inputs, reversed(node.inputs)):
        bias = constant_of(other)
        if source is not None and constant_of(source) is None and bias is not None and bias.ndim == 1:
            return (source, bias) if _width(source) == len(bias) == _width(node.outputs[0]) else None
    return None


def _sink(graph: ir.Graph, add: ir.Node) -> list[ir.Node] | None:
    """Move one bias past what reads it: the Adds that it became, or None where it stays."""
    found, uses = _biased(add), list(add.outputs[0].uses())
    if found is None or add.outputs[0].is_graph_output() or not uses:
        return None
    source, bias = found
    if all(index == 0 and _is_linear(node) for node, index in uses):
        return [_behind_linear(graph, node, source, index, bias @ weight_of(node)) for node, index in uses]
    step = _STEPS.get(uses[0][0].op_type)
    return None if step is None or len(uses) > 1 else step(graph, *uses[0], source, bias)


def _is_linear(node: ir.Node) -> bool:
    weight = constant_of(node.inputs[1]) if node.op_type == "MatMul" else None
    return node.op_type == "MatMulNBits" or (weight is not None and weight.ndim == 2)


def _behind(graph: ir.Graph, node: ir.Node, source: ir.Value, index: int, bias: Bias) -> ir.Node:
    """Let a node read the source without its bias, and add that to the result."""
    node.replace_input_with(index, source)
    result = node.outputs[0]
    name = f"bias/{result.name}"
    add = ir.node("Add", [result, _constant(graph, name, bias)], name=name)
    add.outputs[0].name = f"{name}_out"
    graph.insert_after(node, add)
    replace_value(graph, result, add.outputs[0])
    add.replace_input_with(0, result)
    return add


def _behind_linear(graph: ir.Graph, node: ir.Node, source: ir.Value, index: int, bias: Bias) -> ir.Node:
    """The same; the result's shape, which a low-rank branch lacks within itself, follows from the bias."""
    if node.outputs[0].shape is None and source.shape is not None:
        node.outputs[0].shape = ir.Shape([*source.shape[:-1], len(bias)])
    return _behind(graph, node, source, index, bias)


def _past(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    return [_behind(graph, node, source, index, bias)] if _width(node.outputs[0]) == len(bias) else None


def _past_move(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    """Past a Reshape that keeps the last side."""
    return _past(graph, node, index, source, bias) if index == 0 else None


def _past_transpose(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    order = node.attributes.get("perm")
    keeps = order is not None and order.as_ints()[-1] == len(order.as_ints()) - 1
    return _past(graph, node, index, source, bias) if keeps else None


def _past_axes(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    """Past a Slice or a ReduceMax over other axes than the last."""
    axes = constant_of(node.inputs[_AXES[node.op_type]]) if len(node.inputs) > _AXES[node.op_type] else None
    if axes is None or not axes.size or source.shape is None or index != 0:
        return None
    last = len(source.shape) - 1
    return None if any(axis % (last + 1) == last for axis in axes) else _past(graph, node, index, source, bias)


def _past_add(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    other = constant_of(node.inputs[1 - index])
    if other is None:
        return _past(graph, node, index, source, bias)
    node.replace_input_with(index, source)
    node.replace_input_with(1 - index, _constant(graph, f"{node.outputs[0].name}/bias", other + bias))
    return [node]


def _into_norm(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    if index > 1:
        return None
    given = node.inputs[NORM_BIAS] if len(node.inputs) > NORM_BIAS else None
    own = np.zeros_like(bias) if given is None else constant_of(given)
    if own is None:
        return None
    node.resize_inputs(NORM_BIAS + 1)
    node.replace_input_with(index, source)
    node.replace_input_with(NORM_BIAS, _constant(graph, f"{node.outputs[0].name}/bias", own + bias))
    return []


def _past_attention(graph: ir.Graph, node: ir.Node, index: int, source: ir.Value, bias: Bias) -> list[ir.Node] | None:
    if index == VALUES:
        return _past(graph, node, index, source, bias)
    if index != KEYS:
        return None
    node.replace_input_with(index, source)
    return []


Step = Callable[[ir.Graph, ir.Node, int, ir.Value, Bias], list[ir.Node] | None]
_AXES = {"Slice": 3, "ReduceMax": 1}  # the input that names them
_STEPS: dict[str, Step] = {
    "Reshape": _past_move,
    "Transpose": _past_transpose,
    "Slice": _past_axes,
    "ReduceMax": _past_axes,
    "Add": _past_add,
    "SkipLayerNormalization": _into_norm,
    "MultiHeadAttention": _past_attention,
}


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A constant, numbered, for a sum may grow step by step."""
    return add_initializer(graph, f"{name}/{len(graph.initializers)}", array)


def _width(value: ir.Value) -> int | None:
    """The last side, where it is a number."""
    last = None if value.shape is None or not len(value.shape) else value.shape[-1]
    return last if isinstance(last, int) else None
