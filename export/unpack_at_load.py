"""MatMulNBits → MatMul whose FP16 weight ONNX Runtime computes from the packed codes when a session is made.

CUDA's MatMulNBits dequantizes the whole weight at every run as soon as there are more rows than its kernel for few
takes; a vision encoder has thousands, and a low-rank branch costs two GEMMs and a sum beside each. So this is the usual
form (figures: docs/onnxruntime-cuda.md). The file keeps the codes, and the weight is a chain of constants

    Cast(codes) → Sub(zero-points) → Mul(scales) → Reshape → Transpose → [Add(down · up)] → Cast to FP16

in float32, which ONNX Runtime folds with its CPU kernels before it looks at the graph as a whole (basic optimizations;
results above 1 GiB are left, `optimization.constant_folding_max_output_size_in_bytes`). DequantizeLinear would not do:
folding leaves it alone, and it runs every time (seen in optimized graphs of 1.32). A low-rank branch that reads the
same inputs becomes part of the weight. GPU memory then holds FP16 weights, the file INT4 ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.fuse_attention import Rewrite
from samq.export.graph import LAYER_KEY, Writer, constant_of, producer, remove_unused, replace_value

FOLDED_KEY = "samq.folded"  # metadata of a product whose weight has a low-rank branch in it
FEW_ROWS = 16  # for which MatMulNBits has a kernel that reads the codes (matmul_4bits.cu, SmallMCap)
FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def unpack_at_load(model: ir.Model) -> Rewrite:
    """Replace every MatMulNBits in FP16 but those of few rows, in place; draws low-rank branches in."""
    count, refused = 0, []
    for node in [node for node in model.graph if node.op_type == "MatMulNBits"]:
        rows = _rows(node.inputs[0])
        if rows is not None and rows <= FEW_ROWS:
            refused.append(f"{node.name}: {rows} rows, for which packed weights are read faster")
            continue
        _unpack(model.graph, node)
        count += 1
    remove_unused(model)
    return Rewrite("unpack_at_load", count, tuple(refused))


def _rows(x: ir.Value | None) -> int | None:
    """Rows of the product, or None where they are not known."""
    sides = () if x is None or x.shape is None else tuple(x.shape)[:-1]
    return math.prod(side for side in sides if isinstance(side, int)) if sides and _all_known(sides) else None


def _all_known(sides: tuple[Any, ...]) -> bool:
    return all(isinstance(side, int) for side in sides)


@dataclass(frozen=True)
class _Branch:
    """The low-rank branch beside a product: x → down → up, and the sum of both."""

    down: NDArray[Any]
    up: NDArray[Any]
    sum: ir.Node


def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    role = str(node.name).partition("/")[2]
    writer = _Constants(Writer(graph, node, layer_of(node)), role)
    branch = _branch_beside(node)
    weight = writer.weight(node)
    if branch is not None:
        product = writer.float32("MatMul", [writer.float32_of(branch.down, "down"), writer.float32_of(branch.up, "up")])
        weight = writer.float32("Add", [weight, product])
    half = writer.node("Cast", [weight], FLOAT16, to=FLOAT16)
    result = node.outputs[0] if branch is None else branch.sum.outputs[0]
    product_node = ir.node("MatMul", [node.inputs[0], half], name=node.name)
    product_node.metadata_props.update(node.metadata_props)
    if branch is not None:
        product_node.metadata_props[FOLDED_KEY] = "low-rank branch"
    output = product_node.outputs[0]
    output.name, output.type, output.shape = f"{result.name}_unpacked", result.type, result.shape
    graph.insert_before(node if branch is None else branch.sum, product_node)
    replace_value(graph, result, output)


def _branch_beside(node: ir.Node) -> _Branch | None:
    """The branch that is added to a product which nothing else reads, and that starts from the same input."""
    users = node.outputs[0].consumers()
    if len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output() or users[0].op_type != "Add":
        return None
    for term in users[0].inputs:
        up = producer(term, "MatMul")
        down = None if up is None else producer(up.inputs[0], "MatMul")
        if up is None or down is None or down.inputs[0] is not node.inputs[0]:
            continue
        matrices = constant_of(down.inputs[1]), constant_of(up.inputs[1])
        if matrices[0] is not None and matrices[1] is not None:
            return _Branch(matrices[0], matrices[1], users[0])
    return None


class _Constants:
    """Writes the constant chain of one product."""

    def __init__(self, writer: Writer, role: str) -> None:
        self._writer, self._role, self._count = writer, role, 0

    def weight(self, node: ir.Node) -> ir.Value:
        """The weight [K, N] of a MatMulNBits in float32."""
        codes, zero, scale = _blocks(node)
        outputs, blocks, block = codes.shape
        inputs = node.attributes["K"].as_int()
        stored = self._named(codes.astype(ml_dtypes.uint4) if node.attributes["bits"].as_int() == 4 else codes, "codes")
        centred = self.float32("Sub", [self.float32("Cast", [stored], to=FLOAT), self._named(zero, "zero_points")])
        values = self.float32("Mul", [centred, self.float32_of(scale, "scales")])
        flat = self.float32("Reshape", [values, self._named(np.array([outputs, blocks * block]), "sides")])
        if blocks * block > inputs:
            bounds = [
                self._named(np.array([number]), name) for number, name in ((0, "from"), (inputs, "to"), (1, "axis"))
            ]
            flat = self.float32("Slice", [flat, *bounds])
        return self.float32("Transpose", [flat], perm=[1, 0])

    def float32_of(self, stored: NDArray[Any], name: str) -> ir.Value:
        """A constant as it is stored, and its Cast to float32."""
        value = self._named(stored, name)
        return value if stored.dtype == np.float32 else self.float32("Cast", [value], to=FLOAT)

    def float32(self, op: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        """A float32 result."""
        return self.node(op, inputs, FLOAT, **attributes)

    def node(self, op: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: Any) -> ir.Value:
        """Insert a node; its name says that it is of a weight."""
        self._count += 1
        return self._writer.node(op, inputs, f"weight/{self._role}/{self._count}", dtype=dtype, **attributes)

    def _named(self, array: NDArray[Any], name: str) -> ir.Value:
        return self._writer.constant(array, f"weight/{self._role}/{name}")


def layer_of(node: ir.Node) -> str:
    """Name of the layer that a product belongs to."""
    return node.metadata_props.get(LAYER_KEY, str(node.name).partition("/")[0])


def weight_of(node: ir.Node) -> NDArray[np.float32]:
    """The weight [K, N] of a MatMulNBits, or of a MatMul by a constant."""
    weight: NDArray[np.float32]
    if node.op_type == "MatMul":
        weight = _constant(node.inputs[1]).astype(np.float32)
    else:
        codes, zero, scale = _blocks(node)
        values = (codes - zero) * scale.astype(np.float32)
        weight = values.reshape(len(values), -1)[:, : node.attributes["K"].as_int()].T
    return weight


def _blocks(node: ir.Node) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[Any]]:
    """Codes [N, blocks, block], zero-points ([N, blocks, 1], or one) and scales [N, blocks, 1] of a MatMulNBits."""
    bits, outputs = node.attributes["bits"].as_int(), node.attributes["N"].as_int()
    scale = _constant(node.inputs[2]).reshape(outputs, -1, 1)
    blocks = scale.shape[1]
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    zero: NDArray[Any] = np.array(1 << (bits - 1), np.float32)
    if zero_points is not None:
        zero = _unpacked(_constant(zero_points), bits)[:, :blocks, None].astype(np.float32)
    return _unpacked(_constant(node.inputs[1]), bits).reshape(outputs, blocks, -1), zero, scale


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of the last axis, one a byte, the low half of a byte first."""
    rows = packed.reshape(len(packed), -1)
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


def _constant(value: ir.Value | None) -> NDArray[Any]:
    array = constant_of(value)
    assert array is not None
    return array
