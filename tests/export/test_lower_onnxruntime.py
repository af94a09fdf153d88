"""Graphs lowered for ONNX Runtime compute what torch simulates, with the kernels that were asked for."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported import canonical, float_model, largest_error, one_layer, quantized, skeleton
from numpy.typing import NDArray
from small_model import pixels, recipe_of, relative
from test_linear import (
    INT8_INPUTS,
    OTHER_FORMATS,
    PER_TENSOR,
    PER_TOKEN,
    STATIC_S8,
    STATIC_U8,
    WEIGHTS_ONLY,
    codes,
    filled,
    simulated,
    tokens,
)
from torch import nn

from samq.calib.parts import IMAGE_ENCODER, ImageEncoder
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.export.graph import constant_of
from samq.export.linear import fill_sites
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import quantized_part, save_part
from samq.quant.config import Recipe, preset_names
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.tools.targets import requested_compute


def engine_of(model: ir.Model, folder: Path) -> OnnxRuntimeEngine:
    """The model lowered, saved and loaded."""
    path = folder / "lowered.onnx"
    save_part(lower_for_onnxruntime(model), path)
    return OnnxRuntimeEngine(path)


def answer_of(layer: LayerCodes, folder: Path) -> NDArray[np.float32]:
    """What the lowered form of one layer answers to `tokens`."""
    engine = engine_of(filled(layer), folder)
    found: NDArray[np.float32] = engine.run({"x": tokens(layer.weight.codes.shape[1])})["y"]
    return found


@pytest.mark.parametrize(("bits", "signed", "group"), WEIGHTS_ONLY)
def test_a_weights_only_layer_computes_what_torch_simulates(
    bits: int, signed: bool, group: int, tmp_path: Path
) -> None:
    layer = codes(bits, signed, group)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-6
    assert executed_layers(tmp_path / "lowered.onnx")["a.layer"].compute == f"INT{bits} weights, FP32 arithmetic"


@pytest.mark.parametrize(("bits", "signed", "group", "inputs"), INT8_INPUTS)
def test_a_layer_with_int8_inputs_computes_what_torch_simulates(
    bits: int, signed: bool, group: int, inputs: InputGrid, tmp_path: Path
) -> None:
    layer = codes(bits, signed, group, inputs)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-6
    assert executed_layers(tmp_path / "lowered.onnx")["a.layer"].compute == "INT8 GEMM"


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_branch_survive(inputs: InputGrid | None, rank: int, bias: bool, tmp_path: Path) -> None:
    layer = codes(4, True, 16, inputs, rank=rank, bias=bias)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-5


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR, PER_TOKEN])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_multiplier_stands_in_front_of_everything(inputs: InputGrid | None, rank: int, tmp_path: Path) -> None:
    layer = codes(4, True, 16, inputs, rank=rank, multiplied=True)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-5


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TENSOR])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("multiplied", [False, True])
def test_inputs_are_rotated_behind_the_multiplier(
    inputs: InputGrid | None, rank: int, multiplied: bool, tmp_path: Path
) -> None:
    layer = codes(4, True, 16, inputs, rank=rank, multiplied=multiplied, rotated=True)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-5
    executed = executed_layers(tmp_path / "lowered.onnx")
    assert {name: one.compute for name, one in executed.items()} == {"a.layer": NAMES[inputs is None]}


@pytest.mark.parametrize("width", [16, 33, 100, 200])
@pytest.mark.parametrize("signed", [True, False])
def test_inputs_that_no_block_divides(width: int, signed: bool, tmp_path: Path) -> None:
    layer = codes(4, signed, min(64, width), sizes=(width, 20))
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens(width))) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_larger_than_any_block(bits: int, tmp_path: Path) -> None:
    layer = codes(bits, False, 256, sizes=(600, 20))
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens(600))) < 1e-6


def test_saturating_products_are_exact(tmp_path: Path) -> None:
    """u8 × s8 pairs summed in 16 bits overflow without VNNI unless the runtime is told to be exact."""
    layer = codes(8, True, 0, STATIC_U8, sizes=(512, 16))
    layer.weight.codes[:] = 127
    x = np.full((1, 3, 512), 100, np.float32)
    engine = engine_of(filled(layer), tmp_path)
    assert largest_error(engine.run({"x": x})["y"], simulated(layer, x)) < 1e-6


def test_layers_that_read_one_tensor_share_its_quantization(tmp_path: Path) -> None:
    layer = codes(8, True, 0, STATIC_S8, sizes=(80, 24))
    model, layers = one_layer(layer)
    site = model.graph[0]
    twin = ir.node(site.op_type, [site.inputs[0]], {"layer": "b.layer"}, domain=site.domain, name="twin")
    twin.outputs[0].name, twin.outputs[0].type = "z", site.outputs[0].type
    twin.outputs[0].shape = site.outputs[0].shape
    model.graph.append(twin)
    model.graph.outputs.append(twin.outputs[0])
    fill_sites(model, layers | {"b.layer": layer})
    engine = engine_of(model, tmp_path)
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    answers = engine.run({"x": tokens()})
    np.testing.assert_array_equal(answers["y"], answers["z"])
    assert largest_error(answers["y"], simulated(layer, tokens())) < 1e-6


def test_a_weight_that_is_no_int8_weight_is_refused_by_name() -> None:
    layer = codes(4, True, 16)
    impossible = LayerCodes(layer.weight, STATIC_S8, None, layer.bias)  # one level of scales under INT8 inputs
    with pytest.raises(ValueError, match=r"a\.layer"):
        lower_for_onnxruntime(filled(impossible))


def test_float_layers_stay(tmp_path: Path) -> None:
    layer = nn.Linear(80, 24)
    engine = engine_of(filled(layer), tmp_path)
    with torch.no_grad():
        assert largest_error(engine.run({"x": tokens()})["y"], layer(torch.from_numpy(tokens())).numpy()) < 1e-6


NAMES = {True: "INT4 weights, FP32 arithmetic", False: "INT8 GEMM"}  # by whether inputs are float
ONLINE = {"enabled": True, "online": True}
DYNAMIC = {"mode": "dynamic"}
WHOLE_MODELS: dict[str, Recipe] = {
    **{name: recipe_of(name) for name in preset_names()},
    **OTHER_FORMATS,
    "per token": recipe_of("int4_w4a8_rtn", ipts={**DYNAMIC, "granularity": "per_token"}),
    "per tensor, dynamic": recipe_of("int8_w8a8", ipts=DYNAMIC),
    "uint8 inputs": recipe_of("int4_w4a8_rtn", ipts={"dtype": "uint8"}),
    "rotated at run time": recipe_of("int4_w4only_rtn", rotation=ONLINE),
    "rotated at run time, INT8 inputs": recipe_of("int4_svdquant", rotation=ONLINE),
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_whole_encoder_computes_what_torch_simulates(name: str, tmp_path: Path) -> None:
    """Codes flip where float sums differ in their last bit: INT8 inputs may cost a fraction of the rounding noise.

    Torch against itself on an image changed by 1e-6 differs by up to 0.8 of it where scales are dynamic, per tensor. An
    engine that rounds no inputs differs by all of it. The tests of single layers are sharp.
    """
    recipe = WHOLE_MODELS[name]
    image = pixels(1, seed=3)
    engine = engine_of(canonical(recipe, IMAGE_ENCODER), tmp_path)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        expected = ImageEncoder(quantized(recipe).model)(image)
        unrounded = ImageEncoder(float_model())(image)
    for output, exact, real in zip(engine.outputs, expected, unrounded, strict=True):
        difference = relative(torch.from_numpy(found[output]) - exact, exact)
        assert difference < (1e-5 if recipe.weight_only else 0.8 * relative(real - exact, exact))
    executed = executed_layers(tmp_path / "lowered.onnx")
    layers = [layer for layer in quantized(recipe).codes if layer.startswith("vision_encoder.")]
    assert {executed[layer].compute for layer in layers} == {requested_compute(recipe)}


def test_a_whole_encoder_with_multipliers_computes_what_torch_simulates(tmp_path: Path) -> None:
    """In front of every layer, so that every rewrite meets one."""
    recipe, image = recipe_of("int4_w4only_rtn"), pixels(1, seed=3)
    result = quantized(recipe)
    model, multiplied = copy.deepcopy(result.model), {}
    for name, layer in result.codes.items():
        multiplied[name] = replace(layer, multiplier=torch.linspace(0.9, 1.1, layer.weight.codes.shape[1]))
        replace_module(model, name, QuantizedLinear(multiplied[name]))
    engine = engine_of(quantized_part(skeleton(IMAGE_ENCODER), model, multiplied), tmp_path)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        expected, without = ImageEncoder(model)(image), ImageEncoder(result.model)(image)
    for output, exact, other in zip(engine.outputs, expected, without, strict=True):
        assert relative(torch.from_numpy(found[output]) - exact, exact) < 1e-5
        assert relative(other - exact, exact) > 1e-2


PARTS_OF_ENCODER = {
    "int4_w4a8": {"MatMulIntegerToFloat": 33, "MultiHeadAttention": 5, "Split": 0},
    "int4_w4only_rtn": {"MatMulNBits": 33, "MultiHeadAttention": 5, "Split": 0},
    "int4_svdquant": {"MatMulIntegerToFloat": 33, "MultiHeadAttention": 5, "Split": 0},
}


@pytest.mark.parametrize("preset", PARTS_OF_ENCODER)
def test_what_stands_around_the_layers_is_written_for_the_cpu(preset: str) -> None:
    model = lower_for_onnxruntime(canonical(recipe_of(preset), IMAGE_ENCODER))
    operators = Counter(node.op_type for node in model.graph)
    assert {name: operators[name] for name in PARTS_OF_ENCODER[preset]} == PARTS_OF_ENCODER[preset]
    assert all(constant_of(node.inputs[1]).size == 1 for node in model.graph if node.op_type == "ReduceMax")
    biases = [node for node in model.graph if node.op_type == "Add" and constant_of(node.inputs[1]) is not None]
    assert not [node.name for node in biases if str(node.name).endswith("/Add")]  # all in kernels


def test_a_bias_of_4_bit_weights_is_in_the_kernel(tmp_path: Path) -> None:
    layer = codes(4, False, 16, bias=True)
    model = filled(layer)
    assert largest_error(answer_of(layer, tmp_path), simulated(layer, tokens())) < 1e-6
    lower_for_onnxruntime(model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
