"""Canonical Q/DQ graph → the graph that ONNX Runtime's CUDA provider runs: FP16 arithmetic, 4- and 8-bit weights.

The provider's one kernel for such weights is MatMulNBits (contrib_ops/cuda/quantization/matmul_nbits.cc). For few rows
it reads the codes; for more it dequantizes the whole weight at every run and calls cuBLAS. Its GEMM of packed weights
(fpA_intB) was measured too: no faster on an H100, whose large GEMMs are bound by arithmetic, and an error for shapes
that it has no kernel for (docs/onnxruntime-cuda.md). It has no INT8 GEMM worth having: no MatMulIntegerToFloat and no
QLinearMatMul, Q/DQ around a MatMul runs as an FP16 GEMM between two rounding passes, and what MatMulInteger gives takes
several passes over INT32 to become FP16.

| requested                          | lowered to                                                                |
|------------------------------------|---------------------------------------------------------------------------|
| 4- or 8-bit weights, many rows     | MatMul of FP16 weights that a session computes from the codes when it is  |
|   or a number that is not known    | made, the low-rank branch in them (`unpack_at_load`)                      |
| … few rows, or `weights="packed"`  | MatMulNBits of the codes, the low-rank branch as MatMuls in FP16          |
| two-level 4-bit weights            | the same of their INT8 product with the group scale: 4 bits hold no such  |
|                                    | grid                                                                      |
| INT8 inputs                        | FP16 inputs, for rounding them would buy no speed                         |
| linear layers in front of a Split  | one layer a part (`separate_parts`), which saves the copy                 |
| biases                             | parts of other operators where there are any (`sink_biases`)              |
| paddings of windows                | paddings of planes, for which there is a fast kernel (`pad_planes`)       |
| what is computed from constants    | computed here: ONNX Runtime folds by CPU kernels, and lacks some in FP16  |

The engine reports what INT8 inputs became as "FP16". Weights are what the simulation has, rounded once to FP16 where
code × scale needs more than 11 bits, and packed asymmetric ones twice: CUDA subtracts scale × zero-point from the
product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.export.canonical import Gemm, GemmWeight, read_gemms
from samq.export.fold import fold_constants
from samq.export.fuse_attention import (
    CONTRIB,
    Rewrite,
    add_bias_last,
    fuse_attention,
    fuse_skip_layer_norm,
    pair_maxima,
)
from samq.export.graph import ROLE_KEY, Writer, add_initializer, constant_of, remove_unused, replace_value
from samq.export.half import to_fp16
from samq.export.lower_onnxruntime import BLOCK_SIZES, packed_codes
from samq.export.lowered_layer import FLOAT_GEMM, LoweredLayer
from samq.export.merge_moves import merge_moves
from samq.export.pad_planes import pad_planes
from samq.export.sink_biases import sink_biases
from samq.export.unpack_at_load import FOLDED_KEY, layer_of, unpack_at_load

FLOAT = ir.DataType.FLOAT
FP32_ON_CPU = 1  # accuracy_level of MatMulNBits; the CUDA provider ignores it
NO_INT8 = "ONNX Runtime has no INT8 GEMM worth having on CUDA, so activations stay FP16"
UNPACKED = "packed weights would be dequantized at every run"
ROW_INPUTS = (1, 2, 3)  # of MatMulNBits: codes, scales and zero-points, all [N, …]

Weights = Literal["dequantized at load", "packed", "dequantized"]


@dataclass(frozen=True)
class Lowered:
    """A graph for the CUDA provider.

    Args:
        model: FP16 arithmetic, float32 inputs and outputs.
        layers: every quantized layer, in graph order.
        rewrites: what each rewrite did, in order.
    """

    model: ir.Model
    layers: dict[str, LoweredLayer]
    rewrites: tuple[Rewrite, ...]


def lower_for_onnxruntime_cuda(
    model: ir.Model,
    *,
    weights: Weights = "dequantized at load",
    separate: bool = True,
    planes: bool = True,
) -> Lowered:
    """Lower a canonical or a float model in place.

    Args:
        weights: keep them in 4 and 8 bits, for a session to dequantize them once, when it is made, or packed for
            MatMulNBits; or write them dequantized, in FP16.
        separate: see `separate_parts`.
        planes: see `pad_planes`.

    Raises:
        BadInput: a constant is too large for FP16.
    """
    fold_constants(model)
    rewrites = [fuse_attention(model)]
    asked = _asked(model)
    _lower_gemms(model, packed=weights != "dequantized")
    bits = _packed_bits(model)
    rewrites += [step(model) for step in (add_bias_last, fuse_skip_layer_norm)]
    if separate:
        rewrites.append(separate_parts(model))
    rewrites += [sink_biases(model), pair_maxima(model)]
    if planes:
        rewrites.append(pad_planes(model))
    rewrites.append(merge_moves(model))
    to_fp16(model)
    if weights == "dequantized at load":
        rewrites.append(unpack_at_load(model))
    return Lowered(model, _lowered_layers(model, asked, bits), tuple(rewrites))


@dataclass(frozen=True)
class _Asked:
    """What a layer is in the canonical graph, beside its weight."""

    int8_inputs: bool
    branch: bool


def _asked(model: ir.Model) -> dict[str, _Asked]:
    """Every quantized layer of a canonical graph, in graph order."""
    branched = {layer_of(node) for node in model.graph if node.op_type == "Add" and ROLE_KEY in node.metadata_props}
    return {gemm.layer: _Asked(gemm.inputs is not None, gemm.layer in branched) for gemm in read_gemms(model)}


def _lowered_layers(model: ir.Model, asked: Mapping[str, _Asked], bits: Mapping[str, int]) -> dict[str, LoweredLayer]:
    """What became of each layer, and why that is not what was asked for.

    Args:
        bits: of weights in the file; FP16 ones have none.
    """
    packed = _packed_bits(model).keys()
    folded = {layer_of(node) for node in model.graph if FOLDED_KEY in node.metadata_props}
    layers = {}
    for name, layer in asked.items():
        if name in packed:
            compute, why = f"INT{bits[name]} weights, FP16 arithmetic", ""
        elif name in bits:
            compute, why = f"INT{bits[name]} weights, dequantized at load, {FLOAT_GEMM}", UNPACKED
        else:
            compute, why = FLOAT_GEMM, "weights dequantized in the file"
        reason = ", and ".join(filter(None, (NO_INT8 if layer.int8_inputs else "", why)))
        became = LoweredLayer(compute, reason)
        layers[name] = replace(became, branch="folded" if name in folded else "kept") if layer.branch else became
    return layers


def _packed_bits(model: ir.Model) -> dict[str, int]:
    """Bits of the weights of layers that MatMulNBits computes."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    return {layer_of(node): node.attributes["bits"].as_int() for node in nodes}


