"""Tokens and windows that do not see each other run a few at a time, so that their activations stay in cache.

The hidden layer of the first block of SAM2 takes 100 MB at 1024×1024, and each operator reads and writes it as a whole:
memory decides, not arithmetic. From a normalization on, each window is computed by itself until the windows are joined,
and without attention each token, so a Scan over equal groups of them gives the same numbers, bit for bit, while what
passes between its operators is small enough for the second level of cache. The encoder of SAM2.1-tiny takes 10 % less
time with it.

Values are [images, n, …], "whole", or [images · L, …], "in rows" (windows, for one). Data are contiguous, so the k-th
of G parts of an image is its k-th range of n / G or of L / G. Operators that keep that order and see a token, or a
row, alone belong to the Scan; the others end it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from samq.export.fuse_attention import Rewrite
from samq.export.graph import Writer, constant_of, int_attribute, remove_unused

CACHE = 4 << 20  # bytes that the largest value of one step may take; 2 to 8 MiB are as fast, with 2 MiB of cache a core
WORTHWHILE = 4  # caches that a value takes before it is worth a Scan, which copies what goes in and out
FLOAT_BYTES = 4
WHOLE = 1  # rows an image of values that are not in rows

ELEMENTWISE = ("Add", "Cast", "Div", "Gelu", "Max", "Mul", "Neg", "QuantizeLinear")
REDUCTIONS = ("ReduceMax", "ReduceMin")
PRODUCTS = ("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")


@dataclass(frozen=True)
class _Region:
    """What goes into the Scan.

    Args:
        entry: the one value that it reads, whole.
        rows: by value, how many rows of its leading axis belong to an image.
        nodes: in order.
    """

    entry: ir.Value
    rows: Mapping[ir.Value, int]
    nodes: tuple[ir.Node, ...]

    def per_image(self, value: ir.Value) -> int:
        """Elements of a value that belong to an image."""
        return self.rows[value] * prod(_rest(value))

    def largest(self, *, inner: bool) -> int:
        """Bytes an image of the largest value; `inner`: of those that nothing outside reads."""
        left_out = {self.entry, *self.outputs} if inner else set[ir.Value]()
        return max((FLOAT_BYTES * self.per_image(value) for value in self.rows if value not in left_out), default=0)

    @property
    def outputs(self) -> list[ir.Value]:
        """What others read."""
        inside = set(self.nodes)
        results = [node.outputs[0] for node in self.nodes]
        return [v for v in results if v.is_graph_output() or any(node not in inside for node in v.consumers())]


def keep_in_cache(model: ir.Model, cache: int = CACHE) -> Rewrite:
    """Put what starts at normalizations of tokens into Scans, in place, where that pays; counts their operators.

    Args:
        cache: bytes, see `CACHE`. What has no inner value that takes `WORTHWHILE` times as much stays as it is.
    """
    count, tried = 0, set[ir.Value]()
    while (entry := _next_entry(model.graph, tried)) is not None:
        tried.add(entry)
        region = _region(model.graph, entry)
        if region.nodes and region.largest(inner=True) >= WORTHWHILE * cache:
            parts = _parts(region, cache)
            if parts > 1 and not any(value.is_graph_output() for value in region.outputs):
                _scan(model, region, parts)
                count += len(region.nodes)
    remove_unused(model)
    return Rewrite("keep_in_cache", count)


def _next_entry(graph: ir.Graph, tried: set[ir.Value]) -> ir.Value | None:
    """The first value [images, n, C] that is normalized and was not tried."""
    for node in graph:
        value = node.inputs[0] if node.op_type == "LayerNormalization" else None
        if value is None or value in tried or value.shape is None:
            continue
        if len(value.shape) == 3 and len(_rest(value)) == 2:
            return value
    return None


def _region(graph: ir.Graph, entry: ir.Value) -> _Region:
    rows, nodes = {entry: WHOLE}, []
    for node in graph:
        live = [value for value in node.inputs if value is not None and constant_of(value) is None]
        if live and len(node.outputs) == 1 and all(value in rows for value in live):
            found = _rows_behind(node, live, rows)
            if found is not None:
                rows[node.outputs[0]] = found
                nodes.append(node)
    return _Region(entry, rows, tuple(nodes))


def _rows_behind(node: ir.Node, live: list[ir.Value], rows: Mapping[ir.Value, int]) -> int | None:
    """How many rows an image has in a node's result; None where the node cannot be in the Scan."""
    first, result = live[0], node.outputs[0]
    if result.shape is None and node.op_type == "MatMul":
        result.shape = _sides_of_product(node)
    if result.shape is None or len(_rest(result)) != len(result.shape) - 1 or len({rows[value] for value in live}) > 1:
        return None
    constants = [array for value in node.inputs if (array := constant_of(value)) is not None]
    if node.op_type == "Reshape":
        return _rows_of_reshape(node, rows[first] * prod(_rest(first)))
    if node.op_type in ELEMENTWISE:
        takes = all(array.ndim <= 1 for array in constants)
    elif node.op_type in PRODUCTS:
        takes = live[0] is node.inputs[0] and node.inputs[1] not in live
    elif node.op_type == "LayerNormalization":
        takes = int_attribute(node, "axis", -1) in (-1, len(first.shape or ()) - 1)
    elif node.op_type in REDUCTIONS:
        takes = _reduces_inner_axes(node, rows[first])
    else:
        takes = node.op_type == "MultiHeadAttention" and rows[first] != WHOLE
    return rows[first] if takes else None


