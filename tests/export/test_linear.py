"""Canonical Q/DQ layers: valid ONNX that computes what torch simulates, with weights equal bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported import as_written, canonical, largest_error, one_layer, quantized, skeleton
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from small_model import pixels, recipe_of
from torch import nn

from samq.calib.parts import IMAGE_ENCODER, PARTS, part_of
from samq.export.graph import LAYER_KEY, LOW_RANK, ROLE_KEY
from samq.export.linear import fill_sites, store_as_fp16
from samq.quant.config import Recipe, preset_names
from samq.quant.grids import Grid, round_to_grid
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes, QuantizedLinear
from samq.quant.low_rank import truncated_svd
from samq.quant.scales import choose_scales

STATIC_S8 = InputGrid("sint8", "per_tensor", 0.05)
STATIC_U8 = InputGrid("uint8", "per_tensor", 0.03, 77)
PER_TENSOR = InputGrid("sint8", "per_tensor")
PER_TOKEN = InputGrid("sint8", "per_token")

ROTATED = recipe_of("int4_w4only_rtn", rotation={"enabled": True, "online": True})

WEIGHTS_ONLY = [  # bits, signed, group of 80 inputs; 0 stands for the whole channel
    *((4, signed, group) for signed in (True, False) for group in (16, 64, 0)),
    *((8, signed, group) for signed in (True, False) for group in (48, 0)),
]
INT8_INPUTS = [
    *((4, signed, group, inputs) for signed in (True, False) for group in (16, 0) for inputs in (STATIC_S8, STATIC_U8)),
    *((4, signed, 16, inputs) for signed in (True, False) for inputs in (PER_TENSOR, PER_TOKEN)),
    *((8, True, 0, inputs) for inputs in (STATIC_S8, STATIC_U8, PER_TENSOR, PER_TOKEN)),
]


def codes(
    bits: int,
    signed: bool,
    group: int,
    inputs: InputGrid | None = None,
    *,
    sizes: tuple[int, int] = (80, 24),
    rank: int = 0,
    bias: bool = True,
    multiplied: bool = False,
    rotated: bool = False,
) -> LayerCodes:
    """A random layer of `sizes` (K, N), with a multiplier and rotated inputs where asked for."""
    generator = torch.Generator().manual_seed(bits + 10 * group)
    weight = torch.randn(*sizes[::-1], generator=generator) * torch.logspace(-2, 1, sizes[1])[:, None]
    branch = truncated_svd(weight, rank) if rank else None
    rest = weight if branch is None else weight - branch.product()
    grid = Grid(bits, signed, two_level=bits == 4 and inputs is not None)
    rounded = round_to_grid(rest, choose_scales(rest, grid, group or sizes[0]), grid)
    shift = torch.randn(sizes[1], generator=generator) if bias else None
    multiplier = torch.logspace(-1, 1, sizes[0]) if multiplied else None
    return LayerCodes(rounded, inputs, branch, shift, multiplier, rotated=rotated)


def tokens(width: int = 80) -> NDArray[np.float32]:
    """Activations [2, 5, width] with an outlier token, a zero token and values beyond every static range."""
    x = np.random.default_rng(0).standard_normal((2, 5, width)).astype(np.float32)
    x[0, 1] *= 100
    x[1, 2] = 0
    return x


def simulated(layer: LayerCodes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What torch makes of it."""
    with torch.no_grad():
        answer: NDArray[np.float32] = QuantizedLinear(layer)(torch.from_numpy(x)).numpy()
    return answer


def filled(layer: LayerCodes | nn.Linear) -> ir.Model:
    """The canonical form of one layer, checked."""
    model = fill_sites(*one_layer(layer))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


@pytest.mark.parametrize(("bits", "signed", "group"), WEIGHTS_ONLY)
def test_a_weights_only_layer_computes_what_torch_simulates(bits: int, signed: bool, group: int) -> None:
    layer = codes(bits, signed, group)
    found = as_written(filled(layer), {"x": tokens()})[0]
    assert largest_error(found, simulated(layer, tokens())) < 1e-6


