"""Recipes with a form for each layer: every lowering gives each layer the kernel of its own form."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from exported import as_written, canonical, float_model, largest_error, quantized
from small_model import pixels, recipe_of, relative

from samq.calib.parts import IMAGE_ENCODER, ImageEncoder
from samq.engines.lint import lint
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.lowered_layer import FLOAT_GEMM
from samq.export.parts import save_part
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS, TRT8, TensorRtTarget
from samq.quant.config import Recipe
from samq.tools.targets import TensorRt, requested_compute

FIRST = "vision_encoder.backbone.blocks.0"
LAYERS = {
    f"{FIRST}.attn.*": {"dtype": "float"},
    "*.mlp.proj_in": {"dtype": "sint8", "group_shapes": [[1, -1]]},
    "*.mlp.proj_out": {"low_rank": {"rank": 4, "max_overhead": None}},
}
MIXED = {
    "W4A8, W8A8 and float": recipe_of("int4_w4a8_rtn", wgts={"skip_decoder": True}, layers=LAYERS),
    "W4, W8 and float": recipe_of("int4_w4only_rtn", wgts={"skip_decoder": True}, layers=LAYERS),
}


def encoder_layers(recipe: Recipe) -> dict[str, bool]:
    """Name of each linear layer of the encoder's blocks → whether it is quantized."""
    plans = quantized(recipe).plans
    linear = [plan for plan in plans if plan.name.startswith("vision_encoder.backbone.blocks.")]
    return {plan.name: plan.skip is None for plan in linear}


@pytest.mark.parametrize("name", MIXED)
def test_onnx_runtime_on_the_cpu_executes_what_each_layer_asks_for(name: str, tmp_path: Path) -> None:
    recipe, image = MIXED[name], pixels(1, seed=3)
    path = tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER)), path)
    engine = OnnxRuntimeEngine(path)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        expected, unrounded = (ImageEncoder(model)(image) for model in (quantized(recipe).model, float_model()))
    for output, exact, real in zip(engine.outputs, expected, unrounded, strict=True):
        difference = relative(torch.from_numpy(found[output]) - exact, exact)
        assert difference < (1e-5 if recipe.weight_only else 0.8 * relative(real - exact, exact))
    executed = executed_layers(path)
    kinds = set()
    for layer, is_quantized in encoder_layers(recipe).items():
        if is_quantized:
            kinds.add(executed[layer].compute)
            assert executed[layer].compute == requested_compute(recipe.of_layer(layer))
        elif layer in executed:
            assert not executed[layer].compute.startswith("INT")
    assert len(kinds) == (2 if recipe.weight_only else 1)  # W4A8 and W8A8 are INT8 GEMMs both


@pytest.mark.parametrize("name", MIXED)
def test_the_graph_for_onnx_runtime_on_cuda_holds_each_layer_in_its_bits(name: str, tmp_path: Path) -> None:
    recipe = MIXED[name]
    model = lower_for_onnxruntime_cuda(canonical(recipe, IMAGE_ENCODER), weights="packed", separate=False).model
    bits = {}
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            bits[str(node.name).removesuffix("/MatMul")] = node.attributes["bits"].as_int()
    expected = {
        layer: 8 if recipe.of_layer(layer).two_level else recipe.of_layer(layer).wgts.bits
        for layer, is_quantized in encoder_layers(recipe).items()
        if is_quantized
    }
    assert bits == expected
    save_part(model, tmp_path / "lowered.onnx")
    found = OnnxRuntimeEngine(tmp_path / "lowered.onnx").run({"pixel_values": pixels(1, seed=3).numpy()})
    with torch.no_grad():
        exact = ImageEncoder(float_model())(pixels(1, seed=3))[0]
    assert 0 < relative(torch.from_numpy(found["image_embeddings"]) - exact, exact) < 0.3


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", MIXED)
def test_tensorrt_gets_each_layer_in_its_form(name: str, target: TensorRtTarget) -> None:
    recipe = MIXED[name]
    lowered = lower_for_tensorrt(canonical(recipe, IMAGE_ENCODER), target, rewrites=REWRITES)
    assert lint(lowered.model, target) == []
    for layer, is_quantized in encoder_layers(recipe).items():
        found = lowered.layers[layer]
        if not is_quantized:
            assert found.compute == FLOAT_GEMM
            assert not found.reason
        elif not recipe.weight_only:
            assert found.compute == TensorRt(target).executes(recipe.of_layer(layer))


def test_the_graph_for_tensorrt_computes_what_the_canonical_one_does() -> None:
    recipe = MIXED["W4, W8 and float"]
    feeds = {"pixel_values": pixels(1, seed=3).numpy()}
    (expected, *_) = as_written(canonical(recipe, IMAGE_ENCODER), feeds)
    model: ir.Model = lower_for_tensorrt(canonical(recipe, IMAGE_ENCODER), TRT8).model
    (found, *_) = as_written(model, feeds)
    assert largest_error(found, expected) < 1e-4
