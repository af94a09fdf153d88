"""Graphs for the CUDA provider, run on the CPU: the simulation's weights, its numbers up to FP16, and no layer lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported import as_written, canonical, float_model, largest_error, one_layer, quantized, skeleton
from numpy.typing import NDArray
from small_model import pixels, recipe_of, relative
from test_linear import (
    INT8_INPUTS,
    OTHER_FORMATS,
    STATIC_S8,
    WEIGHTS_ONLY,
    codes,
    filled,
    simulated,
    tokens,
)
from torch import nn

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, ImageEncoder
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.export import unpack_at_load
from samq.export.graph import constant_of, producer
from samq.export.linear import fill_sites
from samq.export.lower_onnxruntime_cuda import (
    NO_INT8,
    UNPACKED,
    Lowered,
    Weights,
    lower_for_onnxruntime_cuda,
    separate_parts,
)
from samq.export.lowered_layer import LoweredLayer
from samq.export.parts import float_part, save_part
from samq.quant.config import Recipe, preset_names
from samq.quant.layers import InputGrid, LayerCodes

FP16 = 2e-3  # a few roundings to 11 bits


def answer_of(layer: LayerCodes | nn.Linear, folder: Path, weights: Weights = "packed") -> NDArray[np.float32]:
    """What the lowered form of one layer answers to `tokens`."""
    path = folder / "lowered.onnx"
    model = lower_for_onnxruntime_cuda(filled(layer), weights=weights).model
    save_part(model, path)
    width = model.graph.inputs[0].shape
    assert width is not None
    found: NDArray[np.float32] = OnnxRuntimeEngine(path).run({"x": tokens(int(width[-1]))})["y"]
    return found


def without_grid(layer: LayerCodes) -> LayerCodes:
    """The layer with float inputs, as this engine runs it."""
    return LayerCodes(layer.weight, None, layer.branch, layer.bias)


@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize(("bits", "signed", "group"), WEIGHTS_ONLY)
def test_a_weights_only_layer(bits: int, signed: bool, group: int, weights: Weights, tmp_path: Path) -> None:
    layer = codes(bits, signed, group)
    found = answer_of(layer, tmp_path, weights)
    assert found.dtype == np.float32
    assert largest_error(found, simulated(layer, tokens())) < FP16


@pytest.mark.parametrize(("bits", "signed", "group", "inputs"), INT8_INPUTS)
def test_a_layer_with_int8_inputs_keeps_its_weights(
    bits: int, signed: bool, group: int, inputs: object, tmp_path: Path
) -> None:
    layer = codes(bits, signed, group, inputs)  # type: ignore[arg-type]
    assert largest_error(answer_of(layer, tmp_path), simulated(without_grid(layer), tokens())) < FP16


@pytest.mark.parametrize("weights", ["packed", "dequantized at load"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_branch_survive(rank: int, bias: bool, weights: Weights, tmp_path: Path) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=rank, bias=bias)
    assert largest_error(answer_of(layer, tmp_path, weights), simulated(without_grid(layer), tokens())) < FP16


@pytest.mark.parametrize("weights", get_args(Weights))
def test_a_multiplier_stands_in_front_of_everything(weights: Weights, tmp_path: Path) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=4, multiplied=True)
    expected = simulated(replace(layer, inputs=None), tokens())
    assert largest_error(answer_of(layer, tmp_path, weights), expected) < FP16


@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize("multiplied", [False, True])
def test_inputs_are_rotated_behind_the_multiplier(weights: Weights, multiplied: bool, tmp_path: Path) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=4, multiplied=multiplied, rotated=True)
    expected = simulated(replace(layer, inputs=None), tokens())
    assert largest_error(answer_of(layer, tmp_path, weights), expected) < FP16


@pytest.mark.parametrize("weights", ["packed", "dequantized at load"])
@pytest.mark.parametrize("width", [16, 33, 100, 112, 200])
@pytest.mark.parametrize("signed", [True, False])
def test_inputs_that_no_block_divides(width: int, signed: bool, weights: Weights, tmp_path: Path) -> None:
    layer = codes(4, signed, min(64, width), sizes=(width, 20))
    assert largest_error(answer_of(layer, tmp_path, weights), simulated(layer, tokens(width))) < FP16


@pytest.mark.parametrize(
    ("width", "group", "block"), [(448, 128, 64), (896, 128, 128), (112, 64, 16), (224, 0, 32), (100, 64, 64)]
)
def test_blocks_divide_the_inputs_where_they_can(width: int, group: int, block: int) -> None:
    """Then no code is spent on padding."""
    model = lower_for_onnxruntime_cuda(filled(codes(4, True, group, sizes=(width, 20))), weights="packed").model
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [node.attributes["block_size"].as_int() for node in nodes] == [block]


@pytest.mark.parametrize(
    ("inputs", "bits", "asked", "why"), [(None, 4, "", ""), (STATIC_S8, 8, NO_INT8, f"{NO_INT8}, and ")]
)
def test_what_became_of_a_layer_and_why(
    inputs: InputGrid | None, bits: int, asked: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of two levels are 8-bit ones here, and layers of few rows stay packed."""
    packed, unpacked = f"INT{bits} weights, FP16 arithmetic", f"INT{bits} weights, dequantized at load, FP16 GEMM"
    expected: list[tuple[Weights, int | None, LoweredLayer]] = [
        ("packed", None, LoweredLayer(packed, asked)),
        ("dequantized at load", 16, LoweredLayer(packed, asked)),
        ("dequantized at load", 17, LoweredLayer(unpacked, f"{why}{UNPACKED}")),
        ("dequantized at load", None, LoweredLayer(unpacked, f"{why}{UNPACKED}")),
        ("dequantized", None, LoweredLayer("FP16 GEMM", f"{why}weights dequantized in the file")),
    ]
    for weights, rows, became in expected:
        monkeypatch.setattr(unpack_at_load, "_rows", lambda _, rows=rows: rows)
        lowered = lower_for_onnxruntime_cuda(filled(codes(4, True, 16, inputs)), weights=weights)
        assert list(lowered.layers.values()) == [became]