def _lower_gemms(model: ir.Model, *, packed: bool) -> None:
    for gemm in read_gemms(model):
        writer = Writer(model.graph, gemm.node, gemm.layer)
        x = gemm.node.inputs[0] if gemm.inputs is None else gemm.inputs.source
        if packed:
            replace_value(model.graph, gemm.node.outputs[0], _matmul_nbits(writer, gemm, x))
            model.graph.remove(gemm.node, safe=True)
        else:
            gemm.node.replace_input_with(0, x)
            gemm.node.replace_input_with(1, writer.constant(gemm.weight.dequantized(), "dequantized"))
    model.graph.opset_imports[CONTRIB] = 1
    remove_unused(model)


def _matmul_nbits(writer: Writer, gemm: Gemm, x: ir.Value | None) -> ir.Value:
    weight = _single_level(gemm.weight)
    inputs, outputs = weight.codes.shape
    bits = 4 if weight.codes.dtype.name in ("int4", "uint4") else 8
    block = _block_size(gemm.layer, weight)
    blocks = -(-inputs // block)
    packed, zero_points = packed_codes(weight, bits, block, blocks)
    repeats = blocks if weight.scale.shape[0] == 1 else weight.group_size // block
    operands = [
        x,
        writer.constant(packed, "packed"),
        writer.constant(np.repeat(weight.scale, repeats, axis=0)[:blocks].T, "block_scale"),
        *([] if zero_points is None else [writer.constant(zero_points, "block_zero_point")]),
    ]
    return writer.node(
        "MatMulNBits", operands, "MatMul", domain=CONTRIB, dtype=FLOAT, shape=gemm.node.outputs[0].shape,
        K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=FP32_ON_CPU,
    )  # fmt: skip


def _single_level(weight: GemmWeight) -> GemmWeight:
    """The weight itself, or the INT8 product of a two-level one with its scale a channel."""
    if weight.channel_scale is None:
        return weight
    codes = weight.integers().astype(np.int8)
    return GemmWeight(codes, weight.channel_scale[None], None, None, group_size=codes.shape[0])


def _block_size(layer: str, weight: GemmWeight) -> int:
    """Largest block within a group that divides the inputs; the largest within a group where none does."""
    inputs = weight.codes.shape[0]
    fitting = [b for b in BLOCK_SIZES if weight.scale.shape[0] == 1 or weight.group_size % b == 0]
    if not fitting:
        raise ValueError(f"{layer}: groups of {weight.group_size} are no multiple of {BLOCK_SIZES[-1]}")
    return next((block for block in fitting if inputs % block == 0), fitting[0])


def separate_parts(model: ir.Model) -> Rewrite:
    """Cut linear layers in front of a Split on the last axis (q, k and v in one) into one layer a part, in place.

    Exact: columns of a product depend on the same columns of weight and bias alone.
    """
    count, refused = 0, []
    for split in [node for node in model.graph if node.op_type == "Split"]:
        reason = _why_inseparable(split)
        if reason is not None:
            refused.append(f"{split.outputs[0].name}: {reason}")
            continue
        for index, (part, columns) in enumerate(_parts(split)):
            replace_value(model.graph, part, _columns(model.graph, split, split.inputs[0], columns, index))
        count += 1
    remove_unused(model)
    return Rewrite("separate_parts", count, tuple(refused))


def _parts(split: ir.Node) -> Iterator[tuple[ir.Value, slice]]:
    """Results of a Split, and the columns of its input that each holds."""
    start = 0
    for part in split.outputs:
        assert part.shape is not None
        width = part.shape[-1]
        assert isinstance(width, int)
        yield part, slice(start, start + width)
        start += width


def _why_inseparable(split: ir.Node) -> str | None:
    source = split.inputs[0]
    if source is None or source.shape is None:
        return "the shape of its input is not known"
    axis = split.attributes.get("axis")
    if (0 if axis is None else axis.as_int()) not in (-1, len(source.shape) - 1):
        return "it is not over the last axis"
    if any(part.shape is None or not isinstance(part.shape[-1], int) for part in split.outputs):
        return "the widths of its parts are not known"
    return None if _is_linear(source) else "its input is no linear layer that it alone reads"


def _is_linear(value: ir.Value) -> bool:
    """Sums and products with constants that nothing else reads, up to and with the weights."""
    node = value.producer()
    if node is None or len(value.uses()) != 1 or value.is_graph_output():
        return False
    if node.op_type == "Add":
        return all(constant_of(term) is not None or (term is not None and _is_linear(term)) for term in node.inputs)
    return node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and constant_of(node.inputs[1]) is not None)


