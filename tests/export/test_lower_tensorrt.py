"""Graphs lowered for TensorRT are valid, compute what torch simulates, and hold its weights bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exported import as_written, float_model, largest_error, one_layer, quantized, skeleton
from lowered import FLIPPED_CODES, HALF_ERROR, distance, feeds, static_form
from numpy.typing import NDArray
from small_model import recipe_of
from test_linear import PER_TENSOR, PER_TOKEN, STATIC_S8, STATIC_U8, codes, filled, simulated, tokens
from torch import nn
from torch.nn import functional as F

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.engines.lint import lint
from samq.errors import UsageError
from samq.export.graph import LAYER_KEY, constant_of, producer, remove_unused
from samq.export.layer_norm import write_out_layer_norms
from samq.export.linear import fill_sites
from samq.export.lower_tensorrt import Lowered, lower_for_tensorrt
from samq.export.lowered_layer import FLOAT_GEMM, INT4_GEMM, INT8_GEMM
from samq.export.parts import float_part
from samq.export.placement import Form, Placement
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS, TRT8, TRT10, TensorRtTarget
from samq.export.tensorrt_weights import fp16_error
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes

EXACT = 1e-6
STRONG = [target for target in TARGETS.values() if target.strongly_typed]
FORMS = ["float", "int8_w8a8", "int4_w4a8_rtn", "int4_w4only_rtn"]


def checked(lowered: Lowered, target: TensorRtTarget) -> ir.Model:
    """The lowered model, valid in the target's opset."""
    proto = ir.to_proto(lowered.model)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == target.opset
    assert len(proto.opset_import) == 1
    return lowered.model


def lowered_layer(layer: LayerCodes | nn.Linear, target: TensorRtTarget, **options: Any) -> Lowered:
    """One layer, lowered and checked."""
    found = lower_for_tensorrt(filled(layer), target, **options)
    checked(found, target)
    return found


def values_of(model: ir.Model, values: list[ir.Value]) -> list[NDArray[Any]]:
    """What ONNX Runtime computes for values that depend on constants alone."""
    model.graph.inputs.clear()
    model.graph.outputs[:] = values
    remove_unused(model)
    return as_written(model, {})


def gemm(model: ir.Model, layer: str = "a.layer") -> ir.Node:
    return next(node for node in model.graph if node.name == f"{layer}/MatMul")


def canonical_answers(name: str, part: str, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """What the canonical graph gives; its LayerNormalizations are written out where those of trt8 are.

    Their last bits differ, and an INT8 code flips with them.
    """
    model = static_form(name, part)
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        write_out_layer_norms(model)
    return as_written(model, inputs)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FORMS)
def test_trt8_computes_what_the_canonical_graph_does(name: str, part: str) -> None:
    model = static_form(name, part)
    inputs = feeds(model)
    expected = canonical_answers(name, part, inputs)
    found = as_written(checked(lower_for_tensorrt(model, TRT8), TRT8), inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < EXACT


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FORMS)
def test_trt10_is_fp16_and_close(name: str, part: str) -> None:
    model = static_form(name, part)
    inputs = feeds(model)
    expected = as_written(model, inputs)
    lowered = lower_for_tensorrt(model, TRT10)
    found = as_written(checked(lowered, TRT10), inputs)
    int8 = any(layer.compute == INT8_GEMM for layer in lowered.layers.values())
    allowed = FLIPPED_CODES if int8 else HALF_ERROR
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < allowed
    products = [node for node in lowered.model.graph if node.op_type == "MatMul" and LAYER_KEY in node.metadata_props]
    assert {node.outputs[0].dtype for node in products} == {ir.DataType.FLOAT16}
    assert lowered.float32 == ()


def test_trt11_takes_the_graphs_of_trt10() -> None:
    graphs = [
        ir.to_proto(lower_for_tensorrt(static_form("int4_w4a8_rtn", MASK_DECODER), target).model) for target in STRONG
    ]
    assert [target.name for target in STRONG] == ["trt10", "trt11"]
    assert graphs[0].SerializeToString(deterministic=True) == graphs[1].SerializeToString(deterministic=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["int8_w8a8", "int4_w4a8_rtn"])
