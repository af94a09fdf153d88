"""Rewrites for the fused operators of ONNX Runtime (domain com.microsoft), exact but for the order of float sums.

| function             | this                                           | becomes                                    |
|----------------------|------------------------------------------------|--------------------------------------------|
| fuse_attention       | softmax(s · q kᵀ) v, [B, heads, tokens, d]     | MultiHeadAttention, [B, tokens, heads · d] |
| add_bias_last        | (x W + bias) + branch                          | (x W + branch) + bias                      |
| fuse_skip_layer_norm | LayerNormalization(x + y), or x + (y + bias)   | SkipLayerNormalization, with the sum       |
| pair_maxima          | ReduceMax over axes of side 2                  | Split and Max, an axis at a time           |

Attention has one scale s: constants that multiply q, k or the scores are drawn into it, also from in front of a
reshape or a maximum (s · max(q) = max(s · q) for s > 0). MultiHeadAttention takes fewer queries than keys. The CUDA
provider runs [B, tokens, heads · d] without mask and bias in flash attention as it stands, for every d up to 256 that
8 divides, and in memory-efficient attention otherwise (contrib_ops/cuda/bert/multihead_attention.cc).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from samq.export.graph import add_initializer, constant_of, int_attribute, producer, remove_unused, replace_value

CONTRIB = "com.microsoft"
HEADS_FIRST = (0, 2, 1, 3)  # [B, tokens, heads, d] ↔ [B, heads, tokens, d]

Sides = tuple[int | str, ...]


@dataclass(frozen=True)
class Rewrite:
    """What one rewrite did to a graph.

    Args:
        name: the function.
        count: places that it rewrote.
        refused: a line for each place that looks alike and stayed as it is: its node, and why.
    """

    name: str
    count: int
    refused: tuple[str, ...] = ()


class _NoMatch(Exception):
    """Why a place is not what a rewrite looks for."""


def fuse_attention(model: ir.Model) -> Rewrite:
    """Replace every scaled dot-product attention by one MultiHeadAttention, in place."""
    return _everywhere(model, "fuse_attention", "Softmax", _fuse_attention)


def add_bias_last(model: ir.Model) -> Rewrite:
    """Add biases behind low-rank branches instead of in front, where fused operators can take them; in place."""
    return _everywhere(model, "add_bias_last", "Add", _add_bias_last)


def fuse_skip_layer_norm(model: ir.Model) -> Rewrite:
    """Draw the residual sum in front of a LayerNormalization, and a bias in front of that, into it; in place."""
    return _everywhere(model, "fuse_skip_layer_norm", "LayerNormalization", _fuse_skip_layer_norm)


def pair_maxima(model: ir.Model) -> Rewrite:
    """Take the maximum of two halves instead of reducing an axis of side 2, in place.

    The CUDA provider leaves ReduceMax to cuDNN's general reduction; Split and Max are elementwise kernels.
    """
    return _everywhere(model, "pair_maxima", "ReduceMax", _pair_maxima)


def _everywhere(model: ir.Model, name: str, op: str, rewrite: Callable[[ir.Graph, ir.Node], bool]) -> Rewrite:
    """Try a rewrite at every node of a type. It returns whether there was something to do, or raises `_NoMatch`."""
    count, refused = 0, []
    for node in [node for node in model.graph if node.op_type == op and not node.domain]:
        try:
            count += rewrite(model.graph, node)
        except _NoMatch as reason:
            refused.append(f"{_name(node)}: {reason}")
    model.graph.opset_imports[CONTRIB] = 1
    remove_unused(model)
    return Rewrite(name, count, tuple(refused))


# ---------------------------------------------------------------------------------------------------------- attention


def _fuse_attention(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores, scale = _unscaled(softmax.inputs[0])
    product = producer(scores, "MatMul")
    weighted = _sole_consumer(softmax.outputs[0], "MatMul")
    if weighted is None or weighted.inputs[0] is not softmax.outputs[0]:
        return False
    if product is None:
        raise _NoMatch("its scores are no product of queries and keys; a mask may be added to them")
    if int_attribute(softmax, "axis", -1) not in (-1, 3):
        raise _NoMatch("it is not over the last axis")
    query, query_scale = _unscaled(product.inputs[0])
    key, key_scale = _keys(product.inputs[1])
    query, value = _heads_last(query), _heads_last(weighted.inputs[1])
    back = _sole_consumer(_past_idle_reshape(weighted.outputs[0]), "Transpose")
    if back is None or _permutation(back) != HEADS_FIRST:
        raise _NoMatch("its result is not transposed to [B, tokens, heads, d]")
    heads, width = _heads(query)
    if _heads(key) != (heads, width) or _heads(value)[0] != heads:
        raise _NoMatch("queries, keys and values differ in their heads")
    scale *= query_scale * key_scale * _absorbed_scale(query) * _absorbed_scale(key)
    operands = [_merged(graph, softmax, part, name) for part, name in ((query, "q"), (key, "k"), (value, "v"))]
    sides = _sides_of(query)
    attended = _insert(
        graph, softmax, "MultiHeadAttention", operands, f"{_name(softmax)}/attention", domain=CONTRIB, like=value,
        shape=ir.Shape([*sides[:2], heads * _heads(value)[1]]), num_heads=heads, scale=scale,
    )  # fmt: skip
    _replace_heads(graph, back, attended, heads, _heads(value)[1])
    return True


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a scalar constant multiplies or divides, and the factor; the value itself and 1 otherwise."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for constant, other in ((node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])):
        number = constant_of(constant)
        if number is not None and number.size == 1 and not (node.op_type == "Div" and constant is node.inputs[0]):
            return other, float(number.item()) if node.op_type == "Mul" else 1 / float(number.item())
    return value, 1.0


def _keys(value: ir.Value | None) -> tuple[ir.Value, float]:
    """The keys [B, tokens, heads, d] behind transposed ones [B, heads, d, tokens], and their scale."""
    value, scale = _unscaled(value)
    turned = producer(value, "Transpose")
    if turned is not None and _permutation(turned) == (0, 2, 3, 1):
        assert turned.inputs[0] is not None
        return turned.inputs[0], scale
    if turned is None or _permutation(turned) != (0, 1, 3, 2):
        raise _NoMatch("its keys are not transposed")
    inner, more = _unscaled(turned.inputs[0])
    return _heads_last(inner), scale * more


def _heads_last(value: ir.Value | None) -> ir.Value:
    """[B, tokens, heads, d] behind a value [B, heads, tokens, d]."""
    turned = producer(value, "Transpose")
    if turned is None or _permutation(turned) != HEADS_FIRST or turned.inputs[0] is None:
        name = "nothing" if value is None else value.name
        raise _NoMatch(f"{name} is not transposed from [B, tokens, heads, d]")
    return turned.inputs[0]


def _heads(value: ir.Value) -> tuple[int, int]:
    """Heads and the width of each, of a value [B, tokens, heads, d]."""
    _, _, heads, width = _sides_of(value)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise _NoMatch("its number of heads is dynamic")
    return heads, width


def _past_idle_reshape(value: ir.Value) -> ir.Value:
    """The result of a Reshape to the same shape, where that alone reads the value; else the value."""
    reshape = _sole_consumer(value, "Reshape")
    return reshape.outputs[0] if reshape is not None and _same_shape(reshape.outputs[0].shape, value.shape) else value


def _absorbed_scale(value: ir.Value) -> float:
    """Drop a positive scalar factor in front of reshapes, transposes and maxima that lead here alone; returns it."""
    while True:
        node = value.producer()
        if node is None or not _is_read_once(value):
            return 1.0
        source, scale = _unscaled(value)
        if source is not None and source is not value:
            if scale <= 0:
                return 1.0
            ir.convenience.replace_all_uses_with(value, source)
            return scale
        if node.op_type not in ("Reshape", "Transpose", "ReduceMax") or node.inputs[0] is None:
            return 1.0
        value = node.inputs[0]


def _merged(graph: ir.Graph, anchor: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """[B, tokens, heads · d] of a value [B, tokens, heads, d], past the Reshape that it came from."""
    heads, width = _heads(value)
    shape = ir.Shape([*_sides_of(value)[:2], heads * width])
    target: Sequence[int] = (0, 0, heads * width)
    source, allow_zero = value, 0
    reshape = producer(value, "Reshape")
    if reshape is not None and reshape.inputs[0] is not None:
        origin, sides = reshape.inputs[0], constant_of(reshape.inputs[1])
        if _same_shape(origin.shape, shape):
            return origin
        if sides is not None:
            source, target = origin, (*(int(side) for side in sides[:2]), heads * width)
            allow_zero = int_attribute(reshape, "allowzero", 0)
    return _reshape(graph, anchor, source, target, shape, f"{_name(anchor)}/{name}", allow_zero)


def _replace_heads(graph: ir.Graph, back: ir.Node, attended: ir.Value, heads: int, width: int) -> None:
    """Let what reads [B, tokens, heads, d] behind `back` read the merged result; reshapes of it read it directly."""
    whole = back.outputs[0]
    reshapes = all(node.op_type == "Reshape" and _ignores_input_sides(node) for node in whole.consumers())
    if reshapes and not whole.is_graph_output():
        ir.convenience.replace_all_uses_with(whole, attended)
        return
    four = _reshape(graph, back, attended, (0, 0, heads, width), whole.shape, f"{_name(back)}/heads")
    replace_value(graph, whole, four)


def _ignores_input_sides(reshape: ir.Node) -> bool:
    """No side of a Reshape's result is copied from its input."""
    sides = constant_of(reshape.inputs[1])
    return bool(int_attribute(reshape, "allowzero", 0)) or (sides is not None and bool((sides != 0).all()))