def _sides_of_product(matmul: ir.Node) -> ir.Shape | None:
    """Those of x with a weight's last one; the graph says them of layers, not of what is within."""
    x, weight = matmul.inputs[0], constant_of(matmul.inputs[1])
    if x is None or x.shape is None or weight is None or weight.ndim != 2:
        return None
    return ir.Shape([*x.shape[:-1], weight.shape[1]])


def _rows_of_reshape(node: ir.Node, per_image: int) -> int | None:
    """Of a Reshape to constant sides, the first of them a number or what remains."""
    target, inner = constant_of(node.inputs[1]), prod(_rest(node.outputs[0]))
    if target is None or not target[0] or (target[1:] <= 0).any() or per_image % inner:
        return None
    return per_image // inner


def _reduces_inner_axes(node: ir.Node, rows: int) -> bool:
    value = node.inputs[0]
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or value is None or value.shape is None:
        return False
    outermost = 1 if rows == WHOLE else 0  # the axes up to it are those of tokens or rows
    return all(int(axis) % len(value.shape) > outermost for axis in axes)


def _parts(region: _Region, cache: int) -> int:
    """The smallest power of two of parts with which every value fits the cache; less where sides do not allow it."""
    largest = region.largest(inner=False)
    divisible = [rows if rows != WHOLE else _rest(value)[0] for value, rows in region.rows.items()]
    parts = 1
    while largest > parts * cache and all(count % (2 * parts) == 0 for count in divisible):
        parts *= 2
    return parts


def _scan(model: ir.Model, region: _Region, parts: int) -> None:
    graph, last = model.graph, region.nodes[-1]
    name = f"{region.entry.name}/in_cache"
    writer = Writer(graph, last, name)
    count, width = _rest(region.entry)
    sides = writer.constant(np.array([-1, 1, count // parts, width]), "sides")
    dtype, outputs = region.entry.dtype, region.outputs
    groups = writer.node(
        "Reshape", [region.entry, sides], "groups", dtype=dtype, shape=ir.Shape([None, 1, count // parts, width])
    )
    group = ir.Value(name=f"{name}/group", type=region.entry.type, shape=ir.Shape([1, count // parts, width]))
    inside = {region.entry: group}
    body = [_copy(node, inside, writer, region, parts) for node in region.nodes]
    results = [inside[value] for value in outputs]
    step = ir.Graph([group], results, nodes=body, name=name, opset_imports=dict(graph.opset_imports))
    scan = ir.node(
        "Scan", [groups], {"num_scan_inputs": 1, "body": step}, num_outputs=len(outputs), name=f"{name}/Scan"
    )
    graph.insert_after(last, scan)
    for value, grouped in zip(outputs, scan.outputs, strict=True):
        grouped.name, grouped.type = f"{value.name}/grouped", value.type
        _join(graph, scan, grouped, value)
    graph.remove(region.nodes, safe=True)
    common.TopologicalSortPass()(model)


def _copy(node: ir.Node, inside: dict[ir.Value, ir.Value], writer: Writer, region: _Region, parts: int) -> ir.Node:
    """A node of the Scan's body, which works on one part of one image."""
    inputs = [None if value is None else inside.get(value, value) for value in node.inputs]
    result = node.outputs[0]
    whole = region.rows[result] == WHOLE
    rest = _rest(result)
    if node.op_type == "Reshape":
        sides = [rest[0] // parts, *rest[1:]] if whole else rest
        inputs[1] = writer.constant(np.array([-1, *sides]), f"sides/{result.name}")
    copied = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name=node.name)
    copied.metadata_props.update(node.metadata_props)
    output = copied.outputs[0]
    output.name, output.type = f"{result.name}/group", result.type
    output.shape = ir.Shape([1, rest[0] // parts, *rest[1:]] if whole else [region.rows[result] // parts, *rest])
    inside[result] = output
    return copied


def _join(graph: ir.Graph, scan: ir.Node, grouped: ir.Value, value: ir.Value) -> None:
    """Let what reads a value outside of the Scan read the groups of it, joined."""
    users = [(node, index) for node, index in value.uses() if node.graph is graph]
    writer = Writer(graph, scan, str(value.name))
    sides = writer.constant(np.array([-1, *_rest(value)]), "joined_sides")
    joined = ir.node("Reshape", [grouped, sides], name=f"{value.name}/joined")
    output = joined.outputs[0]
    output.name, output.type, output.shape = f"{value.name}/joined", value.type, value.shape
    graph.insert_after(scan, joined)
    for node, index in users:
        node.replace_input_with(index, output)


def _rest(value: ir.Value) -> tuple[int, ...]:
    """All sides but the first, as far as they are numbers."""
    sides = () if value.shape is None else tuple(value.shape)[1:]
    return tuple(side for side in sides if isinstance(side, int))