def test_trt8_weights_are_the_simulated_ones_bit_for_bit(name: str, part: str) -> None:
    simulation = quantized(recipe_of(name)).model
    lowered = lower_for_tensorrt(static_form(name, part), TRT8)
    layers = [layer for layer, became in lowered.layers.items() if became.compute == INT8_GEMM]
    weights = [gemm(lowered.model, layer).inputs[1] for layer in layers]
    assert len(layers) > 20
    for layer, array in zip(layers, values_of(lowered.model, [w for w in weights if w is not None]), strict=True):
        np.testing.assert_array_equal(array.T, simulation.get_submodule(layer).weight.numpy(), err_msg=layer)


@pytest.mark.parametrize("name", ["int8_w8a8", "int4_w4a8_rtn"])
def test_trt10_codes_and_scales_are_the_simulated_ones(name: str) -> None:
    simulation = quantized(recipe_of(name)).model
    lowered = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT10)
    for layer, became in lowered.layers.items():
        assert became.compute == INT8_GEMM
        dequantize = producer(gemm(lowered.model, layer).inputs[1], "DequantizeLinear")
        assert dequantize is not None
        stored, scale = (constant_of(value) for value in dequantize.inputs[:2])
        assert stored is not None
        assert scale is not None
        assert (stored.dtype, scale.dtype) == (np.int8, np.float16)
        real = stored.astype(np.float32) * scale.astype(np.float32)
        np.testing.assert_array_equal(real.T, simulation.get_submodule(layer).weight.numpy(), err_msg=layer)


@pytest.mark.parametrize(("bits", "signed", "group"), [(4, True, 16), (4, False, 16), (4, True, 0), (8, True, 0)])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_int8_layer_computes_what_torch_simulates(bits: int, signed: bool, group: int, rank: int) -> None:
    layer = codes(bits, signed, group, STATIC_S8, rank=rank)
    lowered = lowered_layer(layer, TRT8)
    assert lowered.layers["a.layer"].compute == INT8_GEMM
    assert lowered.layers["a.layer"].branch == ("kept" if rank else "")
    assert largest_error(as_written(lowered.model, {"x": tokens()})[0], simulated(layer, tokens())) < 1e-5


@pytest.mark.parametrize("inputs", [None, STATIC_S8])
def test_a_multiplier_stands_in_front_of_everything(inputs: InputGrid | None) -> None:
    layer = codes(4, True, 16, inputs, rank=4, multiplied=True)
    lowered = lowered_layer(layer, TRT8)
    assert largest_error(as_written(lowered.model, {"x": tokens()})[0], simulated(layer, tokens())) < 1e-5


@pytest.mark.parametrize("inputs", [None, STATIC_S8])
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_inputs_are_rotated_behind_the_multiplier(
    inputs: InputGrid | None, multiplied: bool, target: TensorRtTarget
) -> None:
    layer = codes(4, True, 16, inputs, rank=4, multiplied=multiplied, rotated=True)
    lowered = lowered_layer(layer, target)
    assert set(lowered.layers) == {"a.layer"}
    assert lowered.layers["a.layer"].compute == (FLOAT_GEMM if inputs is None else INT8_GEMM)
    found = as_written(lowered.model, {"x": tokens()})[0]
    allowed = 1e-5 if target is TRT8 else FLIPPED_CODES if inputs else HALF_ERROR
    assert largest_error(found, simulated(layer, tokens())) < allowed


def test_nothing_stands_between_constants_and_the_gemm() -> None:
    for target, weights in ((TRT8, ["QuantizeLinear", "DequantizeLinear"]), (TRT10, ["DequantizeLinear"])):
        model = lowered_layer(codes(4, True, 16, STATIC_S8), target).model
        node, found = gemm(model).inputs[1], []
        while node is not None and node.const_value is None:
            before = node.producer()
            assert before is not None
            found.insert(0, before.op_type)
            node = before.inputs[0]
        assert found == weights
        casts = {node.name for node in model.graph if node.op_type == "Cast"}
        assert casts == (set() if target is TRT8 else {"x/to_fp16", "y/to_fp32"})


def test_uint8_inputs_around_128_are_int8_inputs_around_0() -> None:
    layer = codes(8, True, 0, InputGrid("uint8", "per_tensor", 0.05, 128))
    lowered = lowered_layer(layer, TRT8)
    assert largest_error(as_written(lowered.model, {"x": tokens()})[0], simulated(layer, tokens())) < EXACT


