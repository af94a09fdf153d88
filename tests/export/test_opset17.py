"""Opset 17 computes what opset 21 does, or the node is refused by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written
from numpy.typing import NDArray

from samq.export.opset17 import to_opset17

SHAPE = (2, 3, 4, 6)


def model_of(op: str, inputs: tuple[NDArray[Any] | None, ...], outputs: list[Any], **attributes: Any) -> ir.Model:
    """x [2, 3, 4, 6] → one node of opset 21; `inputs` are the constants behind x, `outputs` the shapes."""
    names = ["x", *(f"c{i}" if array is not None else "" for i, array in enumerate(inputs))]
    results = [f"y{i}" for i in range(len(outputs))]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, names, results, "the_node", **attributes)],
        "graph",
        [onnx.helper.make_tensor_value_info("x", float32, SHAPE)],
        [onnx.helper.make_tensor_value_info(n, float32, s) for n, s in zip(results, outputs, strict=True)],
        [onnx.numpy_helper.from_array(array, f"c{i}") for i, array in enumerate(inputs) if array is not None],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


SIZES = np.array([2, 3, 8, 12])
SAME = [
    ("Gelu", (), [SHAPE], {}),
    ("ReduceMax", (np.array([2, 3]),), [(2, 3, 1, 1)], {}),
    ("ReduceMean", (np.array([-1]),), [(2, 3, 4)], {"keepdims": 0}),
    ("ReduceMin", (), [(1, 1, 1, 1)], {}),
    ("ReduceSum", (np.array([1]),), [(2, 1, 4, 6)], {}),
    ("Split", (), [(2, 3, 4, 2)] * 3, {"axis": -1, "num_outputs": 3}),
    ("Split", (), [(2, 3, 4, 4), (2, 3, 4, 2)], {"axis": 3, "num_outputs": 2}),
    ("Pad", (np.array([1, 2, 0, 1]), np.float32(7), np.array([3, -2])), [(2, 3, 7, 7)], {}),
    ("Pad", (np.array([0, 0, 0, 0, 0, 0, 1, 1]),), [(2, 3, 5, 7)], {}),
    ("Resize", (None, None, SIZES), [(2, 3, 8, 12)], {"mode": "linear", "antialias": 0}),
    ("Reshape", (np.array([2, 3, 24]),), [(2, 3, 24)], {"allowzero": 1}),
    ("LayerNormalization", (np.ones(6, np.float32), np.zeros(6, np.float32)), [SHAPE], {"axis": -1}),
    ("Cast", (), [SHAPE], {"to": 1, "saturate": 1}),
]


@pytest.mark.parametrize(("op", "inputs", "outputs", "attributes"), SAME)
def test_same_numbers(op: str, inputs: Any, outputs: Any, attributes: dict[str, Any]) -> None:
    if op == "Split" and attributes["num_outputs"] == 2:
        outputs = [(2, 3, 4, 3)] * 2
    model = model_of(op, inputs, outputs, **attributes)
    feeds = {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}
    expected = as_written(model, feeds)
    older = ir.to_proto(to_opset17(model))
    assert [(entry.domain, entry.version) for entry in older.opset_import] == [("", 17)]
    onnx.checker.check_model(older, full_check=True)
    for found, exact in zip(as_written(older, feeds), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes", "message"),
    [
        ("Gelu", (), [SHAPE], {"approximate": "tanh"}, "by tanh"),
        ("Mish", (), [SHAPE], {}, "no Mish"),
        ("Resize", (None, None, SIZES), [(2, 3, 8, 12)], {"mode": "linear", "antialias": 1}, "no antialias=1"),
        ("ReduceMax", (np.array([2]),), [(2, 3, 1, 6)], {"noop_with_empty_axes": 1}, "no noop_with_empty_axes=1"),
    ],
)
def test_what_opset_17_has_not_is_refused_by_name(
    op: str, inputs: Any, outputs: Any, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^the_node: .*{re.escape(message)}"):
        to_opset17(model_of(op, inputs, outputs, **attributes))


def test_axes_that_are_computed_are_refused() -> None:
    model = model_of("ReduceMax", (np.array([2]),), [(2, 3, 1, 6)])
    model.graph.initializers["c0"].const_value = None
    with pytest.raises(ValueError, match=r"^the_node: input 1 of ReduceMax"):
        to_opset17(model)


def test_parts_of_unknown_size_are_refused() -> None:
    model = model_of("Split", (), [(2, 3, 4, 3)] * 2, axis=-1, num_outputs=2)
    for output in model.graph[0].outputs:
        output.shape = None
    with pytest.raises(ValueError, match=r"^the_node: the sizes"):
        to_opset17(model)
