"""LayerNormalization written out: y = (x − mean x) / √(mean (x − mean x)² + ε) · gain + bias.

TensorRT 8.6 compiles a fused region in FP16 or not at all, and where INT8 is on it finds no types for the product of a
LayerNormalization's float32 result with its FP16 gain ("Could not infer output types for operation: mul", verbose log
of 8.6.0). So every region with Q/DQ ran in float32, its attention too. Written out, the region compiles in FP16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from samq.export.graph import PRECISION_KEY, Writer, constant_of, int_attribute, remove_unused, replace_value

FLOAT = ir.DataType.FLOAT
DEFAULT_EPSILON = 1e-5


def write_out_layer_norms(model: ir.Model) -> set[ir.Node]:
    """Replace, in place, every LayerNormalization over the last axis.

    Args:
        model: float32, opset 18 or later, with shapes.

    Returns:
        the nodes whose arithmetic FP16 spoils: squares of deviations overflow it.
    """
    exact: set[ir.Node] = set()
    for node in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        x = node.inputs[0]
        if x is not None and x.shape is not None and int_attribute(node, "axis", -1) in (-1, len(x.shape) - 1):
            exact |= _write_out(model.graph, node, x)
    remove_unused(model)
    return exact


def _write_out(graph: ir.Graph, node: ir.Node, x: ir.Value) -> set[ir.Node]:
    assert x.shape is not None
    writer, whole = Writer(graph, node, str(node.name)), x.shape
    row = ir.Shape([*whole[:-1], 1])
    epsilon = node.attributes.get("epsilon")
    last = writer.constant(np.array([-1], np.int64), "last_axis")
    small = writer.constant(np.array(DEFAULT_EPSILON if epsilon is None else epsilon.as_float(), np.float32), "epsilon")

    def write(op: str, inputs: list[ir.Value | None], name: str, shape: ir.Shape) -> ir.Value:
        return writer.node(op, inputs, name, dtype=FLOAT, shape=shape)

    mean = write("ReduceMean", [x, last], "mean", row)
    deviation = write("Sub", [x, mean], "deviation", whole)
    squares = write("Mul", [deviation, deviation], "squares", whole)
    variance = write("ReduceMean", [squares, last], "variance", row)
    raised = write("Add", [variance, small], "raised", row)
    spread = write("Sqrt", [raised], "spread", row)
    value = write("Div", [deviation, spread], "normalized", whole)
    exact = {v.producer() for v in (mean, deviation, squares, variance, raised, spread, value)}
    for op, operand in zip(("Mul", "Add"), node.inputs[1:], strict=False):
        if operand is not None and constant_of(operand) is not None:
            value = write(op, [value, operand], "scaled" if op == "Mul" else "shifted", whole)
    replace_value(graph, node.outputs[0], value)
    kept = {found for found in exact if found is not None}
    for found in kept:
        found.metadata_props[PRECISION_KEY] = "float32"
    return kept