@pytest.mark.parametrize(
    ("inputs", "fix"), [(STATIC_U8, "ipts.dtype"), (PER_TENSOR, "ipts.mode"), (PER_TOKEN, "ipts.granularity")]
)
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_inputs_that_tensorrt_has_not_are_refused_by_name(target: TensorRtTarget, inputs: InputGrid, fix: str) -> None:
    with pytest.raises(UsageError, match=rf"^a\.layer: .*{fix}"):
        lower_for_tensorrt(filled(codes(8, True, 0, inputs)), target)


def test_a_weight_that_is_no_int8_weight_is_refused_by_name() -> None:
    layer = codes(4, True, 16)
    impossible = LayerCodes(layer.weight, STATIC_S8, None, layer.bias)  # one level of scales under INT8 inputs
    with pytest.raises(UsageError, match=r"^a\.layer: .*wgts\.dtype"):
        lower_for_tensorrt(filled(impossible), TRT8)


@pytest.mark.parametrize("sizes", [(8, 24), (80, 4)])
def test_a_small_gemm_stays_float(sizes: tuple[int, int]) -> None:
    layer = codes(8, True, 0, STATIC_S8, sizes=sizes)
    lowered = lowered_layer(layer, TRT8)
    assert lowered.layers["a.layer"].compute == FLOAT_GEMM
    assert f"{sizes[0]} × {sizes[1]}" in lowered.layers["a.layer"].reason
    float_inputs = LayerCodes(layer.weight, None, None, layer.bias)
    found = as_written(lowered.model, {"x": tokens(sizes[0])})[0]
    assert largest_error(found, simulated(float_inputs, tokens(sizes[0]))) < EXACT


@pytest.mark.parametrize(
    ("width", "group", "block"), [(128, 64, 64), (128, 128, 128), (192, 0, 64), (192, 128, 64), (256, 256, 128)]
)
@pytest.mark.parametrize("rank", [0, 4])
def test_int4_weights_in_blocks(width: int, group: int, block: int, rank: int) -> None:
    layer = codes(4, True, group, sizes=(width, 24), rank=rank)
    lowered = lowered_layer(layer, TRT10)
    assert lowered.layers["a.layer"].compute == INT4_GEMM
    dequantize = producer(gemm(lowered.model).inputs[1], "DequantizeLinear")
    assert dequantize is not None
    assert dequantize.attributes["block_size"].as_int() == block
    stored, scale, zero_point = (constant_of(value) for value in dequantize.inputs)
    assert stored is not None
    assert scale is not None
    assert zero_point is not None
    assert not zero_point.astype(int).any()
    real = stored.astype(np.float32) * np.repeat(scale.astype(np.float32), block, axis=0)
    np.testing.assert_array_equal(real.T, layer.weight.dequantize().numpy())
    found = as_written(lowered.model, {"x": tokens(width)})[0]
    assert largest_error(found, simulated(layer, tokens(width))) < HALF_ERROR


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (codes(4, True, 16, sizes=(128, 24)), "groups of 16 are no multiple of 64"),
        (codes(4, True, 64, sizes=(96, 24)), "96 inputs are no multiple of 64"),
        (codes(4, False, 64, sizes=(128, 24)), "no zero-points"),
        (codes(4, True, 64, sizes=(128, 33)), "33 is odd"),
        (codes(8, True, 0, sizes=(128, 24)), "no INT8 weights without INT8 inputs"),
    ],
)
def test_weights_that_int4_blocks_cannot_hold_are_float_and_say_why(layer: LayerCodes, reason: str) -> None:
    lowered = lowered_layer(layer, TRT10)
    assert lowered.layers["a.layer"].compute == FLOAT_GEMM
    assert reason in lowered.layers["a.layer"].reason
    width = layer.weight.codes.shape[1]
    found = as_written(lowered.model, {"x": tokens(width)})[0]
    assert largest_error(found, simulated(layer, tokens(width))) < HALF_ERROR


def test_zero_points_in_the_middle_are_int4() -> None:
    """uint4 codes around 8 are int4 codes around 0."""
    layer = codes(4, False, 64, sizes=(128, 24))
    assert layer.weight.scales.zero_point is not None
    layer.weight.scales.zero_point[:] = 8
    lowered = lowered_layer(layer, TRT10)
    assert lowered.layers["a.layer"].compute == INT4_GEMM
    found = as_written(lowered.model, {"x": tokens(128)})[0]
    assert largest_error(found, simulated(layer, tokens(128))) < HALF_ERROR