@pytest.mark.parametrize(
    ("weights", "rows", "branch"),
    [("packed", None, "kept"), ("dequantized at load", None, "folded"), ("dequantized at load", 16, "kept")],
)
def test_what_became_of_a_branch(
    weights: Weights, rows: int | None, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_at_load, "_rows", lambda _: rows)
    lowered = lower_for_onnxruntime_cuda(filled(codes(4, True, 16, STATIC_S8, rank=8)), weights=weights)
    assert [layer.branch for layer in lowered.layers.values()] == [branch]


def test_groups_that_no_block_divides_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a\.layer.*groups of 24"):
        lower_for_onnxruntime_cuda(filled(codes(4, True, 24)))


def test_float_layers_stay(tmp_path: Path) -> None:
    layer = nn.Linear(80, 24)
    with torch.no_grad():
        assert largest_error(answer_of(layer, tmp_path), layer(torch.from_numpy(tokens())).numpy()) < FP16


def packed_weights(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Layer → weight [K, N] of each MatMulNBits, in float32, from the file's bytes."""
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, inputs, block = attributes["bits"], attributes["K"], attributes["block_size"]
        values = [unpacked(stored[name], bits) for name in node.input[1:] if "scale" not in name]
        scale = stored[node.input[2]].astype(np.float32)
        zero = values[1][:, : scale.shape[1]] if len(values) > 1 else np.full(scale.shape, 1 << (bits - 1))
        integers = values[0].reshape(len(scale), -1, block).astype(np.float32) - zero[:, :, None]
        weights[node.name.partition("/")[0]] = (integers * scale[:, :, None]).reshape(len(scale), -1)[:, :inputs].T
    return weights


def unpacked(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [N, …] one a byte, the low half of a byte first."""
    rows = stored.reshape(len(stored), -1)
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


FORMATS: dict[str, Recipe] = {**{name: recipe_of(name) for name in preset_names()}, **OTHER_FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_the_simulations_bit_for_bit(name: str) -> None:
    lowered = lower_for_onnxruntime_cuda(canonical(FORMATS[name], IMAGE_ENCODER), weights="packed", separate=False)
    found = packed_weights(ir.to_proto(lowered.model))
    expected = {k: v for k, v in quantized(FORMATS[name]).codes.items() if k.startswith("vision_encoder.")}
    assert found.keys() == expected.keys()
    for layer, weight in found.items():
        np.testing.assert_array_equal(weight, expected[layer].weight.dequantize().T.numpy())


def saved_encoder(model: ir.Model, folder: Path, **options: Any) -> tuple[OnnxRuntimeEngine, Lowered]:
    lowered = lower_for_onnxruntime_cuda(model, **options)
    save_part(lowered.model, folder / "lowered.onnx")
    return OnnxRuntimeEngine(folder / "lowered.onnx"), lowered


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "dequantized"},
        {"weights": "packed"},
        {"weights": "packed", "separate": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["int4_w4only_rtn", "int4_svdquant"])
def test_a_whole_encoder_computes_what_torch_does_with_these_weights(
    preset: str, options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_of(preset, ipts=None)
    image = pixels(1, seed=3)
    engine, lowered = saved_encoder(canonical(recipe, IMAGE_ENCODER), tmp_path, **options)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        expected = ImageEncoder(quantized(recipe).model)(image)
    for output, exact in zip(engine.outputs, expected, strict=True):
        assert relative(torch.from_numpy(found[output]) - exact, exact) < FP16
    operators = Counter(node.op_type for node in lowered.model.graph)
    assert operators["MultiHeadAttention"] == 5
    assert operators["Split"] == (12 if options.get("separate", True) else 17)  # of 6 maxima, and of 5 times q, k and v
    assert (operators["MatMulNBits"] > 0) == (options.get("weights") == "packed")
    if not options:
        assert not [node for node in lowered.model.graph if str(node.name).endswith("low_rank/up")], "in the weights"
    if options.get("separate", True):  # else one Add has the biases of q, k and v
        assert not [value for value in keys_and_values(lowered.model) if has_bias(value)]


def keys_and_values(model: ir.Model) -> list[ir.Value | None]:
    """What all attention reads but its queries."""
    return [value for node in model.graph if node.op_type == "MultiHeadAttention" for value in node.inputs[1:]]


def has_bias(value: ir.Value | None) -> bool:
    """It is the sum of something and a constant."""
    add = producer(value, "Add")
    return add is not None and any(constant_of(term) is not None for term in add.inputs)


def test_int8_inputs_do_not_quantize_here(tmp_path: Path) -> None:
    """What the engine leaves out of W4A8 is the rounding of the inputs, and nothing else."""
    recipe = recipe_of("int4_svdquant")
    engine, lowered = saved_encoder(canonical(recipe, IMAGE_ENCODER), tmp_path)
    assert not {node.op_type for node in lowered.model.graph} & {"QuantizeLinear", "DequantizeLinear"}
    image = pixels(1, seed=3)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        simulation, real = (ImageEncoder(model)(image) for model in (quantized(recipe).model, float_model()))
    for output, exact, unrounded in zip(engine.outputs, simulation, real, strict=True):
        answer = torch.from_numpy(found[output])
        assert relative(answer - exact, exact) < 0.5 * relative(unrounded - exact, exact)


def test_the_decoder_keeps_its_numbers(tmp_path: Path) -> None:
    model = float_part(skeleton(MASK_DECODER), float_model(), half=False)
    generator = np.random.default_rng(0)
    sides = {"batch": 1, "prompts": 3, "points": 2}
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in model.graph.inputs:
        shape = [side if isinstance(side, int) else sides[str(side.value)] for side in value.shape or ()]
        feeds[str(value.name)] = generator.standard_normal(shape).astype(np.float32)
    feeds["point_coords"] = generator.uniform(0, 128, (1, 3, 2, 2)).astype(np.float32)
    feeds["point_labels"] = np.array([[[1, 0], [2, 3], [1, 1]]])
    feeds["has_mask_input"] = np.array([[0, 0, 1]], np.float32)
    before = as_written(model, feeds)
    engine, lowered = saved_encoder(model, tmp_path)
    assert {rewrite.name: rewrite.count for rewrite in lowered.rewrites}["fuse_attention"] == 7
    for found, expected in zip(engine.run(feeds).values(), before, strict=True):
        assert found.dtype == expected.dtype
        assert largest_error(found, expected) < 10 * FP16


def joint_layer(layer: LayerCodes | nn.Linear, *, twice: bool = False) -> ir.Model:
    """One layer whose 24 results are split in three; `twice` has another reader of the whole."""
    model = fill_sites(*one_layer(layer))
    graph, whole = model.graph, model.graph.outputs[0]
    split = ir.node("Split", [whole], {"axis": -1, "num_outputs": 3}, num_outputs=3, name="split")
    for index, part in enumerate(split.outputs):
        part.name, part.type, part.shape = f"part{index}", whole.type, ir.Shape(["rows", "columns", 8])
    graph.append(split)
    graph.outputs[:] = [*split.outputs, *([whole] if twice else [])]
    return model


@pytest.mark.parametrize("layer", [nn.Linear(80, 24), nn.Linear(80, 24, bias=False)], ids=["bias", "no bias"])
def test_parts_of_a_float_layer_are_layers(layer: nn.Linear) -> None:
    model = joint_layer(layer)
    before = as_written(model, {"x": tokens()})
    assert separate_parts(model).count == 1
    assert "Split" not in {node.op_type for node in model.graph}
    for found, expected in zip(as_written(model, {"x": tokens()}), before, strict=True):
        assert largest_error(found, expected) < 1e-6


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_parts_of_a_quantized_layer_are_layers(signed: bool, rank: int, tmp_path: Path) -> None:
    layer = codes(4, signed, 16, sizes=(80, 24), rank=rank)
    engine, lowered = saved_encoder(joint_layer(layer), tmp_path, weights="packed")
    assert [node.name for node in lowered.model.graph if node.op_type == "MatMulNBits"] == [
        f"a.layer/MatMul_{part}" for part in range(3)
    ]
    found = np.concatenate(list(engine.run({"x": tokens()}).values()), axis=-1)
    assert largest_error(found, simulated(layer, tokens())) < FP16


def test_a_layer_that_something_else_reads_whole_stays_whole() -> None:
    done = separate_parts(joint_layer(nn.Linear(80, 24), twice=True))
    assert done.count == 0
    assert done.refused == ("part0: its input is no linear layer that it alone reads",)