# ------------------------------------------------------------------------------------------------ biases, norms


def _add_bias_last(graph: ir.Graph, outer: ir.Node) -> bool:
    first, branch = outer.inputs
    inner, found = producer(first, "Add"), _biased(first)
    if inner is None or found is None or producer(branch, "MatMul") is None:
        return False
    product, bias = found
    result = outer.outputs[0]
    last = ir.node("Add", [product, bias], name=inner.name)
    last.metadata_props.update(inner.metadata_props)
    last.outputs[0].name = f"{result.name}_biased"
    graph.insert_after(outer, last)
    outer.replace_input_with(0, product)
    replace_value(graph, result, last.outputs[0])
    last.replace_input_with(0, result)
    return True


def _fuse_skip_layer_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    add = producer(norm.inputs[0], "Add")
    if add is None:
        return False
    total = add.outputs[0]
    sides = _sides_of(total)
    if len(sides) != 3:
        raise _NoMatch(f"it normalizes {len(sides)} axes, SkipLayerNormalization takes [B, tokens, width]")
    if int_attribute(norm, "axis", -1) not in (-1, len(sides) - 1):
        raise _NoMatch("it is not over the last axis")
    if any(value is None or not _same_shape(value.shape, total.shape) for value in add.inputs):
        raise _NoMatch("its summands differ in shape")
    if any(constant_of(value) is None for value in norm.inputs[1:]):
        raise _NoMatch("its gain or its bias is computed")
    skip, (branch, bias) = add.inputs[0], _biased(add.inputs[1]) or (add.inputs[1], None)
    operands = [skip, branch, norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None, bias]
    while operands[-1] is None:
        operands.pop()
    epsilon = norm.attributes.get("epsilon")
    node = ir.node(
        "SkipLayerNormalization", operands, {"epsilon": 1e-5 if epsilon is None else epsilon.as_float()},
        domain=CONTRIB, num_outputs=4, name=f"{_name(norm)}/fused",
    )  # fmt: skip
    # of the four outputs the second and third, mean and deviation, are not asked for and have no name
    for output, old, name in ((node.outputs[0], norm.outputs[0], "normed"), (node.outputs[3], total, "sum")):
        output.name, output.type, output.shape = f"{_name(norm)}/{name}", old.type, old.shape
    node.outputs[1].name = node.outputs[2].name = ""
    graph.insert_before(add, node)
    replace_value(graph, norm.outputs[0], node.outputs[0])
    replace_value(graph, total, node.outputs[3])
    return True