@pytest.mark.parametrize("target", STRONG, ids=lambda target: target.name)
def test_the_symmetric_preset_is_int4_where_blocks_divide_the_inputs(target: TensorRtTarget) -> None:
    simulation = quantized(recipe_of("int4_w4only_sym")).model
    lowered = lower_for_tensorrt(static_form("int4_w4only_sym", IMAGE_ENCODER), target)
    assert lint(checked(lowered, target), target) == []
    assert {layer.compute for layer in lowered.layers.values()} == {INT4_GEMM, FLOAT_GEMM}
    for layer, became in lowered.layers.items():
        weight = gemm(lowered.model, layer).inputs[1]
        dequantize, expected = producer(weight, "DequantizeLinear"), simulation.get_submodule(layer).weight.numpy().T
        if len(expected) % 64:
            assert (became.compute, dequantize) == (FLOAT_GEMM, None)
            assert f"{len(expected)} inputs are no multiple of 64" in became.reason
            continue
        assert (became.compute, became.reason) == (INT4_GEMM, "")
        assert dequantize is not None
        stored, scale, zero_point = (constant_of(value) for value in dequantize.inputs)
        assert stored is not None
        assert scale is not None
        assert zero_point is not None
        assert (stored.dtype.name, len(stored) // len(scale), zero_point.astype(int).any()) == ("int4", 64, False)
        real = stored.astype(np.float32) * np.repeat(scale.astype(np.float32), 64, axis=0)
        np.testing.assert_array_equal(real, expected, err_msg=layer)


@pytest.mark.parametrize("target", STRONG, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (codes(4, False, 64, sizes=(128, 24)), "(code − zero-point) · scale"),
        (codes(4, True, 64, sizes=(96, 24)), "code · scale"),
        (codes(8, True, 0, sizes=(128, 24)), "code · scale"),
    ],
)
def test_the_reason_for_float_weights_says_how_much_fp16_rounds_them(
    layer: LayerCodes, what: str, target: TensorRtTarget
) -> None:
    lowered = lowered_layer(layer, target)
    exact, stored = layer.weight.dequantize().double().numpy().T, constant_of(gemm(lowered.model).inputs[1])
    assert stored is not None
    assert stored.dtype == np.float16
    error = (np.abs(stored.astype(np.float64) - exact)[exact != 0] / np.abs(exact[exact != 0])).max()
    assert 0 < error <= 2.0**-11
    assert lowered.layers["a.layer"].reason.endswith(f"; FP16 rounds {what} by up to {100 * error:.3g} %")


@pytest.mark.parametrize("scale", [0.125, 1.25 * 2.0**-14, 3 * 2.0**-24])  # of few bits; the last is a subnormal number
def test_the_reason_says_nothing_of_rounding_where_fp16_holds_every_product(scale: float) -> None:
    layer = codes(4, False, 64, sizes=(128, 24))
    layer.weight.scales.scale[:] = scale
    lowered = lowered_layer(layer, TRT10)
    stored, reason = constant_of(gemm(lowered.model).inputs[1]), lowered.layers["a.layer"].reason
    assert stored is not None
    np.testing.assert_array_equal(stored.astype(np.float32).T, layer.weight.dequantize().numpy())
    assert "no zero-points" in reason
    assert "FP16" not in reason


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        ([0.0, 1.0, -2.5], 0.0),
        ([1.0, 1 + 2.0**-11, 3.0], 2.0**-11 / (1 + 2.0**-11)),  # a tie, which goes to even
        ([2.0**-26, 0.0], 2.0**-12),  # lost, and told against FP16's smallest normal number
        ([1.0, -1e6], np.inf),
        ([], 0.0),
    ],
)
def test_the_error_of_fp16_is_relative_to_each_weight(weight: list[float], error: float) -> None:
    assert fp16_error(np.array(weight, np.float32)) == pytest.approx(error)


