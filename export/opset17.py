"""A graph of opset 21 → the same graph in opset 17, the newest that TensorRT 8.6 imports.

| newer form                              | in opset 17                                                                |
|-----------------------------------------|----------------------------------------------------------------------------|
| Gelu (20)                               | x · (1 + Erf(x / √2)) · ½, in the order that TensorRT fuses                |
| axes of Reduce operators as input (18)  | attribute                                                                  |
| axes of Pad (18)                        | pads of every axis                                                         |
| num_outputs of Split (18)               | sizes of the parts                                                         |
| attributes with their default value     | left out                                                                   |

Whatever else opset 17 does not have is refused; the onnx version converter has no way back from 18 for Pad and others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.graph import (
    LAYER_KEY,
    add_initializer,
    constant_of,
    int_attribute,
    remove_unused,
    replace_value,
)

OPSET, IR_VERSION = 17, 8
AXES_AS_ATTRIBUTE = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
                     "ReduceProd", "ReduceSumSquare")  # fmt: skip


def to_opset17(model: ir.Model) -> ir.Model:
    """Rewrite a float32 model of a newer opset in place.

    Args:
        model: its types and shapes are known, without subgraphs.

    Raises:
        ValueError: a node has no form in opset 17; the message names it (a bug).
    """
    newer = model.opset_imports[""]
    for node in [node for node in model.graph if not node.domain]:
        if node.op_type == "Gelu":
            _expand_gelu(model.graph, node)
            continue
        if node.op_type in AXES_AS_ATTRIBUTE:
            _axes_to_attribute(node)
        elif node.op_type == "Pad":
            _pad_every_axis(model.graph, node)
        elif node.op_type == "Split":
            _split_by_sizes(model.graph, node)
        _without_newer_attributes(node, newer)
    model.opset_imports[""], model.ir_version = OPSET, IR_VERSION
    remove_unused(model)
    return model


def _expand_gelu(graph: ir.Graph, gelu: ir.Node) -> None:
    approximate = gelu.attributes.get("approximate")
    if approximate is not None and approximate.as_string() != "none":
        raise ValueError(f"{gelu.name}: Gelu by tanh has no form in opset {OPSET}")
    x, result = gelu.inputs[0], gelu.outputs[0]
    root, one, half = (
        add_initializer(graph, f"{gelu.name}/{name}", np.array(number, np.float32))
        for name, number in (("root", math.sqrt(2)), ("one", 1), ("half", 0.5))
    )
    value = x
    for op, other in (("Div", root), ("Erf", None), ("Add", one), ("Mul", x), ("Mul", half)):
        operands = [x, value] if other is x else [value] if other is None else [value, other]
        name = f"{gelu.name}/{op}" if other is not half else f"{gelu.name}/half_Mul"
        node = ir.node(op, operands, name=name)
        node.metadata_props.update({k: v for k, v in gelu.metadata_props.items() if k == LAYER_KEY})
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{name}_out", result.type, result.shape
        graph.insert_before(gelu, node)
    assert value is not None
    replace_value(graph, result, value)
    graph.remove(gelu, safe=True)


def _axes_to_attribute(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    node.attributes["axes"] = ir.AttrInt64s("axes", _constant_input(node, 1).tolist())
    node.resize_inputs(1)


def _pad_every_axis(graph: ir.Graph, node: ir.Node) -> None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return
    assert node.inputs[0] is not None
    assert node.inputs[0].shape is not None
    axes, pads = _constant_input(node, 3), _constant_input(node, 1)
    every = np.zeros((2, len(node.inputs[0].shape)), np.int64)
    every[:, axes] = pads.reshape(2, -1)
    node.replace_input_with(1, add_initializer(graph, f"{node.name}/pads", every.reshape(-1)))
    node.resize_inputs(3)


def _split_by_sizes(graph: ir.Graph, node: ir.Node) -> None:
    count = node.attributes.pop("num_outputs", None)
    if count is None or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return
    sizes = [output.shape[int_attribute(node, "axis", 0)] for output in node.outputs if output.shape is not None]
    if len(sizes) != count.as_int() or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"{node.name}: the sizes of its parts are not known, which opset {OPSET} needs")
    node.resize_inputs(2)
    node.replace_input_with(1, add_initializer(graph, f"{node.name}/split", np.array(sizes, np.int64)))


def _constant_input(node: ir.Node, index: int) -> NDArray[Any]:
    array = constant_of(node.inputs[index])
    if array is None:
        raise ValueError(f"{node.name}: input {index} of {node.op_type} is computed, which opset {OPSET} has not")
    return array


def _without_newer_attributes(node: ir.Node, newer: int) -> None:
    """Drop attributes that opset 17 has not, where they say what is the default."""
    try:
        old = onnx.defs.get_schema(node.op_type, OPSET)
    except onnx.defs.SchemaError as error:
        raise ValueError(f"{node.name}: opset {OPSET} has no {node.op_type}") from error
    if len(node.inputs) > len(old.inputs) and not any(
        formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for formal in old.inputs
    ):
        raise ValueError(f"{node.name}: {node.op_type} of opset {OPSET} has {len(old.inputs)} inputs")
    defaults = onnx.defs.get_schema(node.op_type, newer).attributes
    for name in [name for name in node.attributes if name not in old.attributes]:
        default = onnx.helper.get_attribute_value(defaults[name].default_value)
        value = node.attributes[name].value
        if value != (default.decode() if isinstance(default, bytes) else default):
            raise ValueError(f"{node.name}: {node.op_type} of opset {OPSET} has no {name}={value}")
        del node.attributes[name]
