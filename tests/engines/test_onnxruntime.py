"""The ONNX Runtime engine, and its account of what it executes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from exported import canonical, quantized
from small_model import IMAGE_SIZE, pixels, recipe_of

from samq.calib.parts import IMAGE_ENCODER
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.errors import BadInput
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import save_part
from samq.quant.config import Recipe
from samq.tools.targets import requested_compute

PER_TOKEN = recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic", "granularity": "per_token"})


@pytest.mark.parametrize(
    ("recipe", "silently"),
    [(PER_TOKEN, "FP32 GEMM"), (recipe_of("int4_w4only_rtn"), "INT4 weights, INT8 arithmetic")],
    ids=["per token", "weights only"],
)
def test_what_the_canonical_graph_silently_runs_as_is_told(recipe: Recipe, silently: str, tmp_path: Path) -> None:
    """The case that samq exists to catch: a Q/DQ graph that executes as something else."""
    path = tmp_path / "canonical.onnx"
    save_part(canonical(recipe, IMAGE_ENCODER), path)
    executed = executed_layers(path)
    layers = [name for name in quantized(recipe).codes if name.startswith("vision_encoder.")]
    assert {executed[name].compute for name in layers} == {silently}
    assert silently != requested_compute(recipe)


@pytest.mark.parametrize("preset", ["int4_svdquant", "int4_w4only_rtn"])
def test_the_lowered_graph_executes_what_was_asked_for(preset: str, tmp_path: Path) -> None:
    recipe, path = recipe_of(preset), tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER)), path)
    executed = executed_layers(path)
    layers = [name for name in quantized(recipe).codes if name.startswith("vision_encoder.")]
    assert {executed[name].compute for name in layers} == {requested_compute(recipe)}


def test_quantized_activations_of_weights_only_kernels_are_told(tmp_path: Path) -> None:
    path = tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER)), path)
    model = onnx.load(path)
    changed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for attribute in (attribute for node in changed for attribute in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 4
    onnx.save(model, path)
    assert "INT4 weights, INT8 arithmetic" in {found.compute for found in executed_layers(path).values()}


@pytest.mark.parametrize("content", [None, b"", b"not onnx", b"\x08\x07\x12\x00"])
def test_a_file_that_is_no_model_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.onnx") as caught:
        OnnxRuntimeEngine(path)
    assert "\n" not in str(caught.value)


def test_truncated_models_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_part(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER), path)
    path.write_bytes(path.read_bytes()[:-1000])
    for use in (OnnxRuntimeEngine, executed_layers):
        with pytest.raises(BadInput, match=r"model\.onnx"):
            use(path)


def test_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_part(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER), path)
    engine = OnnxRuntimeEngine(path, threads=1)
    assert engine.run({"pixel_values": pixels(1).numpy(), "more": np.zeros(1)}).keys() == set(engine.outputs)
    for feeds in ({"pixel_values": np.zeros((1, 3, 7, IMAGE_SIZE), np.float32)}, {"pixels": pixels(1).numpy()}):
        with pytest.raises(BadInput, match="pixel_values") as caught:
            engine.run(feeds)
        assert "\n" not in str(caught.value)