def test_trt8_has_no_int4() -> None:
    layer = codes(4, True, 64, sizes=(128, 24))
    lowered = lowered_layer(layer, TRT8)
    assert lowered.layers["a.layer"].compute == FLOAT_GEMM
    assert "TensorRT 8.6 has no 4-bit weights" in lowered.layers["a.layer"].reason
    assert largest_error(as_written(lowered.model, {"x": tokens(128)})[0], simulated(layer, tokens(128))) < EXACT


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
def test_a_folded_branch_is_within_half_a_step_and_its_error_is_reported(target: TensorRtTarget) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=4)
    lowered = lowered_layer(layer, target, low_rank="fold")
    assert not [node.name for node in lowered.model.graph if node.name and "low_rank" in node.name]
    wanted = layer.effective_weight().double().numpy().T
    parameters = producer(gemm(lowered.model).inputs[1], "DequantizeLinear")
    assert parameters is not None
    scale = constant_of(parameters.inputs[1])
    assert scale is not None
    assert (scale == scale.astype(np.float16)).all()
    weight = gemm(lowered.model).inputs[1]
    assert weight is not None
    became = lowered.layers["a.layer"]
    found = values_of(lowered.model, [weight])[0].astype(np.float64)
    assert (np.abs(found - wanted) <= (0.5 + 127 * 2.0**-11) * scale.astype(np.float64)).all()
    assert (became.compute, became.branch) == (INT8_GEMM, "folded")
    assert became.fold_error == pytest.approx(np.linalg.norm(found - wanted) / np.linalg.norm(wanted), rel=1e-2)


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
def test_a_narrowed_branch_keeps_its_first_components_and_folds_the_others(target: TensorRtTarget) -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=12)
    assert layer.branch is not None
    lowered = lowered_layer(layer, target, placement=Placement(layers={"*": "branch-8"}))
    became = lowered.layers["a.layer"]
    assert (became.compute, became.branch, became.kept_rank) == (INT8_GEMM, "kept", 8)
    factors = {name: constant_of(node.inputs[1]) for name, node in branch_nodes(lowered.model).items()}
    down, up = factors["down_8"], factors["up"]
    np.testing.assert_array_equal(down, layer.branch.down[:8].numpy().T)
    np.testing.assert_array_equal(up, layer.branch.up[:, :8].numpy().T)
    assert largest_error(as_written(lowered.model, {"x": tokens()})[0], narrowed(layer, 8)) < 2e-2
    weight = gemm(lowered.model).inputs[1]
    assert weight is not None
    found = values_of(lowered.model, [weight])[0].astype(np.float64)
    wanted = layer.effective_weight().double().numpy().T - down.astype(np.float64) @ up.astype(np.float64)
    assert became.fold_error == pytest.approx(np.linalg.norm(found - wanted) / np.linalg.norm(wanted), rel=1e-2)


