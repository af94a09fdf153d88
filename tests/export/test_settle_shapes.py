"""Shapes that are known need no computing: the rewritten graphs compute the same, bit for bit, with fewer nodes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from exported import as_written, float_model, float_part
from lowered import feeds
from numpy.typing import NDArray

from samq.calib.parts import MASK_DECODER
from samq.export import trace as tracing
from samq.export.settle_shapes import settle_shapes
from samq.export.trace import ANY_PROMPTS, ANY_SHAPE, StaticShape, trace

SIZES = {"B": 2, "P": 3, "T": 5}
SETTLED: list[tuple[str, str, list[str]]] = [
    (
        "one side that is no number is what remains",
        "(float[B,T,8] x) => (float[T,16] y) { t = Shape <start=1, end=2> (x) n = Constant <value_ints=[16]> () "
        "s = Concat <axis=0> (t, n) y = Reshape (x, s) }",
        ["Reshape"],
    ),
    (
        "a side at the same place is copied",
        "(float[P,1,T,8] x) => (float[P,T,2,4] y) { p = Shape <start=0, end=1> (x) t = Shape <start=2, end=3> (x) "
        "n = Constant <value_ints=[2, 4]> () s = Concat <axis=0> (p, t, n) y = Reshape (x, s) }",
        ["Reshape"],
    ),
    (
        "sides of 1 are dropped and added",
        "(float[1,P,T] x) => (float[P,T,1] h) { p = Shape <start=1, end=2> (x) t = Shape <start=2, end=3> (x) "
        "n = Constant <value_ints=[1]> () s = Concat <axis=0> (p, t, n) y = Reshape (x, s) h = Neg (y) }",
        ["Squeeze", "Unsqueeze", "Neg"],
    ),
    (
        "keys are turned at once",
        "(float[P,2,T,4] x) => (float[P,2,4,T] h) { s = Shape (x) m = Constant <value_ints=[-1]> () "
        "a = Constant <value_ints=[-2]> () b = Constant <value_ints=[-1]> () z = Constant <value_ints=[0]> () "
        "e = Constant <value_ints=[9223372036854775807]> () last = Slice (s, b, e) third = Slice (s, a, b) "
        "front = Slice (s, z, a) f = Concat <axis=0> (m, third, last) g = Concat <axis=0> (front, last, third) "
        "u = Reshape (x, f) v = Transpose <perm=[0, 2, 1]> (u) w = Reshape (v, g) h = Neg (w) }",
        ["Transpose", "Neg"],
    ),
    (
        "there and back is nowhere",
        "(float[P,8] x) => (float[P,8] y) <float[P,8] k> { "
        "a = Constant <value_ints=[1]> () i = Unsqueeze (x, a) j = Identity (i) "
        "s = Constant <value_ints=[-1, 8]> () k = Reshape (j, s) y = Neg (k) }",
        ["Neg"],
    ),
    (
        "what broadcasts reads what is repeated, past sides of 1",
        "(float[1,4] x, float[P,4] z) => (float[P,4] y) <float[P,4] w> { "
        "p = Shape <start=0, end=1> (z) n = Constant <value_ints=[1]> () s = Concat <axis=0> (n, p, n) "
        "u = Unsqueeze (x, n) v = Expand (u, s) "
        "m = Constant <value_ints=[-1, 4]> () w = Reshape (v, m) y = Add (z, w) }",
        ["Add"],
    ),
]  # fmt: skip
KEPT: list[tuple[str, str, list[str]]] = [
    (
        "one of two that are repeated gives the result its sides",
        "(float[1,4] x, float[P,1] z) => (float[P,4] y) { p = Shape <start=0, end=1> (z) "
        "n = Constant <value_ints=[4]> () s = Concat <axis=0> (p, n) v = Expand (x, s) w = Neg (v) y = Add (w, x) }",
        ["Shape", "Concat", "Expand", "Neg", "Add"],
    ),
    (
        "rows that became columns are not the rows",
        "(float[T] x, float[T,T] z) => (float[T,T] y) { s = Shape (z) n = Constant <value_ints=[1]> () "
        "u = Unsqueeze (x, n) v = Expand (u, s) y = Add (z, v) }",
        ["Unsqueeze", "Add"],
    ),
    (
        "two sides are merged, and it is not known into what",
        "(float[B,P,T,8] x) => (float[M,T,N] y) { b = Shape <start=2, end=3> (x) m = Constant <value_ints=[-1]> () "
        "n = Constant <value_ints=[8]> () s = Concat <axis=0> (m, b, n) y = Reshape (x, s) }",
        ["Shape", "Concat", "Reshape"],
    ),
]


def parsed(text: str) -> ir.Model:
    """A model of opset 21; sides are inferred as the exporter knows them, by name."""
    graph = onnx.parser.parse_graph(f"agraph {text}")
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def given(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return {
        str(value.name): random.standard_normal(
            [side if isinstance(side, int) else SIZES[str(side)] for side in value.shape or ()], np.float32
        )
        for value in model.graph.inputs
    }


@pytest.mark.parametrize(("text", "operators"), [row[1:] for row in SETTLED + KEPT], ids=[r[0] for r in SETTLED + KEPT])
def test_each_form_computes_the_same(text: str, operators: list[str]) -> None:
    model = parsed(text)
    inputs = given(model)
    before = as_written(model, inputs)
    settle_shapes(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == operators
    for one, other in zip(as_written(model, inputs), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shapes", "computed"),
    [(StaticShape(), 0), (StaticShape(1, 8, None), 0), (ANY_PROMPTS, 1), (ANY_SHAPE, 3)],
    ids=["static", "any points", "any prompts", "any"],
)
def test_a_decoder_computes_hardly_any_shape(
    shapes: StaticShape, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[ir.Model] = []

    def settle(model: ir.Model) -> ir.Model:
        traced.append(model.clone())
        return settle_shapes(model)

    monkeypatch.setattr(tracing, "settle_shapes", settle)
    skeletons = (trace(float_model(), MASK_DECODER, shapes), *traced)
    settled, plain = (float_part(skeleton, float_model(), half=False) for skeleton in skeletons)
    inputs = feeds(plain)
    for one, other in zip(as_written(settled, inputs), as_written(plain, inputs), strict=True):
        np.testing.assert_array_equal(one, other)
    before, after = (Counter(node.op_type for node in model.graph) for model in (plain, settled))
    assert after["Shape"] == computed <= before["Shape"]
    assert after.total() < before.total()
    assert not after["Identity"]
    assert not after["ScatterElements"]