@pytest.mark.parametrize(("bits", "signed", "group", "inputs"), INT8_INPUTS)
def test_a_layer_with_int8_inputs_computes_what_torch_simulates(
    bits: int, signed: bool, group: int, inputs: InputGrid
) -> None:
    layer = codes(bits, signed, group, inputs)
    found = as_written(filled(layer), {"x": tokens()})[0]
    assert largest_error(found, simulated(layer, tokens())) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_with_a_branch_computes_what_torch_simulates(bias: bool) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=8, bias=bias)
    found = as_written(filled(layer), {"x": tokens()})[0]
    assert largest_error(found, simulated(layer, tokens())) < 1e-5


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR, PER_TOKEN])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_layer_with_a_multiplier_computes_what_torch_simulates(inputs: InputGrid | None, rank: int) -> None:
    layer = codes(4, True, 16, inputs, rank=rank, multiplied=True)
    found = as_written(filled(layer), {"x": tokens()})[0]
    assert largest_error(found, simulated(layer, tokens())) < 1e-5
    assert largest_error(found, simulated(replace(layer, multiplier=None), tokens())) > 0.1


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("multiplied", [False, True])
def test_a_layer_with_rotated_inputs_computes_what_torch_simulates(
    inputs: InputGrid | None, rank: int, multiplied: bool
) -> None:
    layer = codes(4, True, 16, inputs, rank=rank, multiplied=multiplied, rotated=True)
    model = filled(layer)
    assert {"a.layer/rotated", "a.layer/MatMul"} <= {node.name for node in model.graph}
    found = as_written(model, {"x": tokens()})[0]
    assert largest_error(found, simulated(layer, tokens())) < 1e-5
    assert largest_error(found, simulated(replace(layer, rotated=False), tokens())) > 0.1


def test_layers_of_one_width_share_the_rotation() -> None:
    """One constant a width, stored in FP16, and one product for each tensor that is read."""
    result = quantized(ROTATED)
    model = store_as_fp16(canonical(ROTATED, IMAGE_ENCODER), rounding=False)
    rotated = {name: layer for name, layer in result.codes.items() if layer.rotated and part_of(name) == IMAGE_ENCODER}
    widths = {layer.weight.codes.shape[1] for layer in rotated.values()}
    stored = {name: value.dtype for name, value in model.graph.initializers.items() if name.startswith("rotation_")}
    assert stored == {f"rotation_{width}": ir.DataType.FLOAT16 for width in widths}
    products = [node for node in model.graph if str(node.name).endswith("/rotated")]
    assert len(products) == len({id(node.inputs[0]) for node in products})
    layers = [str(node.name).removesuffix("/rotated") for node in products]
    assert len(set(layers)) == len(layers) < len(rotated)  # qkv and proj of a block that widens read the same tokens
    assert set(layers) < set(rotated)


def test_the_onnx_reference_evaluator_agrees() -> None:
    """A second reader of the standard, one that shares no code with ONNX Runtime."""
    for layer in (codes(4, False, 64), codes(8, True, 0, STATIC_S8), codes(4, True, 16, STATIC_S8)):
        found = ReferenceEvaluator(ir.to_proto(filled(layer))).run(None, {"x": tokens()})[0]
        assert largest_error(found, simulated(layer, tokens())) < 1e-6


def test_a_float_layer_keeps_its_weights() -> None:
    layer = nn.Linear(80, 24)
    found = as_written(filled(layer), {"x": tokens()})[0]
    with torch.no_grad():
        assert largest_error(found, layer(torch.from_numpy(tokens())).numpy()) < 1e-6


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("part", PARTS)
def test_dequantized_weights_equal_torchs_bit_for_bit(preset: str, part: str) -> None:
    recipe = recipe_of(preset)
    found = dequantized_weights(canonical(recipe, part))
    expected = {name: layer for name, layer in quantized(recipe).codes.items() if part_of(name) == part}
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        np.testing.assert_array_equal(found[name].view(np.int32), _bits(layer.weight.dequantize().T))