def _columns(graph: ir.Graph, anchor: ir.Node, value: ir.Value | None, columns: slice, part: int) -> ir.Value:
    """Some columns of a value that `_is_linear`, computed alone in front of `anchor`."""
    assert value is not None
    constant = constant_of(value)
    if constant is not None:
        return add_initializer(graph, f"{value.name}/{part}", constant[..., columns])
    node = value.producer()
    assert node is not None
    inputs = list(node.inputs)
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "N"}
    if node.op_type == "Add":
        inputs = [_columns(graph, anchor, term, columns, part) for term in inputs]
    elif node.op_type == "MatMul":
        inputs[1] = _columns(graph, anchor, inputs[1], columns, part)
    else:
        attributes["N"] = ir.AttrInt64("N", columns.stop - columns.start)
        for index in ROW_INPUTS[: len(inputs) - 1]:
            inputs[index] = _rows(graph, inputs[index], columns, part)
    new = ir.Node(node.domain, node.op_type, inputs, list(attributes.values()), name=f"{node.name}_{part}")
    new.metadata_props.update(node.metadata_props)
    output = new.outputs[0]
    output.name, output.type = f"{value.name}_{part}", value.type
    if value.shape is not None:
        output.shape = ir.Shape([*value.shape[:-1], columns.stop - columns.start])
    graph.insert_before(anchor, new)
    return output


def _rows(graph: ir.Graph, value: ir.Value | None, rows: slice, part: int) -> ir.Value:
    constant: NDArray[np.generic] | None = constant_of(value)
    assert value is not None
    assert constant is not None
    return add_initializer(graph, f"{value.name}/{part}", constant[rows])