def _pair_maxima(graph: ir.Graph, reduce: ir.Node) -> bool:
    value, axes = reduce.inputs[0], constant_of(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    if value is None or value.shape is None or axes is None or int_attribute(reduce, "keepdims", 1):
        raise _NoMatch("its axes are not known, or kept")
    rank, result = len(value.shape), reduce.outputs[0]
    ordered = sorted((int(axis) % rank for axis in axes), reverse=True)
    if any(value.shape[axis] != 2 for axis in ordered):
        raise _NoMatch("its axes are not of side 2")
    for axis in ordered:
        shape = ir.Shape([1 if index == axis else side for index, side in enumerate(value.shape)])
        name = f"{_name(reduce)}/{axis}"
        split = ir.node("Split", [value], {"axis": axis, "num_outputs": 2}, num_outputs=2, name=f"{name}/split")
        for half, output in enumerate(split.outputs):
            output.name, output.type, output.shape = f"{name}/half{half}", value.type, shape
        graph.insert_before(reduce, split)
        value = _insert(graph, reduce, "Max", split.outputs, f"{name}/max", like=value, shape=shape)
    sides = add_initializer(graph, f"{_name(reduce)}/axes", np.array(ordered))
    replace_value(
        graph, result,
        _insert(graph, reduce, "Squeeze", [value, sides], f"{_name(reduce)}/squeezed", like=result, shape=result.shape),
    )  # fmt: skip
    return True


def _biased(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The x [.., N] and bias [N] of a sum that is read in one place."""
    add = producer(value, "Add")
    if add is None or value is None or not _is_read_once(value):
        return None
    source, bias = add.inputs
    constant = constant_of(bias)
    if source is None or bias is None or constant is None or constant.ndim != 1 or source.shape is None:
        return None
    return (source, bias) if source.shape[-1] == constant.shape[0] else None


# -------------------------------------------------------------------------------------------------------------- tools


def _insert(
    graph: ir.Graph, anchor: ir.Node, op: str, inputs: Sequence[ir.Value | None], name: str, *, like: ir.Value,
    shape: ir.Shape | None, domain: str = "", **attributes: Any,
) -> ir.Value:  # fmt: skip
    """Insert a node in front of `anchor`, its metadata that of `anchor`; returns its output, of the type of `like`."""
    node = ir.node(op, inputs, attributes, domain=domain, name=name)
    node.metadata_props.update(anchor.metadata_props)
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{name}_out", like.type, shape
    graph.insert_before(anchor, node)
    return output


def _reshape(
    graph: ir.Graph, anchor: ir.Node, value: ir.Value, target: Sequence[int], shape: ir.Shape | None, name: str,
    allow_zero: int = 0,
) -> ir.Value:  # fmt: skip
    sides = add_initializer(graph, f"{name}/sides", np.array(target))
    return _insert(graph, anchor, "Reshape", [value, sides], name, like=value, shape=shape, allowzero=allow_zero)


def _sole_consumer(value: ir.Value, op: str) -> ir.Node | None:
    """The node of type `op` that alone reads a value."""
    users = value.consumers()
    return users[0] if _is_read_once(value) and users[0].op_type == op else None


def _is_read_once(value: ir.Value) -> bool:
    """One input of one node reads a value, and no caller does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _name(node: ir.Node) -> str:
    """The name of its first result, which no other node shares."""
    return str(node.outputs[0].name)


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    attribute = transpose.attributes.get("perm")
    return () if attribute is None else tuple(attribute.as_ints())


def _shape_sides(shape: ir.Shape) -> Sides:
    """Sides of a shape: numbers, and names of dynamic sides.

    Raises:
        _NoMatch: a side is not known at all.
    """
    sides = [side if isinstance(side, int) else side.value for side in shape]
    if None in sides:
        raise _NoMatch("a shape is not known")
    return tuple(side for side in sides if side is not None)


def _sides_of(value: ir.Value) -> Sides:
    """See `_shape_sides`; also when the value has no shape."""
    if value.shape is None:
        raise _NoMatch(f"the shape of {value.name} is not known")
    return _shape_sides(value.shape)


def _same_shape(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Both are known, and equal."""
    if one is None or other is None or None in (*one.dims, *other.dims):
        return False
    return one == other and all(isinstance(side, int) or side.value is not None for side in one)
