"""Small tools for editing `onnx_ir` graphs, shared by everything that writes ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

LAYER_KEY = "samq.layer"
ROLE_KEY = "samq.role"
LOW_RANK = "low_rank"  # role of the nodes of a low-rank branch, and the first part of their names
PRECISION_KEY = "samq.precision"  # of nodes that FP16 spoils: "float32"
PAD_VALUE = 2  # input of Pad
REGROUPING = ("Reshape", "Squeeze", "Unsqueeze")  # move no element, but the borders between axes


class Writer:
    """Writes the nodes of one layer in front of an anchor node.

    Every node and initializer is called `<layer>/<name>` and carries the layer (and its role) in its metadata.

    Args:
        graph: the graph to write to.
        anchor: nodes go in front of this one.
        layer: name of the layer that they compute.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, layer: str) -> None:
        self.graph, self.anchor, self.layer = graph, anchor, layer

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        role: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Insert a node; returns its output."""
        node = ir.node(op, inputs, attributes, domain=domain, name=f"{self.layer}/{name}")
        node.metadata_props[LAYER_KEY] = self.layer
        if role:
            node.metadata_props[ROLE_KEY] = role
        output = node.outputs[0]
        output.name = f"{self.layer}/{name}_out"
        output.type = None if dtype is None else ir.TensorType(dtype)
        output.shape = shape
        self.graph.insert_before(self.anchor, node)
        return output

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Add an initializer; its element type is the array's (ml_dtypes' int4 and uint4 included)."""
        return add_initializer(self.graph, f"{self.layer}/{name}", array)


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register a constant tensor with the graph.

    Raises:
        ValueError: there is one of that name.
    """
    if name in graph.initializers:
        raise ValueError(f"there is an initializer called {name} already")
    tensor = ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Make every consumer of `old` read `new`; a graph output keeps its name."""
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type if new.type is not None else old.type
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}_replaced"
            graph.outputs[index] = new
    ir.convenience.replace_all_uses_with(old, new)


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The array behind an initializer, or behind the Cast of one; None for anything else."""
    cast = producer(value, "Cast")
    if cast is not None:
        stored = constant_of(cast.inputs[0])
        return None if stored is None else stored.astype(ir.DataType(int_attribute(cast, "to", 0)).numpy())
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that computes `value`, when it is of type `op`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Integer attribute of a node."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def pads_with_a_constant(pad: ir.Node) -> bool:
    """What a Pad fills up with is one value, known or not."""
    mode = pad.attributes.get("mode")
    return mode is None or mode.as_string() == "constant"


def pads_with_zeros(pad: ir.Node) -> bool:
    """What a Pad fills up with is known to be zero."""
    given = pad.inputs[PAD_VALUE] if len(pad.inputs) > PAD_VALUE else None
    filling = constant_of(given)
    return pads_with_a_constant(pad) and (given is None or (filling is not None and not filling.any()))


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that no output depends on, and unused opset imports."""
    for step in (common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass()):
        step(model)
