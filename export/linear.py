"""Filling `samq.Linear` sites: float weights, or the canonical Q/DQ form that every target is lowered from.

Float                x → MatMul(W) → Add(b)
Quantized inputs     x → QuantizeLinear → DequantizeLinear → (MatMul)
                     dynamic scales are ReduceMax(Abs(x)) / qmax, over each token (blocked along K) or the tensor
Weight, one level    DequantizeLinear(codes, scale[, zero_point], block) → (MatMul)
Weight, two levels   DequantizeLinear(codes, group_scale[, zero_point], block)   integers up to ±127
                     → QuantizeLinear(1) → DequantizeLinear(channel_scale)       exactly a per-channel INT8 weight
Multiplier           x → Mul(p) in front of all that follows
Rotation             x → MatMul(Rᵀ) behind that, node `<layer>/rotated`; layers of one width read one constant
                     `rotation_<K>` and, where they read one x, share the MatMul
Low-rank branch      x → MatMul(down) → MatMul(up) → Add to the result; nodes `<layer>/low_rank/…`, role "low_rank";
                     layers that share `down` read one constant and, where they read one x, one MatMul

Weights stand as [K, N], as MatMul reads them. Every node is called `<layer>/…`; the GEMM is `<layer>/MatMul`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from samq.export.graph import LOW_RANK, Writer, add_initializer, remove_unused, replace_value
from samq.export.trace import BOUNDARY_OP, SITE_DOMAIN, SITE_OP
from samq.quant.grids import QuantizedWeight
from samq.quant.inputs import SMALLEST_RANGE, InputGrid
from samq.quant.layers import LayerCodes
from samq.quant.low_rank import LowRank
from samq.quant.rotate import runtime_rotation

FLOAT = ir.DataType.FLOAT


def fill_sites(model: ir.Model, layers: Mapping[str, nn.Linear | LayerCodes]) -> ir.Model:
    """Replace every site in place by the nodes of its layer, and drop what is no longer used.

    The tokens behind a block are called `<block>/tokens` then.

    Args:
        model: a skeleton from `samq.export.trace`.
        layers: the float layer or the codes of every site, by layer name.
    """
    graph, branches, rotations = model.graph, _Branches(), _Rotations()
    for boundary in _nodes(graph, BOUNDARY_OP):
        _name_tokens(graph, boundary)
    for site in _nodes(graph, SITE_OP):
        name = site.attributes["layer"].as_string()
        layer = layers[name]
        writer = Writer(graph, site, name)
        x, result = site.inputs[0], site.outputs[0]
        assert x is not None
        if isinstance(layer, LayerCodes):
            filled = _quantized(writer, x, layer, result, branches, rotations)
        else:
            weight = writer.constant(_array(layer.weight.T), "weight")
            filled = _gemm(writer, x, weight, layer.bias, result)
        replace_value(graph, result, filled)
        graph.remove(site, safe=True)
    remove_unused(model)
    return model


def _nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    return [node for node in graph if node.domain == SITE_DOMAIN and node.op_type == op]


def _name_tokens(graph: ir.Graph, boundary: ir.Node) -> None:
    tokens = boundary.inputs[0]
    assert tokens is not None
    ir.convenience.replace_all_uses_with(boundary.outputs[0], tokens)
    tokens.name = f"{boundary.attributes['block'].as_string()}/tokens"
    graph.remove(boundary, safe=True)


def store_as_fp16(model: ir.Model, *, rounding: bool) -> ir.Model:
    """Store float32 matrices in FP16, with a Cast back to float32 behind each.

    Args:
        model: changed in place.
        rounding: round where needed; otherwise only tensors that FP16 holds exactly are stored so.
    """
    graph = model.graph
    first = next(iter(graph))
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != FLOAT or len(tensor.shape) < 2:
            continue
        array = tensor.numpy()
        half = array.astype(np.float16)
        if not rounding and not np.array_equal(half.astype(np.float32), array):
            continue
        del graph.initializers[name]
        stored = add_initializer(graph, name, half)
        cast = ir.node("Cast", [stored], {"to": FLOAT}, name=f"{name}/Cast")
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = (
            f"{name}_fp32",
            value.type,
            value.shape,
        )
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.insert_before(first, cast)
    return model


def _gemm(writer: Writer, x: ir.Value, weight: ir.Value, bias: Tensor | None, like: ir.Value) -> ir.Value:
    result = writer.node("MatMul", [x, weight], "MatMul", dtype=FLOAT, shape=like.shape)
    if bias is None:
        return result
    constant = writer.constant(_array(bias), "bias")
    return writer.node("Add", [result, constant], "Add", dtype=FLOAT, shape=like.shape)


def _quantized(
    writer: Writer, x: ir.Value, layer: LayerCodes, like: ir.Value, branches: _Branches, rotations: _Rotations
) -> ir.Value:
    if layer.multiplier is not None:
        multiplier = writer.constant(_array(layer.multiplier), "multiplier")
        x = writer.node("Mul", [x, multiplier], "multiplied", dtype=FLOAT, shape=x.shape)
    if layer.rotated:
        x = rotations.add(writer, x, layer.weight.codes.shape[1])
    inputs = x if layer.inputs is None else _quantized_inputs(writer, x, layer.inputs, layer.weight.codes.shape[1])
    result = _gemm(writer, inputs, _quantized_weight(writer, layer.weight), layer.bias, like)
    return result if layer.branch is None else branches.add(writer, x, layer.branch, layer.down_of, result)


def _quantized_inputs(writer: Writer, x: ir.Value, grid: InputGrid, width: int) -> ir.Value:
    code = ir.DataType.INT8 if grid.dtype == "sint8" else ir.DataType.UINT8
    zero_point = writer.constant(np.array(grid.zero_point, dtype=code.numpy()), "input_zero_point")
    block: dict[str, Any] = {}
    asks_type: dict[str, Any] = {}
    if grid.scale is not None:
        scale = writer.constant(np.float32(grid.scale).reshape(()), "input_scale")
        parameters = [scale, zero_point]
    else:
        scale = _dynamic_scale(writer, x, grid)
        per_token = grid.granularity == "per_token"
        block = {"axis": -1, "block_size": width} if per_token else {}
        asks_type = {"output_dtype": int(code)} if per_token else {}  # beside a zero-point, ORT 1.32 trips over it
        parameters = [scale] if per_token else [scale, zero_point]
    codes = writer.node(
        "QuantizeLinear", [x, *parameters], "QuantizeLinear", dtype=code, shape=x.shape, **block, **asks_type
    )
    return writer.node(
        "DequantizeLinear", [codes, *parameters], "DequantizeLinear", dtype=FLOAT, shape=x.shape, **block
    )


def _dynamic_scale(writer: Writer, x: ir.Value, grid: InputGrid) -> ir.Value:
    """max|x| / qmax; [..., 1] per token, a scalar per tensor."""
    per_token = grid.granularity == "per_token"
    axes = [writer.constant(np.array([-1]), "token_axis")] if per_token else []
    shape = None if x.shape is None else ir.Shape([*x.shape[:-1], 1] if per_token else [])
    magnitude = writer.node("Abs", [x], "Abs", dtype=FLOAT, shape=x.shape)
    largest = writer.node(
        "ReduceMax", [magnitude, *axes], "ReduceMax", dtype=FLOAT, shape=shape, keepdims=int(per_token)
    )
    floor = writer.constant(np.float32(SMALLEST_RANGE).reshape(()), "smallest_range")
    bounded = writer.node("Max", [largest, floor], "Max", dtype=FLOAT, shape=shape)
    qmax = writer.constant(np.float32(grid.qmax).reshape(()), "qmax")
    return writer.node("Div", [bounded, qmax], "input_scale", dtype=FLOAT, shape=shape)


def _quantized_weight(writer: Writer, weight: QuantizedWeight) -> ir.Value:
    """The dequantized weight [K, N]."""
    scales, grid = weight.scales, weight.grid
    shape = ir.Shape(reversed(weight.codes.shape))
    codes = writer.constant(_codes(weight.codes.T, grid.bits, grid.signed), "codes")
    scale_name = "group_scale" if grid.two_level else "scale"
    inputs = [codes]
    if scales.scale.shape[1] == 1 and not grid.two_level:  # per-channel: no blocks
        inputs.append(writer.constant(_array(scales.scale[:, 0]), scale_name))
        blocks: dict[str, Any] = {"axis": 1}
    else:
        inputs.append(writer.constant(_array(scales.scale.T), scale_name))
        blocks = {"axis": 0, "block_size": scales.group_size}
    if scales.zero_point is not None:
        zero_point = scales.zero_point.T if "block_size" in blocks else scales.zero_point[:, 0]
        inputs.append(writer.constant(_codes(zero_point, grid.bits, grid.signed), "zero_point"))
    dequantized = writer.node(
        "DequantizeLinear", inputs, "weight/DequantizeLinear", dtype=FLOAT, shape=shape, **blocks
    )  # fmt: skip
    if scales.channel_scale is None:
        return dequantized
    one = writer.constant(np.float32(1).reshape(()), "one")
    zero = writer.constant(np.int8(0).reshape(()), "int8_zero")
    int8 = writer.node(
        "QuantizeLinear",
        [dequantized, one, zero],
        "weight/QuantizeLinear",
        dtype=ir.DataType.INT8,
        shape=shape,
    )
    channel_scale = writer.constant(_array(scales.channel_scale[:, 0]), "channel_scale")
    zeros = writer.constant(np.zeros(weight.codes.shape[0], np.int8), "channel_zero_point")
    return writer.node(
        "DequantizeLinear", [int8, channel_scale, zeros], "weight/ChannelDequantizeLinear",
        dtype=FLOAT, shape=shape, axis=1,
    )  # fmt: skip


class _Rotations:
    """Writes rotations of inputs and keeps what layers share of them."""

    def __init__(self) -> None:
        self._matrices: dict[int, ir.Value] = {}
        self._rotated: dict[ir.Value, ir.Value] = {}

    def add(self, writer: Writer, x: ir.Value, width: int) -> ir.Value:
        """x Rᵀ [..., K]."""
        if width not in self._matrices:
            matrix = _array(runtime_rotation(width).T)
            self._matrices[width] = add_initializer(writer.graph, f"rotation_{width}", matrix)
        if x not in self._rotated:
            factors = [x, self._matrices[width]]
            self._rotated[x] = writer.node("MatMul", factors, "rotated", dtype=FLOAT, shape=x.shape)
        return self._rotated[x]


class _Branches:
    """Writes low-rank branches and keeps what layers share of them."""

    def __init__(self) -> None:
        self._factors: dict[str, ir.Value] = {}
        self._narrow: dict[tuple[str, ir.Value], ir.Value] = {}

    def add(self, writer: Writer, x: ir.Value, branch: LowRank, down_of: str | None, result: ir.Value) -> ir.Value:
        """result + (x downᵀ) upᵀ, the factors stored in FP16; `down` is that of another layer if `down_of` names it."""
        owner = down_of or writer.layer
        if owner not in self._factors:
            self._factors[owner] = self._factor(writer, branch.down, "down")
        key = owner, x
        if key not in self._narrow:
            self._narrow[key] = writer.node(
                "MatMul", [x, self._factors[owner]], f"{LOW_RANK}/down", dtype=FLOAT, role=LOW_RANK
            )
        up = self._factor(writer, branch.up, "up")
        wide = writer.node(
            "MatMul", [self._narrow[key], up], f"{LOW_RANK}/up", dtype=FLOAT, shape=result.shape, role=LOW_RANK
        )
        return writer.node("Add", [result, wide], f"{LOW_RANK}/Add", dtype=FLOAT, shape=result.shape, role=LOW_RANK)

    @staticmethod
    def _factor(writer: Writer, factor: Tensor, name: str) -> ir.Value:
        stored = writer.constant(_array(factor.T).astype(np.float16), f"{LOW_RANK}/{name}_weight")
        return writer.node(
            "Cast", [stored], f"{LOW_RANK}/{name}_cast", dtype=FLOAT, shape=stored.shape, role=LOW_RANK, to=FLOAT
        )


def _codes(codes: Tensor, bits: int, signed: bool) -> NDArray[np.generic]:
    """Codes in the numpy type that ONNX stores them in."""
    types = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8, (8, False): np.uint8}
    return codes.contiguous().cpu().numpy().astype(types[bits, signed])


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().contiguous().cpu().numpy()