def test_a_branch_is_not_narrowed_to_more_than_it_has() -> None:
    layer = codes(4, True, 16, STATIC_S8, rank=12)
    forms: tuple[Form, ...] = ("branch", "branch-16")
    whole, narrowed = (lowered_layer(layer, TRT8, placement=Placement(layers={"*": form})) for form in forms)
    assert whole.layers == narrowed.layers
    assert branch_nodes(whole.model).keys() == branch_nodes(narrowed.model).keys() == {"down", "up", "Add"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_whole_encoder_with_narrowed_branches(target: TensorRtTarget) -> None:
    """Rewrites part what is narrow, too."""
    wgts = {"low_rank": {"rank": 16, "max_overhead": None}}
    branches: dict[Form, Lowered] = {}
    forms: tuple[Form, ...] = ("branch", "branch-8")
    for form in forms:
        model = static_form("int4_svdquant", IMAGE_ENCODER, wgts=wgts)
        lowered = lower_for_tensorrt(model, target, placement=Placement(layers={"*": form}), rewrites=REWRITES)
        assert not lint(checked(lowered, target), target)
        branches[form] = lowered
    kept = [layer.kept_rank for layer in branches["branch-8"].layers.values() if layer.branch]
    assert kept
    assert set(kept) == {8}
    given = feeds(branches["branch"].model)
    whole, narrowed = (as_written(lowered.model, given) for lowered in branches.values())
    assert 0 < max(distance(*pair) for pair in zip(narrowed, whole, strict=True)) < FLIPPED_CODES


def narrowed(layer: LayerCodes, rank: int) -> NDArray[Any]:
    """What a layer gives when its INT8 weight holds its branch but the first components, which read float inputs."""
    assert layer.branch is not None
    assert layer.inputs is not None
    x, first = torch.from_numpy(tokens()), layer.branch.up[:, :rank] @ layer.branch.down[:rank]
    answer = F.linear(layer.inputs.fake_quantize(x), layer.effective_weight() - first, layer.bias) + F.linear(x, first)
    return answer.numpy()


def branch_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes of a layer's branch, by the last part of their names."""
    found = [(str(node.name).partition("/low_rank/"), node) for node in model.graph]
    return {name: node for (_, has_one, name), node in found if has_one}


def test_a_branch_beside_float_inputs_is_not_folded() -> None:
    layer = codes(4, True, 64, sizes=(128, 24), rank=4)
    assert lowered_layer(layer, TRT10, low_rank="fold").layers["a.layer"].branch == "kept"


def twins(layer: LayerCodes, other: LayerCodes) -> ir.Model:
    """Two layers that read one tensor."""
    model, layers = one_layer(layer)
    site = model.graph[0]
    twin = ir.node(site.op_type, [site.inputs[0]], {"layer": "b.layer"}, domain=site.domain, name="twin")
    output = twin.outputs[0]
    output.name, output.type, output.shape = "z", site.outputs[0].type, site.outputs[0].shape
    model.graph.append(twin)
    model.graph.outputs.append(output)
    return fill_sites(model, layers | {"b.layer": other})


@pytest.mark.parametrize(("scale", "quantizers"), [(0.05, 1), (0.06, 2)])
def test_layers_share_the_quantization_of_one_tensor_where_scales_agree(scale: float, quantizers: int) -> None:
    layer, other = (codes(8, True, 0, InputGrid("sint8", "per_tensor", number)) for number in (0.05, scale))
    model = lower_for_tensorrt(twins(layer, other), TRT10).model
    found = [node.op_type for node in model.graph]
    assert found.count("QuantizeLinear") == quantizers
    assert found.count("DequantizeLinear") == quantizers + 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_baseline_stored_in_fp16_needs_no_casts_and_no_resize(target: TensorRtTarget) -> None:
    lowered = lower_for_tensorrt(static_form("half", IMAGE_ENCODER), target)
    graph = checked(lowered, target).graph
    casts = [node for node in graph if node.op_type == "Cast"]
    assert len(casts) == (4 if target.strongly_typed else 0)  # of the inputs and outputs
    assert "Resize" not in {node.op_type for node in graph}, "the position embedding's is folded"
    assert {layer.compute for layer in lowered.layers.values()} == {FLOAT_GEMM}


def test_trt8_names_what_must_stay_float32() -> None:
    lowered = lower_for_tensorrt(static_form("float", MASK_DECODER), TRT8)
    nodes = {node.name: node for node in lowered.model.graph}
    kept = {nodes[name].op_type for name in lowered.float32}
    assert {"Sin", "Cos", "ReduceSum", "Div"} <= kept
    assert not kept & {"LayerNormalization", "Softmax", "Conv"}
    counts = [node for node in nodes.values() if node.op_type == "ReduceSum"]
    assert {node.outputs[0].dtype for node in counts} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
@pytest.mark.parametrize("part", PARTS)
def test_dynamic_shapes_stay_possible(target: TensorRtTarget, part: str) -> None:
    model = float_part(skeleton(part), float_model(), half=False)
    inputs = feeds(model)
    expected = as_written(model, inputs)
    lowered = checked(lower_for_tensorrt(model, target), target)
    found = as_written(lowered, inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < HALF_ERROR
    assert any(isinstance(side, ir.SymbolicDim) for value in lowered.graph.inputs for side in value.shape or ())


@pytest.mark.parametrize("name", ["float", "int8_w8a8"])
def test_query_key_and_value_apart_give_the_same(name: str) -> None:
    inputs = feeds(static_form(name, IMAGE_ENCODER))
    expected = canonical_answers(name, IMAGE_ENCODER, inputs)
    lowered = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT8, rewrites=("split_qkv",))
    found = as_written(checked(lowered, TRT8), inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < EXACT
    assert not [node for node in lowered.model.graph if node.op_type == "Split"]
    names = {node.name for node in lowered.model.graph}
    assert {f"vision_encoder.backbone.blocks.0.attn.qkv/MatMul_{index}" for index in range(3)} <= names
