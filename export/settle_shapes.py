"""Shapes with dynamic sides, said by the graph as far as they are known instead of computed while running; exact.

| graph                                                             | becomes                                        |
|-------------------------------------------------------------------|------------------------------------------------|
| Reshape to computed sides                                         | to constants: 0 copies a side, −1 is the last  |
| … of which two are neither copied nor numbers, sides of 1 apart   | Squeeze, Unsqueeze                             |
| Reshape → Transpose → Reshape that turns the last two of four axes | Transpose                                     |
| Reshape back to the shape before others, Expand that repeats nothing, Identity | nothing                           |
| Expand along a named side, read by an operator that broadcasts    | nothing                                        |

Sides are compared by number or by name, which the exporter gives to equal sides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from samq.export.graph import REGROUPING, Writer, int_attribute, producer, remove_unused, replace_value

Side = int | str
Sides = tuple[Side, ...]

BROADCASTING = ("Add", "Sub", "Mul", "Div", "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")


def settle_shapes(model: ir.Model) -> ir.Model:
    """Rewrite in place (the table above); what is not known stays as it is."""
    graph = model.graph
    for node in [node for node in graph if not node.domain]:
        if node.op_type in BROADCASTING:
            _read_unrepeated(node)
        settle = _SETTLED.get(node.op_type)
        new = None if settle is None else settle(Writer(graph, node, str(node.name)), node)
        if new is not None and not node.outputs[0].is_graph_output():
            replace_value(graph, node.outputs[0], new)
    remove_unused(model)
    return model


def _identity(writer: Writer, node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _expand(writer: Writer, node: ir.Node) -> ir.Value | None:
    source, sides = node.inputs[0], _sides(node.outputs[0])
    return source if sides is not None and _sides(source) == sides else None


def _reshape(writer: Writer, node: ir.Node) -> ir.Value | None:
    source, target = node.inputs
    assert source is not None
    turned = _turned(writer, node)
    if turned is not None:
        return turned
    before, after = _sides(source), _sides(node.outputs[0])
    if before is None or after is None:
        return None
    same = _earlier(source, after)
    if same is not None:
        return same
    if _numbers(target) is not None:
        return None
    constant = _constant_sides(before, after)
    if constant is not None:
        node.replace_input_with(1, writer.constant(np.array(constant), "sides"))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        return None
    return _without_and_with_ones(writer, source, before, after) if _large(before) == _large(after) else None


_SETTLED: Mapping[str, Callable[[Writer, ir.Node], ir.Value | None]] = {
    "Identity": _identity,
    "Expand": _expand,
    "Reshape": _reshape,
}


def _constant_sides(before: Sides, after: Sides) -> list[int] | None:
    """Sides for Reshape, None where more than one would have to be computed."""
    named = [index for index, side in enumerate(after) if isinstance(side, str)]
    copied = [index for index in named if index < len(before) and before[index] == after[index]]
    computed = [index for index in named if index not in copied]
    if len(named) == 1:
        copied, computed = [], named
    if len(computed) > 1:
        return None
    special = dict.fromkeys(copied, 0) | dict.fromkeys(computed, -1)
    return [special[index] if isinstance(side, str) else side for index, side in enumerate(after)]


def _without_and_with_ones(writer: Writer, value: ir.Value, before: Sides, after: Sides) -> ir.Value:
    """Drop the sides of 1 that `before` has, and add those of `after`."""
    for op, sides, result in (("Squeeze", before, _large(before)), ("Unsqueeze", after, after)):
        ones = [index for index, side in enumerate(sides) if side == 1]
        if ones:
            axes = writer.constant(np.array(ones), f"axes_{op}")
            value = writer.node(op, [value, axes], op, dtype=value.dtype, shape=ir.Shape(result))
    return value


def _turned(writer: Writer, outer: ir.Node) -> ir.Value | None:
    """[A, B, D, C] of a value [A, B, C, D], where that is what Reshape → Transpose → Reshape gives."""
    transpose = producer(outer.inputs[0], "Transpose")
    inner = None if transpose is None else producer(transpose.inputs[0], "Reshape")
    source = None if inner is None else inner.inputs[0]
    sides = _sides(source)
    if transpose is None or inner is None or source is None or sides is None or len(sides) != 4:
        return None
    first, second, height, width = sides
    flat, full = _told(inner.inputs[1]), _told(outer.inputs[1])
    turns = tuple(transpose.attributes["perm"].as_ints()) == (0, 2, 1)
    if not turns or flat is None or flat[1:] != (height, width) or full != (first, second, width, height):
        return None
    shape = ir.Shape([first, second, width, height])
    return writer.node("Transpose", [source], "turned", dtype=source.dtype, shape=shape, perm=(0, 1, 3, 2))


def _earlier(value: ir.Value, sides: Sides) -> ir.Value | None:
    """The value itself or one that it was regrouped from, if it has these sides."""
    while _sides(value) != sides:
        node = value.producer()
        if node is None or node.op_type not in REGROUPING or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value


def _read_unrepeated(node: ir.Node) -> None:
    """Let an operator that broadcasts read what an input only repeats, where its result keeps its shape."""
    for index, value in enumerate(node.inputs):
        source = _unrepeated(value)
        operands = [_sides(source if place == index else other) for place, other in enumerate(node.inputs)]
        if source is not value and _broadcast(operands) == _sides(node.outputs[0]):
            node.replace_input_with(index, source)


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """The earliest value that broadcasting makes `value` of: it differs in sides of 1 and in what Expand repeats.

    Behind regrouped sides only those repeated by name are known again.
    """
    sides, found = _sides(value), value
    regrouped, by_name = False, True
    while value is not None and sides is not None:
        node = value.producer()
        if node is None or node.op_type not in (*REGROUPING, "Expand"):
            break
        regrouped, by_name = regrouped or node.op_type != "Expand", by_name and _keeps_order(node)
        if regrouped and not by_name:
            break
        value = node.inputs[0]
        earlier = _sides(value) or ()
        if len(earlier) <= len(sides) and _broadcast([earlier, sides]) == sides:
            found = value
    return found


def _keeps_order(node: ir.Node) -> bool:
    """A node adds and drops sides of 1, or repeats along sides whose names its input has not."""
    before, after = _sides(node.inputs[0]), _sides(node.outputs[0])
    if before is None or after is None:
        return False
    added = [side for side in after if side not in before and isinstance(side, str)] if node.op_type == "Expand" else []
    return _large(before) == tuple(side for side in _large(after) if side not in added)


def _broadcast(operands: list[Sides | None]) -> Sides | None:
    """Sides of the result of an operator that broadcasts; None where they are not known."""
    known = [sides for sides in operands if sides is not None]
    if len(known) < len(operands):
        return None
    rank = max(len(sides) for sides in known)
    columns = zip(*((1,) * (rank - len(sides)) + sides for sides in known), strict=True)
    large = [dict.fromkeys(_large(column)) for column in columns]
    return None if any(len(sides) > 1 for sides in large) else tuple(next(iter(sides), 1) for sides in large)


def _large(sides: Sides) -> Sides:
    """All but the sides of 1."""
    return tuple(side for side in sides if side != 1)


def _sides(value: ir.Value | None) -> Sides | None:
    """Sides of a value: numbers and names; None where one is not known."""
    if value is None or value.shape is None:
        return None
    sides = tuple(side if isinstance(side, int) else side.value for side in value.shape)
    return None if None in sides else tuple(side for side in sides if side is not None)


def _told(value: ir.Value | None) -> Sides | None:
    """What a vector of sides holds, computed by Shape, Slice and Concat; None where something else computes it."""
    numbers = _numbers(value)
    node = None if value is None else value.producer()
    if numbers is not None or node is None:
        return numbers
    if node.op_type == "Shape":
        sides = _sides(node.inputs[0]) or ()
        return sides[int_attribute(node, "start", 0) : int_attribute(node, "end", len(sides))] or None
    if node.op_type == "Concat":
        parts = [_told(part) for part in node.inputs]
        return None if None in parts else tuple(side for part in parts for side in part or ())
    if node.op_type == "Slice" and len(node.inputs) == 3:
        whole, start, end = (_told(operand) for operand in node.inputs)
        if whole is not None and start is not None and end is not None:
            return whole[int(start[0]) : int(end[0])]
    return None


def _numbers(value: ir.Value | None) -> tuple[int, ...] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(int(number) for number in tensor.numpy().reshape(-1))
