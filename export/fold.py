"""Constants computed at export: the bicubic position embedding, the decoder's image positions, casts of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx_ir.passes import common

from samq.export.graph import add_initializer, constant_of, remove_unused, replace_value

KEPT = ("QuantizeLinear", "DequantizeLinear")  # quantized weights stay quantized


def fold_constants(model: ir.Model) -> ir.Model:
    """Replace what depends on constants alone by initializers, in place; Q/DQ stays.

    ONNX Runtime computes it, without optimizations, so that the values are those of the graph as written.
    """
    graph = model.graph
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in [node for node in graph if node.op_type == "Cast"]:
        array = constant_of(node.outputs[0])
        if array is not None:
            _fold_cast(graph, node, array)
    remove_unused(model)
    nodes = _constant_nodes(graph)
    wanted = [v for node in nodes for v in node.outputs if any(user not in nodes for user in v.consumers())]
    if wanted:
        for value, array in zip(wanted, _computed(model, nodes, wanted), strict=True):
            _replace(graph, value, array)
        remove_unused(model)
    return model


def _fold_cast(graph: ir.Graph, cast: ir.Node, array: NDArray[Any]) -> None:
    """Constants that nothing else reads keep their name, by which an engine's weights are known."""
    stored = cast.inputs[0]
    assert stored is not None
    if not stored.is_initializer() or len(stored.uses()) > 1:
        _replace(graph, cast.outputs[0], array)
        return
    stored.const_value = ir.Tensor(array, name=stored.name)
    stored.type = ir.TensorType(stored.const_value.dtype)
    replace_value(graph, cast.outputs[0], stored)


def _constant_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that read nothing but constants and each other, in order; those behind a graph output stay."""
    found: dict[ir.Node, None] = {}
    for node in graph:
        is_constant = all(v is None or v.const_value is not None or v.producer() in found for v in node.inputs)
        if node.inputs and is_constant and node.op_type not in KEPT and not set(node.outputs) & set(graph.outputs):
            found[node] = None
    return list(found)


def _computed(model: ir.Model, nodes: Sequence[ir.Node], wanted: Sequence[ir.Value]) -> list[NDArray[Any]]:
    constants = {v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.serde.serialize_node(node) for node in nodes],
            "constants",
            [],
            [ir.serde.serialize_value(value) for value in wanted],
            [_named(v) for v in constants],
        ),
        opset_imports=[onnx.helper.make_opsetid(*opset) for opset in model.opset_imports.items()],
        ir_version=model.ir_version,
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays: list[NDArray[Any]] = session.run(None, {})
    return arrays


def _named(constant: ir.Value) -> onnx.TensorProto:
    """The constant under the name by which nodes read it."""
    assert constant.const_value is not None
    proto = ir.serde.serialize_tensor(constant.const_value)
    proto.name = str(constant.name)
    return proto


def _replace(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    replace_value(graph, value, add_initializer(graph, f"{value.name}_folded", array))