OTHER_FORMATS: dict[str, Recipe] = {
    "uint4 two levels": recipe_of("int4_w4a8_rtn", wgts={"dtype": "uint4", "group_shapes": [[1, 32]]}),
    "uint8 weights only": recipe_of("int4_w4only_rtn", wgts={"dtype": "uint8", "group_shapes": [[1, 48]]}),
    "sint4 per channel": recipe_of("int4_w4only_rtn", wgts={"dtype": "sint4", "group_shapes": [[1, -1]]}),
    "uint4 per channel": recipe_of("int4_w4only_rtn", wgts={"group_shapes": [[1, -1]]}),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_dequantized_weights_of_other_formats_equal_torchs_bit_for_bit(name: str) -> None:
    recipe = OTHER_FORMATS[name]
    found = dequantized_weights(canonical(recipe, IMAGE_ENCODER))
    assert len(found) > 10
    for layer, weight in found.items():
        expected = quantized(recipe).codes[layer].weight.dequantize().T
        np.testing.assert_array_equal(weight.view(np.int32), _bits(expected))


def _bits(weight: torch.Tensor) -> NDArray[np.int32]:
    bits: NDArray[np.int32] = weight.contiguous().numpy().view(np.int32)
    return bits


def dequantized_weights(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    """Layer → weight [K, N] as it enters the layer's MatMul, computed from the file's bytes alone."""
    proto = onnx.load_from_string(ir.to_proto(model).SerializeToString())
    makers = {output: node for node in proto.graph.node for output in node.output}
    weights = {}
    for node in proto.graph.node:
        layer = {p.key: p.value for p in node.metadata_props}.get(LAYER_KEY)
        maker = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if layer is not None and maker is not None and maker.op_type == "DequantizeLinear":
            weights[node.input[1]] = layer
    needed, open_names = [], list(weights)
    while open_names:
        maker = makers.get(open_names.pop())
        if maker is not None and maker not in needed:
            needed.append(maker)
            open_names.extend(maker.input)
    nodes = [node for node in proto.graph.node if node in needed]
    names = {name for node in nodes for name in node.input}
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in weights]
    graph = onnx.helper.make_graph(nodes, "w", [], outputs, [i for i in proto.graph.initializer if i.name in names])
    cut = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    return dict(zip(weights.values(), as_written(cut, {}, *weights), strict=True))


def without_branches(model: ir.Model) -> onnx.ModelProto:
    """The model with each branch cut out, by what the file says of it and with onnx' own tools."""
    proto = ir.to_proto(model)
    removed, renamed = set(), {}
    for node in proto.graph.node:
        if {p.key: p.value for p in node.metadata_props}.get(ROLE_KEY) == LOW_RANK:
            removed.add(node.name)
            if node.op_type == "Add":
                renamed[node.output[0]] = node.input[0]
    kept = [node for node in proto.graph.node if node.name not in removed]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for output in proto.graph.output:
        output.name = renamed.get(output.name, output.name)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_cutting_the_branch_leaves_the_layer_without_it() -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=8)
    bare = LayerCodes(layer.weight, layer.inputs, None, layer.bias)
    found = as_written(without_branches(filled(layer)), {"x": tokens()})[0]
    assert largest_error(found, simulated(bare, tokens())) < 1e-6
    assert largest_error(found, simulated(layer, tokens())) > 0.01


def test_cutting_all_branches_of_a_model_leaves_the_model_without_them() -> None:
    recipe = recipe_of("int4_svdquant")
    result = quantized(recipe)
    with_branch = [name for name, layer in result.codes.items() if layer.branch and part_of(name) == IMAGE_ENCODER]
    model = canonical(recipe, IMAGE_ENCODER)
    names = {node.name for node in model.graph}
    assert with_branch
    assert all({f"{name}/low_rank/{end}" for end in ("down", "up", "Add")} <= names for name in with_branch)
    bare = {name: LayerCodes(layer.weight, layer.inputs, None, layer.bias) for name, layer in result.codes.items()}
    from samq.export.parts import quantized_part

    feeds = {"pixel_values": pixels(1).numpy()}
    expected = as_written(quantized_part(skeleton(IMAGE_ENCODER), result.model, bare), feeds)
    for found, exact in zip(as_written(without_branches(model), feeds), expected, strict=True):
        np.testing.assert_array_equal(found, exact)


def test_swapping_the_branchs_weights_swaps_its_answer() -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=8)
    model = filled(layer)
    up = model.graph.initializers["a.layer/low_rank/up_weight"]
    up.const_value = ir.tensor(-up.const_value.numpy(), name=up.name)  # type: ignore[union-attr]
    assert layer.branch is not None
    negative = LayerCodes(
        layer.weight, layer.inputs, type(layer.branch)(layer.branch.down, -layer.branch.up), layer.bias
    )
    assert largest_error(as_written(model, {"x": tokens()})[0], simulated(negative, tokens())) < 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_weights_stand_in_the_file_as_four_bits_in_blocks(part: str) -> None:
    model = canonical(recipe_of("int4_w4only"), part)
    stored = {
        node.metadata_props[LAYER_KEY]: node.inputs[0].dtype  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes
    }
    blocked = [
        name
        for name, layer in quantized(recipe_of("int4_w4only")).codes.items()
        if part_of(name) == part and layer.weight.scales.scale.shape[1] > 1
    ]
    assert blocked
    assert {stored[name] for name in blocked} == {ir.DataType.UINT4}


def test_fp16_storage_rounds_only_when_asked() -> None:
    def stored(weight: torch.Tensor, rounding: bool) -> set[Any]:
        layer = nn.Linear(80, 24)
        layer.weight = nn.Parameter(weight)
        model = store_as_fp16(filled(layer), rounding=rounding)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        return {value.dtype for value in model.graph.initializers.values() if len(value.shape or ()) == 2}

    exact = torch.randn(24, 80).half().float()
    assert stored(exact, False) == stored(exact, True) == {ir.DataType.FLOAT16}
    assert stored(exact + 1e-5, False) == {ir.DataType.FLOAT}
    assert stored(exact + 1e-5, True) == {ir.DataType.FLOAT16}
